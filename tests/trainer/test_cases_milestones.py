"""Models that grow: each milestone is saved once, whatever fails, and the grown model resumes through its factory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from tests.trainer.loops import failing, listed, settle, url

MILESTONES = cs.milestones([100, 1000, 5000, 20000])


class Growing:
    """Layers of 100 parameters each, as many as ``extra`` says; the optimizer learns of each new one."""

    def __init__(self, place: str, *, new_optimizer: bool = False, layers: int = 1, **options: Any) -> None:
        self.first, self.new_optimizer = layers, new_optimizer
        self.said: list[cs.Failed] = []
        options = {"save": MILESTONES, "on_failed": self.said.append, "final": False, **options}
        self.ckpt = cs.Checkpointer(place, self.build, verbose=False, signals=False, poll=None, **options)

    def build(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        self.model = nn.ModuleList([self.layer() for _ in range(extra.get("layers", self.first))])
        self.optimizer = torch.optim.AdamW(self.model[0].parameters(), lr=0.01)
        if self.new_optimizer:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        else:
            for layer in self.model[1:]:  # type: ignore[index]
                self.optimizer.add_param_group({"params": list(layer.parameters())})
        return {"model": self.model, "optimizer": self.optimizer}

    @staticmethod
    def layer() -> nn.Module:
        return nn.Linear(10, 10, bias=False)

    def grow(self, layers: int) -> None:
        for _ in range(layers - len(self.model)):
            self.model.append(self.layer())
            if not self.new_optimizer:
                self.optimizer.add_param_group({"params": list(self.model[-1].parameters())})
        if self.new_optimizer:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
            self.ckpt.state["optimizer"] = self.optimizer
        self.ckpt.extra["layers"] = layers

    def step(self) -> None:
        value = torch.ones(10)
        for layer in self.model:
            value = layer(value)
        value.square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ckpt.step()


def milestones(*names: str) -> list[str]:
    return [f"milestone {name}" for name in names]


def test_M09_several_at_once_are_one_checkpoint() -> None:
    """10,100 parameters reach three of four milestones in one step: saved once, for all three reasons, then no more.

    The original saved one file for each, at consecutive steps; here a checkpoint has many reasons.
    """
    place = url()
    run = Growing(place, layers=101)
    with run.ckpt as ckpt:
        ckpt.resume()
        for _ in range(4):
            run.step()
        run.grow(200)
        run.step()
    assert listed(place) == [(1, milestones("100", "1K", "5K")), (5, milestones("20K"))]
    with cs.open(place) as store:
        assert store.resolve("milestone:1K").step == store.resolve("milestone:5K").step == 1
        assert store.resolve("milestone:20K").step == 5


def test_M10_none_and_frozen_parameters() -> None:
    """Without milestones nothing is saved but by hand; what is frozen doesn't count."""
    place = url()
    run = Growing(place, layers=20, save=None)
    with run.ckpt as ckpt:
        ckpt.resume()
        run.step()
        assert listed(place) == []
        ckpt.save(wait=True)
    assert listed(place) == [(1, ["by hand"])]
    place = url()
    run = Growing(place, layers=20, new_optimizer=True)
    with run.ckpt as ckpt:
        ckpt.resume()
        run.model[1:].requires_grad_(False)  # type: ignore[operator, union-attr]
        run.step()
        run.model.requires_grad_(True)
        run.step()
    assert listed(place) == [(1, milestones("100")), (2, milestones("1K"))]


def test_M11_records_are_read_without_torch(tmp_path: Path) -> None:
    """Each is plain JSON with its step, its reasons and the number of parameters; 1,000 and 1,040 don't collide."""
    place = tmp_path / "store"
    run = Growing(str(place), layers=11, save=cs.milestones([1000, 1040]))
    with run.ckpt as ckpt:
        ckpt.resume()
        run.step()
        ckpt.save(wait=True)
    records = [json.loads(file.read_text()) for file in sorted((place / "commits").iterdir())]
    assert [(r["step"], r["reasons"]) for r in records] == [(1, milestones("1K", "1040")), (1, ["by hand"])]
    assert [r["parameters"] for r in records] == [1100, 1100]
    assert len({r["id"] for r in records}) == 2
    script = """
import sys, ckptstore
print([checkpoint.step for checkpoint in ckptstore.open(sys.argv[1], read_only=True).checkpoints()])
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", script, str(place)]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "[1, 1]\n"


@pytest.mark.parametrize("new_optimizer", [False, True], ids=["added groups", "a new optimizer"])
def test_M13_a_grown_model_resumes(new_optimizer: bool) -> None:
    """As large as it was saved, with its optimizer; what was reached isn't saved again, what comes next is."""
    place = url()
    run = Growing(place, layers=5, new_optimizer=new_optimizer)
    with run.ckpt as ckpt:
        ckpt.resume()
        run.step()
        run.grow(12)
        run.step()
        run.step()
        ckpt.save(wait=True)
        expected = [p.tolist() for p in run.model.parameters()]
    again = Growing(place, layers=5, new_optimizer=new_optimizer)
    with again.ckpt as ckpt:
        resumed = ckpt.resume(check=True)
        assert (resumed.kept, resumed.unused, ckpt.extra) == ([], [], {"layers": 12})
        assert [p.tolist() for p in again.model.parameters()] == expected
        assert len(again.optimizer.state) == 12
        run.ckpt = cs.Checkpointer(url(), run.ckpt.state, verbose=False, signals=False, final=False)
        with run.ckpt:
            run.ckpt.resume()
            for _ in range(2):
                again.step()
                run.step()
        assert [p.tolist() for p in again.model.parameters()] == [p.tolist() for p in run.model.parameters()]
        again.grow(50)
        again.step()
    assert listed(place) == [
        (1, milestones("100")),
        (2, milestones("1K")),
        (3, ["by hand"]),
        (6, milestones("5K")),
    ]


def test_what_failed_stays_pending() -> None:
    """A milestone whose save fails is no reached one: it is saved later, also by a run that resumes from before it."""
    place = url()
    run = Growing(place, layers=5, retry=0.0)
    with run.ckpt as ckpt:
        ckpt.resume()
        run.step()
        settle(ckpt)
        run.grow(12)
        with failing():
            run.step()
            settle(ckpt)
        with pytest.warns(RuntimeWarning, match="saving step 2 failed: .*no space left"):
            run.step()
    assert listed(place) == [(1, milestones("100")), (3, milestones("1K"))]
    assert [(failed.step, failed.failures) for failed in run.said] == [(2, 1)]


def test_what_was_reached_on_a_line_that_was_left() -> None:
    """Going back to before a milestone makes it pending again."""
    place = url()
    run = Growing(place, layers=5)
    with run.ckpt as ckpt:
        ckpt.resume()
        run.step()
        run.grow(12)
        run.step()
    again = Growing(place, layers=5)
    with again.ckpt as ckpt:
        ckpt.resume("step:1")
        assert len(again.model) == 5
        again.step()
        again.grow(12)
        again.step()
    assert listed(place)[2:] == [(3, milestones("1K"))]


def test_a_setting_that_differs_is_told_with_a_factory_too() -> None:
    """The optimizer that was built here had another rate than the one that was saved."""
    place = url()
    run = Growing(place)
    with run.ckpt as ckpt:
        ckpt.resume()
        run.step()
    again = Growing(place)
    build = again.build

    def faster(extra: Mapping[str, Any]) -> dict[str, Any]:
        state = build(extra)
        again.optimizer.param_groups[0]["lr"] = 0.5
        return state

    again.ckpt._build = faster
    with again.ckpt as ckpt, pytest.warns(UserWarning, match=r"optimizer: lr is 0.5 here and was 0.01 .* saved value"):
        ckpt.resume()
