"""The memory that tools take for a checkpoint of some GB: each in a new process, with all that it starts itself."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptstore.tools.turns import Tell, turns

BYTES = 4_000_000_000
_LAYERS = 20
_SAMPLE_S = 0.01


def measure(
    folder: str, rounds: int, *, size: int = BYTES, names: tuple[str, ...] = (), tell: Tell | None = None
) -> dict[str, Any]:
    """The most anonymous memory over that before the tool began, in bytes, by tool, one number a round.

    Two checkpoints of ``size`` bytes lie in a store on disk. What is mapped from files doesn't count: the system takes
    it away when it wants.
    """
    names = names or tuple(TOOLS)
    _in_new_process("make", folder, size)
    peaks: dict[str, list[int]] = {name: [] for name in names}
    for name in turns(names, rounds, tell):
        peaks[name].append(_in_new_process(name, folder, size))
    return {"bytes": size, "peak_bytes": peaks}


def _in_new_process(name: str, folder: str, size: int) -> int:
    command = [sys.executable, "-m", "benchmarks.toolmemory", name, folder, str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    return int(json.loads(done.stdout)["peak_bytes"])


def make(folder: str, size: int) -> None:
    """Two checkpoints that differ, and the same as foreign files."""
    import torch

    import ckptstore as cs

    def layer() -> torch.nn.Module:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.randn(size // (4 * _LAYERS * 1024), 1024))
        return module

    model = torch.nn.ModuleList([layer() for _ in range(_LAYERS)])
    with cs.open(_store(folder)) as store:
        store.save({"model": model}, step=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)
        store.save({"model": model}, step=2)
        cs.export(store, "step:1", os.path.join(folder, "foreign.pt"), to="torch")
        cs.export(store, "step:1", os.path.join(folder, "foreign.safetensors"), to="safetensors")
        cs.export(store, "step:1", os.path.join(folder, "foreign-dcp"), to="dcp")


def _store(folder: str) -> str:
    return os.path.join(folder, "store")


def _export(to: str) -> Callable[[str], object]:
    def run(folder: str) -> object:
        import ckptstore as cs

        with cs.open(_store(folder), read_only=True) as store:
            made = cs.export(store, "latest", os.path.join(folder, f"exported-{to}"), to=to)  # type: ignore[arg-type]
        shutil.rmtree(made.path) if made.path.is_dir() else made.path.unlink()
        return made

    return run


def _import(name: str) -> Callable[[str], object]:
    def run(folder: str) -> object:
        import ckptstore as cs

        with cs.open(os.path.join(folder, "imported")) as store:
            made = cs.import_from(os.path.join(folder, name), store, step=1, again=True)
            store.delete("latest", reclaim=True)
            return made.checkpoints[0]

    return run


def _average(folder: str) -> object:
    import ckptstore as cs

    with cs.open(_store(folder), read_only=True) as store, cs.open(os.path.join(folder, "averaged")) as target:
        made = cs.average(store, ["step:1", "step:2"], target=target)
        target.delete("latest", reclaim=True)
        return made


def _diff(folder: str) -> object:
    import ckptstore as cs

    with cs.open(_store(folder), read_only=True) as store:
        return cs.diff(store, "step:1", "step:2")


def _examine(folder: str) -> object:
    import ckptstore as cs

    with cs.open(_store(folder), read_only=True) as store:
        return cs.examine(store, "latest", "model/0.weight")


TOOLS: dict[str, Callable[[str], object]] = {
    "export --to hf": _export("hf"),
    "export --to safetensors": _export("safetensors"),
    "export --to torch": _export("torch"),
    "export --to dcp": _export("dcp"),
    "import foreign.pt": _import("foreign.pt"),
    "import foreign.safetensors": _import("foreign.safetensors"),
    "import foreign-dcp": _import("foreign-dcp"),
    "average": _average,
    "diff": _diff,
    "show --tensor": _examine,
}


class Peak:
    """The most anonymous memory of this process and all below it, sampled by a thread."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Peak:
        self._before = anonymous(os.getpid())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(_SAMPLE_S):
            self.bytes = max(self.bytes, sum(anonymous(pid) for pid in family(os.getpid())) - self._before)


def family(pid: int) -> list[int]:
    """A process, and all that it and its children have started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = task.read_text().split()
        except OSError:
            continue
        found += [one for child in below for one in family(int(child))]
    return found


def anonymous(pid: int) -> int:
    """Bytes of memory that no file stands behind; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """What ``measure`` starts: prints a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder")
    parser.add_argument("size", type=int)
    asked = parser.parse_args()
    import torch

    import ckptstore.tools.export  # noqa: F401 - what a tool imports is not what it takes for a checkpoint

    torch.ones(10).bfloat16().float().sum()
    with Peak() as peak:
        if asked.name == "make":
            make(asked.folder, asked.size)
        else:
            TOOLS[asked.name](asked.folder)
    print(json.dumps({"peak_bytes": peak.bytes}))


if __name__ == "__main__":
    main()
