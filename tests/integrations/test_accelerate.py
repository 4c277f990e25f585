"""Accelerate: prepared objects are saved and resumed as any others, exactly; and what ``save_state`` saves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from tests.forked import preload
from tests.trainer import processes
from tests.trainer.processes import check_same
from tests.trainer.processes import run as run_plain
from tests.trainer.program import Options, notes

pytest.importorskip("accelerate")

from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from ckptstore.integrations.accelerate import CkptStoreState
from ckptstore.trainer.prepared import unwrapped
from tests.integrations import accelerate_program

preload("tests.integrations.accelerate_program")

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"save": "every(steps=2)"},
    # Seven batches an epoch: the last window is a short one, which only the loader's end can tell.
    "sgd, accumulation": {"optimizer": "sgd", "accumulation": 3, "samples": 21, "save": "every(steps=1)"},
    "async": {"mode": "async"},
}
EXITS = {"exit": 9, "kill": -9, "term": 143, "int": 130, "raise": 7}


def run(options: Options, **changes: Any) -> int:
    return processes.run(options, main=accelerate_program.main, **changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_anywhere(variant: str, tmp_path: Path, full: bool) -> None:
    """The run goes on as one that was never interrupted."""
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), **VARIANTS[variant])
    alone = tmp_path / "alone"
    assert run(made, url=str(tmp_path / "alone-store"), out=str(alone), save="at(0)") == 0
    expected = notes(alone)
    total = max(note["step"] for note in expected if "step" in note)
    cases = [(at, where) for at in range(total + 1) for where in ("step", "backward")]
    cases = [case for case in cases if case not in ((0, "step"), (total, "backward"))]
    cases += [(note["evaluated"], "evaluation") for note in expected if "evaluated" in note]
    ways, offset, skip = list(EXITS), list(VARIANTS).index(variant), 1 if full else 17
    for number, (at, where) in enumerate(cases):
        if (number + offset) % skip:
            continue
        way = ways[(number + offset) // skip % len(ways)]
        url, out = str(tmp_path / f"store-{number}"), str(tmp_path / f"notes-{number}")
        case = replace(made, url=url, out=out, check=True)
        ended = run(case, end_by=way, end_at=at, where=where)
        assert [note["broken"] for note in notes(out) if "broken" in note] == [at], "the fault did not fire"
        assert ended == EXITS[way]
        assert run(case) == 0
        check_same(notes(out), expected)


def test_a_prepared_run_is_the_plain_one(tmp_path: Path) -> None:
    """Nothing is different but who wraps what: one goes on where the other was broken off."""
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"))
    plain = tmp_path / "plain"
    assert run_plain(made, url=str(tmp_path / "plain-store"), out=str(plain)) == 0
    assert run_plain(made, end_by="exit", end_at=7) == 9
    assert run(made) == 0
    check_same(notes(made.out), notes(plain))


def prepared() -> tuple[Accelerator, Any, Any, Any, Any]:
    """A run of two models' optimizers."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = DataLoader(TensorDataset(torch.randn(12, 200)), batch_size=2, shuffle=True)
    return (accelerator, *accelerator.prepare(model, optimizer, scheduler, loader))


def train(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, loader: Any, count: int) -> None:
    for _, (inputs,) in zip(range(count), loader, strict=False):
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def test_wrappers_are_taken_off() -> None:
    """What is saved is what was prepared."""
    _, model, optimizer, scheduler, loader = prepared()
    state = unwrapped({"a": [optimizer], "b": (scheduler,), "model": model, "data": loader})
    assert type(state["a"][0]) is torch.optim.AdamW
    assert type(state["b"][0]) is torch.optim.lr_scheduler.StepLR
    assert state["model"] is model
    assert state["data"] is loader


def test_save_state(tmp_path: Path) -> None:
    """All that was prepared comes back in place, with the random state and the window of gradients."""
    run = prepared()
    extra = torch.nn.Linear(2, 2)
    run[0].register_for_checkpointing(extra)
    with CkptStoreState(run[0], tmp_path / "store", keep=cs.last(5)) as states:
        with pytest.raises(cs.NoCheckpointError):
            states.load()
        train(*run, count=3)
        handle = states.save(step=1, mode="overlapped", metrics={"loss": 0.5})
        assert isinstance(handle, cs.SaveHandle)
        handle.result()
        before = {name: value.clone() for name, value in run[1].state_dict().items()}
        drawn, rate = torch.rand(1), run[3].get_last_lr()
        train(*run, count=6)
        torch.nn.init.zeros_(extra.weight)
        assert states.load("best:loss").checkpoint.step == 1
        assert all(torch.equal(value, before[name]) for name, value in run[1].state_dict().items())
        assert torch.equal(torch.rand(1), drawn)
        assert run[3].get_last_lr() == rate
        assert run[0].step == 3
        assert extra.weight.any()


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(torch.arange(10.0).reshape(5, 2))


def test_a_loader_without_length(tmp_path: Path) -> None:
    """It is read whole, and what can't be known is said."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(DataLoader(Stream(), batch_size=1))
    with cs.Checkpointer(tmp_path / "store", {"data": loader}, verbose=False, signals=False) as ckpt:
        ckpt.resume()
        with pytest.warns(UserWarning, match="makes no step"):
            assert [batch[0, 0].item() for batch in ckpt.batches(loader)] == [0, 2, 4, 6, 8]
        assert loader.iteration == 1
        ckpt.step()


def test_what_is_refused(tmp_path: Path) -> None:
    """Options for a store that is open already, and saving without Accelerate."""
    with cs.open(tmp_path / "store") as store, pytest.raises(cs.FormatError, match="open already"):
        CkptStoreState(prepared()[0], store, keep=cs.last(1))
    code = "import sys; sys.modules['accelerate'] = None\nimport ckptstore.integrations.accelerate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'ckptstore[accelerate]'" in done.stderr.splitlines()[-1]
