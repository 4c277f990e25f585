"""What rank 0 goes by counts for all: metrics, clocks, outcomes of saves. Ranks that don't keep step meet, too."""

from __future__ import annotations

import contextlib
import io
import math
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckptstore as cs
from ckptstore.policy import budget
from ckptstore.storage.local import LocalStorage
from tests.background.holding import Fault, Gate
from tests.ranks.processes import Failure, Ranks, run
from tests.trainer.loops import Loop, listed, settle


class Told(cs.Listener):
    """What a listener was told, in words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def on_saved(self, event: cs.Saved) -> None:
        self.words.append(f"saved {event.checkpoint.step}")

    def on_failed(self, event: cs.Failed) -> None:
        self.words.append(f"failed {event.step}")

    def on_diverged(self, event: Any) -> None:
        self.words.append(f"diverged {event.step}")


def rank() -> int:
    return distributed.get_rank()


def told_by(train: Callable[[Loop], Any], place: str, **options: Any) -> tuple[list[str], Any]:
    """What a run tells its listener and gives, or the error that it ends with."""
    told = Told()
    loop = Loop(cs.open(place, rank_timeout=options.pop("rank_timeout", 60)), listeners=[told], **options)
    warnings.simplefilter("ignore")
    try:
        with loop.ckpt as ckpt:
            ckpt.resume()
            result = train(loop)
    except cs.CheckpointError as error:
        return told.words, f"{type(error).__name__}: {error}"
    return told.words, result


def reporting(place: str) -> tuple[list[str], Any]:
    """Each rank reports values of its own."""
    values = [{2: 3.0, 5: 1.0, 8: 2.0}, {2: 1.0, 5: 2.0, 8: 0.5}][rank()]

    def train(loop: Loop) -> Any:
        loop.until(10, evaluate=values)
        return dict(loop.ckpt.best)

    return told_by(train, place, save=cs.on_best("val_loss"), final=False)


def test_the_best_is_rank_0s(store_path: Path) -> None:
    first, second = run(2, reporting, str(store_path))
    assert listed(str(store_path)) == [(2, ["best val_loss"]), (5, ["best val_loss"])]
    with cs.open(str(store_path)) as store:
        assert [c.metrics["val_loss"] for c in store.checkpoints()] == [3.0, 1.0]
        assert [c.world_size for c in store.checkpoints()] == [2, 2]
    assert first == (["saved 2", "saved 5"], {"val_loss": 1.0})
    assert second[0] == []


def falling(place: str) -> tuple[list[str], Any]:
    """The schedule goes by a value of each step."""

    def train(loop: Loop) -> None:
        for step in range(1, 100):
            loop.step(loss=[[5.0, 4.0, 6.0, 3.0], [9.0, 1.0, 0.5, 8.0]][rank()][min(step, 4) - 1])

    return told_by(train, place, save=cs.on_best("loss"), final=False)


def test_values_of_steps(store_path: Path) -> None:
    """There ranks meet at every step, and the messages of meetings don't pile up."""
    run(2, falling, str(store_path))
    assert listed(str(store_path)) == [(step, ["best loss"]) for step in (1, 2, 4)]


def failing(place: str, max_failures: int) -> tuple[list[str], Any, int]:
    """The disk of rank 1 is full once."""

    def train(loop: Loop) -> int:
        # So each rank has something of its own to write.
        torch.manual_seed(rank())
        for _ in range(300):
            loop.step()
            time.sleep(0.005)
        return loop.ckpt.progress.step

    fault = Fault(
        LocalStorage,
        "open_writer",
        cs.StorageFullError("no space left on the device"),
        only=lambda *_, **__: fault.fired == 0,
    )
    with fault if rank() == 1 else contextlib.nullcontext():
        words, result = told_by(
            train,
            place,
            save=cs.milestones("3", of="steps"),
            final=False,
            max_failures=max_failures,
            retry=0.05,
        )
    return words, result, fault.fired


def test_a_failed_save_is_made_up_for(store_path: Path) -> None:
    """Rank 0 tells it and tries again, at a step that all agree on."""
    (told, reached, _), (silent, _, fired) = run(2, failing, str(store_path), 3)
    assert fired == 1
    [(step, reasons)] = listed(str(store_path))
    assert reasons == ["milestone 3 steps"]
    assert 3 < step < reached == 300
    assert told == ["failed 3", f"saved {step}"]
    assert silent == []


def test_too_many_failures_end_all(store_path: Path) -> None:
    """With one error, which names the rank that it befell."""
    (told, first, _), (_, second, fired) = run(2, failing, str(store_path), 1)
    assert fired == 1
    assert told == ["failed 3"]
    assert listed(str(store_path)) == []
    for error in (first, second):
        assert error.startswith("SaveFailedError")
        assert "rank 1" in error
        assert "no space left" in error


def diverging(place: str) -> tuple[list[str], Any]:
    """Only rank 1 sees it."""

    def train(loop: Loop) -> None:
        for step in range(500):
            loop.step(loss=math.nan if step == 5 and rank() == 1 else 1.0)
            time.sleep(0.005)

    return told_by(train, place, save=cs.every(steps=3), stop_on=cs.diverged("loss"))


def test_divergence_on_one_rank_ends_all(store_path: Path) -> None:
    first, second = run(2, diverging, str(store_path))
    assert first[0][-1] == "diverged 5"
    assert second[0] == []
    for _, error in (first, second):
        assert error.startswith("DivergedError: step 5: loss is nan")
        assert "step3-" in error


def raising(place: str, who: int, timeout_s: float) -> tuple[list[str], Any]:
    """One rank ends by an error of its own; the others wait for it only as long as they must."""

    def train(loop: Loop) -> str:
        try:
            for step in range(20):
                if rank() == who and step == 4:
                    raise ValueError("no")
                loop.step()
        except ValueError as error:
            loop.ckpt.__exit__(type(error), error, None)
            return "ended"
        return "done"

    return told_by(train, place, save=cs.every(steps=10) | cs.on_best("none"), max_failures=1, rank_timeout=timeout_s)


def test_rank_0_ends_by_an_error(store_path: Path) -> None:
    """The others learn of it, long before their deadline."""
    first, second = run(2, raising, str(store_path), 0, 60.0)
    assert first == ([], "ended")
    assert second == ([], "SaveFailedError: rank 0 has ended: ValueError: no")
    assert listed(str(store_path)) == []


def test_another_rank_ends_by_an_error(store_path: Path) -> None:
    """Rank 0 gives it up by its deadline."""
    first, second = run(2, raising, str(store_path), 1, 1.0)
    assert second == ([], "ended")
    assert first[0] == ["failed 10"]
    assert first[1].startswith("SaveFailedError: step 10 was not saved by any rank: rank 1 of 2 hasn't come")
    assert listed(str(store_path)) == []


def by_hand(place: str) -> tuple[list[str], Any]:
    def train(loop: Loop) -> Any:
        loop.step()
        saved = loop.ckpt.save("paper", wait=True)
        loop.step()
        handle = loop.ckpt.save("behind")
        assert saved is None
        assert handle is not None
        loop.ckpt.save("two in a row")
        return handle.result().step

    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        words, result = told_by(train, place, verbose=True)
    return [*words, f"{out.getvalue().count('ckptstore:')} lines"], result


def test_saves_by_hand(store_path: Path) -> None:
    """All ranks call it; only rank 0 prints."""
    first, second = run(2, by_hand, str(store_path))
    assert listed(str(store_path)) == [(1, ["paper"]), (2, ["behind"]), (2, ["two in a row"])]
    assert first == (["saved 1", "saved 2", "saved 2", "5 lines"], 2)
    assert second == (["0 lines"], 2)


def out_of_step(place: str) -> tuple[list[str], Any]:
    """Rank 1 has done a step more."""

    def train(loop: Loop) -> None:
        for _ in range(3 + rank()):
            loop.step()
        loop.ckpt.save(wait=True)

    return told_by(train, place, max_failures=1)


def test_ranks_at_different_steps(store_path: Path) -> None:
    first, second = run(2, out_of_step, str(store_path))
    for _, error in (first, second):
        assert error.startswith("SaveFailedError")
        assert "rank 1" in error
    assert listed(str(store_path)) == []


def resuming(place: str, select: Any, misfit: int) -> str:
    """How it goes on; the model of one rank may be another."""
    loop = Loop(place)
    if rank() == misfit:
        loop.ckpt.state["model"] = loop.model[0]  # type: ignore[index]
    try:
        with loop.ckpt as ckpt:
            return str(ckpt.resume(select).checkpoint.step)  # type: ignore[union-attr]
    except cs.CheckpointError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("select", "misfit", "kind", "text"),
    [
        (True, -1, "2", ""),
        (True, 1, "StateError", "model"),
        ("step:7", -1, "NotFoundError", "step:7"),
        (False, -1, "ExistsError", "would begin anew"),
    ],
)
def test_resuming(store_path: Path, select: Any, misfit: int, kind: str, text: str) -> None:
    """All go on at one step, or all have the error of whoever has one."""
    run(2, by_hand, str(store_path))
    for found in run(2, resuming, str(store_path), select, misfit):
        assert found.startswith(kind)
        assert text in found


def growing(place: str) -> tuple[int, int]:
    """The state is built from what the checkpoint says."""
    made: list[int] = []

    def build(extra: Any) -> dict[str, Any]:
        made.append(extra.get("width", 0))
        return {"values": [rank()]}

    warnings.simplefilter("ignore")
    with cs.Checkpointer(place, build, verbose=False, signals=False) as ckpt:
        ckpt.resume()
        ckpt.extra["width"] = made[-1] + 1
        ckpt.step()
        return ckpt.progress.step, made[-1]


def test_a_built_state(store_path: Path) -> None:
    """From the plain values of the checkpoint that rank 0 chose; a damaged one is left by all."""
    place = str(store_path)
    assert run(2, growing, place) == [(1, 0), (1, 0)]
    assert run(2, growing, place) == [(2, 1), (2, 1)]
    with cs.open(place) as store:
        newest = store.resolve("latest").id
    for part in (store_path / "checkpoints" / newest).glob("part-00001.json"):
        part.chmod(0o644)
        part.write_bytes(b"{}")
    assert run(2, growing, place) == [(2, 1), (2, 1)]


def evaluating(place: str) -> str:
    try:
        with Loop(place, evaluate=cs.every(minutes=1)).ckpt as ckpt:
            ckpt.resume()
    except cs.FormatError as error:
        return str(error)
    return ""


def test_evaluations_by_the_clock_are_refused(store_path: Path) -> None:
    for text in run(2, evaluating, str(store_path)):
        assert "evaluate= goes by time or metrics, which differ from rank to rank" in text


def test_failure_is_shown() -> None:
    """What a rank of these tests raises isn't lost."""
    found = Ranks(2, evaluating, None).results()
    assert all(isinstance(each, Failure) for each in found)


def counting(place: str) -> tuple[int, int]:
    """How often a rank's training thread uses the board in 100 steps of which nothing comes, and in all."""
    loop = Loop(place, save=cs.every(steps=150) | cs.every(minutes=1000) | cs.on_best("val_loss"), signals=True)
    used: list[int] = []
    with loop.ckpt as ckpt:
        ckpt.resume()
        board, ours = loop.ckpt.store.ranks.board, threading.current_thread()  # type: ignore[union-attr]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def one(*args: Any) -> Any:
                if threading.current_thread() is ours:
                    used.append(ckpt.progress.step)
                return call(*args)

            return one

        for name in ("get", "put", "drop"):
            setattr(board, name, counted(getattr(board, name)))
        for _ in range(200):
            loop.step()
    return len([step for step in used if step < 150 or 150 < step < 200]), len(used)


def test_ordinary_steps_send_no_messages(store_path: Path) -> None:
    for ordinary, all_of_them in run(2, counting, str(store_path)):
        assert ordinary == 0
        assert all_of_them > 0


def forgetting(place: str) -> tuple[list[str], Any]:
    """Rank 1 doesn't report what the schedule goes by."""

    def train(loop: Loop) -> str:
        loop.step()
        if rank() == 0:
            loop.ckpt.report(val_loss=math.nan)
        loop.step()
        loop.ckpt.report(val_loss=math.nan)
        return "done"

    return told_by(train, place, save=cs.on_best("val_loss"), rank_timeout=5)


def test_a_report_on_one_rank_only(store_path: Path) -> None:
    """Whoever follows finds that it isn't where rank 0 is, instead of going on out of step."""
    _, second = run(2, forgetting, str(store_path))
    assert second[1].startswith("SaveFailedError: rank 1 is at step 2, epoch 0, and rank 0 at step 1, epoch 0")


def skipping(place: str) -> tuple[list[str], Any]:
    """Rank 0 is slow to write, and doesn't wait for it."""

    def train(loop: Loop) -> int:
        torch.manual_seed(rank())
        loop.step()
        gate = Gate(LocalStorage, "open_writer", only=lambda *_, **__: rank() == 0)
        with gate:
            loop.step()
            if rank() == 0:
                gate.wait()
            loop.step()
            loop.step()
        settle(loop.ckpt)
        loop.step()
        loop.step()
        return loop.ckpt.stats().skipped

    return told_by(train, place, save=cs.every(steps=2), when_busy="skip", final=False)


def test_a_save_that_is_skipped_is_by_all(store_path: Path) -> None:
    first, _ = run(2, skipping, str(store_path))
    assert listed(str(store_path)) == [(2, ["every 2 steps"]), (6, ["every 2 steps"])]
    assert first == (["saved 2", "saved 6"], 1)


def budgeting(place: str) -> tuple[list[str], Any]:
    def train(loop: Loop) -> None:
        for _ in range(400):
            loop.step()
            time.sleep(0.002)

    budget.FIRST_S = 0.05
    return told_by(train, place, save=cs.budget("20%"), final=False)


def test_a_budget(store_path: Path) -> None:
    """By what rank 0's clock says."""
    first, second = run(2, budgeting, str(store_path))
    saved = listed(str(store_path))
    assert saved[0][1] == ["budget, the first save"]
    assert first == ([f"saved {step}" for step, _ in saved], None)
    assert second == ([], None)
