"""Nothing runs that was loaded: Python's own audit events over every way to load, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, collections, random, dataclasses
import numpy as np, torch, ckptstore as cs

Point = collections.namedtuple("Point", "x y")

@dataclasses.dataclass
class Settings:
    rate: float

class Own:
    pass

cs.register_type(Own, to_state=vars, from_state=lambda value: Own())

def state():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    plain = {"point": Point(1, 2), "settings": Settings(0.1), "set": {1}, "nan": float("nan"), "big": 2**99,
             "array": np.arange(3), "deque": collections.deque([1]), "own": Own(), "tuple": (1, b"x" * 5000)}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": cs.RNG(),
            "generator": torch.Generator(), "numpy": np.random.default_rng(1), "plain": plain}

def load_every_way(url):
    for compression in ("none", "zstd", "float-zstd"):
        with cs.open(url, compression=compression) as store:
            for selector in ("latest", "step:1", "best:loss", "epoch:2", "held", "milestone:1B"):
                store.load(selector)
                store.load(selector, into=state())
                store.load(selector, only=["model/*"])
                store.load(selector, into={"model": state()["model"]}, only=["model/*"])
                store.load(selector, into={"model": state()["model"]}, strict=False)
            store.checkpoints(), store.holds(), store.deleted(), store.verify()
            store.contents(store.resolve()).tensors

FORBIDDEN = {"exec", "compile", "import", "marshal.loads", "pickle.find_class", "code.__new__", "os.system"}
events = []
armed = False
def hook(event, arguments):
    if armed and event in FORBIDDEN:
        events.append((event, str(arguments)[:200]))

url = sys.argv[1]
for compression in ("none", "zstd", "float-zstd"):
    with cs.open(url, compression=compression) as store:
        store.save(state(), step=1, epoch=2, metrics={"loss": 1.0}, reasons=["milestone 1B"])
store.hold("step:1", "held") if compression == "none" else cs.open(url).hold("step:1", "held")
# Warm-up: what torch and NumPy import at their first use is no part of what a checkpoint can do.
load_every_way(url)
load_every_way(url)
sys.addaudithook(hook)
armed = True
load_every_way(url)
armed = False
assert not events, events[:5]
armed = True
compile("1", "seen", "eval")
assert [event for event, _ in events] == ["compile"], "the hook sees nothing"
print("nothing ran")
"""


def test_no_load_path_runs_anything(store_path: Path) -> None:
    """After warm-up no load imports, compiles, executes or unpickles; and the hook does see such things."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(store_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "nothing ran\n"
