"""Saves that fail: told, counted, tried again, and in the end fatal; and what a run's listeners see of all that."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.storage.memory import MemoryStorage
from tests.background.holding import Fault, Gate
from tests.trainer.loops import Loop, failing, listed, run, settle, steps, url, warned

MODES: list[Any] = ["sync", "async", "overlapped"]


def step_and_settle(loop: Loop, times: int = 1) -> None:
    """Steps whose saves, if they have one, are over afterwards, and the last one not told yet."""
    for _ in range(times):
        loop.step()
        settle(loop.ckpt)


def begun(place: str, **options: Any) -> Loop:
    loop = Loop(place, parts="model optimizer scheduler", **options)
    loop.ckpt.resume()
    return loop


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_save_is_told_and_training_goes_on(mode: Any) -> None:
    """As a warning with the reason at the next step (of a sync save at once), by ``on_failed``, and in the counts."""
    place = url()
    failures: list[cs.Failed] = []
    loop = begun(place, save="every(steps=2)", mode=mode, on_failed=failures.append)
    step_and_settle(loop)
    with failing(), warned() as at_once:
        step_and_settle(loop)
    with warned() as later:
        step_and_settle(loop)
    (text,) = [*at_once, *later]
    assert bool(at_once) == (mode == "sync")
    assert text.startswith("saving step 2 failed: ")
    assert "no space left on the device" in text
    assert text.endswith("training goes on, and it is tried again")
    assert [(f.step, f.failures, f.fatal, type(f.error)) for f in failures] == [(2, 1, False, cs.SaveFailedError)]
    with warned() as nothing:
        step_and_settle(loop)
        loop.ckpt.close()
    assert nothing == []
    assert listed(place) == [(4, ["every 2 steps"])]
    assert (loop.ckpt.stats().saves, loop.ckpt.stats().failed) == (1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_too_many_in_a_row(mode: Any) -> None:
    """The run ends with the last one's error; one that succeeds in between begins the count anew."""
    place = url()
    loop = begun(place, save="every(steps=1)", mode=mode, max_failures=2, retry=0.0, final=False)
    with warned():
        with failing():
            step_and_settle(loop)
        step_and_settle(loop)
        with failing():
            step_and_settle(loop)
            with pytest.raises(cs.SaveFailedError, match="step4") as ended:
                step_and_settle(loop, times=2)
    assert ended.value.__notes__ == ["2 saves in a row have failed, and max_failures=2"]
    assert loop.ckpt.stats().failed == 3
    assert steps(place) == [2]


def test_a_failed_milestone_is_tried_again_after_a_while() -> None:
    """Not at each step, as what was wrong is hardly right again; but where the schedule is due, and at the end."""
    place = url()
    loop = begun(place, save="milestones('10', of='steps') | at(13)", retry="1h", final=False)
    loop.ckpt._counters.step = 9
    with warned(), failing():
        step_and_settle(loop, times=3)
    step_and_settle(loop)
    loop.ckpt.close()
    assert loop.ckpt.stats().failed == 1
    assert listed(place) == [(13, ["milestone 10 steps", "step 13"])]
    place = url()
    loop = begun(place, save="milestones('2', of='steps')", retry="1h", final=False)
    with warned(), failing():
        step_and_settle(loop, times=4)
    loop.ckpt.close()
    assert loop.ckpt.stats().failed == 1
    assert listed(place) == [(4, ["milestone 2 steps"])]


def test_a_failed_milestone_is_tried_again_at_once_where_that_is_asked_for() -> None:
    place = url()
    loop = begun(place, save="milestones('2', of='steps')", retry=0.0, max_failures=9, final=False)
    with warned(), failing():
        step_and_settle(loop, times=4)
    with warned():
        loop.step()
    loop.ckpt.close()
    assert loop.ckpt.stats().failed == 3
    assert listed(place) == [(5, ["milestone 2 steps"])]


def test_a_failed_best_stays_pending_with_its_metrics() -> None:
    """What was reported before a save that failed stands in the next one."""
    place = url()
    loop = begun(place, save="on_best(val_loss)", retry=0.0, final=False)
    step_and_settle(loop)
    with warned(), failing():
        loop.ckpt.report(val_loss=0.5, accuracy=0.25)
        settle(loop.ckpt)
    with warned() as said:
        step_and_settle(loop)
    assert len(said) == 1
    loop.ckpt.close()
    with cs.open(place) as store:
        (checkpoint,) = store.checkpoints()
        assert (checkpoint.step, list(checkpoint.reasons)) == (2, ["best val_loss"])
        assert (checkpoint.metrics["val_loss"], checkpoint.metrics["accuracy"]) == (0.5, 0.25)
    loop = begun(place, save="on_best(val_loss)", final=False)
    loop.step()
    loop.ckpt.report(val_loss=0.6)
    loop.ckpt.close()
    assert steps(place) == [2]


def test_the_end_that_can_not_be_saved() -> None:
    """``close`` raises, once; what was saved before is there."""
    place = url()
    closed: list[cs.Stats] = []

    class Seen(cs.Listener):
        def on_closed(self, stats: cs.Stats) -> None:
            closed.append(stats)

    loop = begun(place, save="at(1)", listeners=[Seen()])
    step_and_settle(loop)
    loop.step()
    with failing(), pytest.raises(cs.SaveFailedError, match="no space left"):
        loop.ckpt.close()
    loop.ckpt.close()
    assert [(stats.saves, stats.failed) for stats in closed] == [(1, 1)]
    assert steps(place) == [1]


@pytest.mark.parametrize("mode", ["async", "overlapped"])
def test_the_last_save_in_the_background_failed(mode: Any) -> None:
    """The end makes up for it; without a save of the end it is an error, and not only a warning that nobody sees."""
    for final in (True, False):
        place = url()
        loop = begun(place, save="at(2)", mode=mode, final=final)
        loop.step()
        with failing():
            step_and_settle(loop)
        if final:
            loop.ckpt.close()
            assert listed(place) == [(2, ["final"])]
        else:
            with pytest.raises(cs.SaveFailedError, match="step2"):
                loop.ckpt.close()
            assert listed(place) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_newer_run_takes_over(mode: Any) -> None:
    """That is fatal at once, whatever ``max_failures`` says, and nothing of this run comes after it."""
    place = url()
    loop = begun(place, save="every(steps=1)", mode=mode)
    step_and_settle(loop)
    run(place, 5, save="at(5)")
    with pytest.raises(cs.StaleWriterError):
        step_and_settle(loop, times=3)
    with pytest.raises(cs.StaleWriterError):
        loop.ckpt.close()
    assert steps(place) == [1, 5]


@pytest.mark.parametrize("mode", MODES)
def test_what_can_not_be_stored(mode: Any) -> None:
    """Is fatal at the first save, and its path is named."""
    place = url()
    loop = begun(place, save="at(2)", mode=mode)
    loop.ckpt.extra["nested"] = {"when": object()}
    loop.step()
    with pytest.raises(cs.StateError) as ended:
        loop.step()
    assert ended.value.path == "trainer/extra/nested/when"
    assert listed(place) == []
    # Mended, the end can be saved.
    del loop.ckpt.extra["nested"]
    loop.ckpt.close()
    assert listed(place) == [(2, ["final"])]


def test_it_may_be_saved_or_not() -> None:
    """A save of which nobody knows what came is no success: counted as failed, and tried again."""
    place = url()
    loop = begun(place, save="every(steps=1)", retry=0.0, final=False)
    lost = cs.UnavailableError("the network is away")
    with warned() as said:
        with Fault(MemoryStorage, "create", lost, only=lambda self, key, data: key.startswith("commits/")):
            step_and_settle(loop)
        step_and_settle(loop)
    assert len(said) == 1
    loop.ckpt.close()
    assert steps(place) == [2]


def test_busy_saves_are_skipped() -> None:
    """Where that is wanted: training goes on, they are counted, and what they were for is asked for again."""
    place = url()
    loop = begun(
        place, save="every(steps=1) | milestones('2', of='steps')", when_busy="skip", mode="async", final=False
    )
    with Gate(MemoryStorage, "open_writer") as gate:
        loop.step()
        gate.wait()
        loop.step()
        loop.step()
        assert loop.ckpt.stats().skipped == 2
    settle(loop.ckpt)
    loop.step()
    loop.ckpt.close()
    assert listed(place) == [(1, ["every step"]), (4, ["every step", "milestone 2 steps"])]


def broken(place: str, every: int, after: int, *, within: bool = False) -> BaseException:
    """What comes out of a run's block where it is left by an error after a step, or ``within`` the next one."""
    loop = Loop(place, save=cs.every(steps=every))

    def train() -> None:
        with loop.ckpt as ckpt:
            ckpt.resume()
            for (batch,) in ckpt.batches(loop.data):
                loss = loop.learn(batch)
                if within and ckpt.progress.step == after:
                    1 / 0
                ckpt.step(loss=loss)
                if not within and ckpt.progress.step == after:
                    1 / 0

    with pytest.raises(ZeroDivisionError) as ended:
        train()
    return ended.value


def test_an_error_in_the_block() -> None:
    """Goes on to the caller; what is under way is finished, and what was due is saved."""
    place = url()
    assert not hasattr(broken(place, every=2, after=4), "__notes__")
    assert steps(place) == [2, 4]
    with failing():
        error = broken(place, every=1, after=5)
    assert "besides, saving failed: " in error.__notes__[0]
    assert steps(place) == [2, 4]


def test_an_error_in_the_midst_of_a_step() -> None:
    """Nothing is saved then: the weights are those of no step."""
    place = url()
    broken(place, every=1, after=2, within=True)
    assert steps(place) == [1, 2]


class Told(cs.Listener):
    """Notes what it is told, and in which thread."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.threads: set[threading.Thread] = set()

    def note(self, *event: Any) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread())

    def on_saved(self, event: cs.Saved) -> None:
        self.note("saved", event.checkpoint.step)

    def on_best(self, event: cs.Saved) -> None:
        self.note("best", event.best)

    def on_failed(self, event: cs.Failed) -> None:
        self.note("failed", event.step)

    def on_resumed(self, event: cs.Resumed) -> None:
        self.note("resumed", bool(event))

    def on_step(self, step: int) -> None:
        self.note("step", step)

    def on_closed(self, stats: cs.Stats) -> None:
        self.note("closed", stats.saves)


def test_who_is_told_what_and_when() -> None:
    """In the training thread, listeners in their order and then single functions; a best one is saved first."""
    place = url()
    told, hooked = Told(), []
    loop = Loop(
        place,
        save="every(steps=2) | on_best(val_loss)",
        listeners=[told],
        on_saved=lambda event: hooked.append((event.checkpoint.step, len(told.events))),
        on_best=lambda event: hooked.append((event.best, len(told.events))),
    )
    with loop.ckpt as ckpt:
        ckpt.resume()
        step_and_settle(loop)
        ckpt.report(val_loss=0.5)
        settle(ckpt)
        with failing():
            step_and_settle(loop)
        with warned():
            loop.step()
    expected: list[Any] = [("resumed", False), ("step", 1), ("step", 2), ("saved", 1), ("best", {"val_loss": 0.5})]
    expected += [("step", 3), ("failed", 2), ("saved", 3), ("closed", 2)]
    assert told.events == expected
    assert told.threads == {threading.current_thread()}
    assert hooked == [(1, 4), ({"val_loss": 0.5}, 5), (3, 8)]


def test_what_a_hook_raises_ends_training() -> None:
    def refuse(event: cs.Saved) -> None:
        raise ZeroDivisionError

    loop = begun(url(), save="every(steps=1)", on_saved=refuse, final=False)
    step_and_settle(loop)
    with pytest.raises(ZeroDivisionError):
        loop.step()
    settle(loop.ckpt)
    with pytest.raises(ZeroDivisionError):
        loop.ckpt.close()
    assert loop.ckpt._closed


def test_lines_for_people(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """To stderr, one for each event; to the log instead where that shows them; nowhere where they aren't wanted."""
    place = url()
    run(place, 3, save="at(2)", verbose=True)
    said = capsys.readouterr()
    lines = [line.partition("ckptstore: ")[2] for line in said.err.splitlines()]
    assert said.out == ""
    assert [line.split(" ")[:3] for line in lines[:2]] == [["a", "fresh", "start:"], ["step", "2", "saved"]]
    assert "(step 2)" in lines[1]
    assert "training waited" in lines[1]
    assert place in lines[1]
    assert lines[2].startswith("1 checkpoint saved: training waited")
    assert len(lines) == 3
    run(place, 5, save="at(5)", verbose=False)
    assert capsys.readouterr() == ("", "")
    with caplog.at_level(logging.INFO, logger="ckptstore"):
        run(place, 6, save="at(6)", verbose=True)
    assert capsys.readouterr() == ("", "")
    assert [record.message.split(" ")[0] for record in caplog.records] == ["resumed", "step", "1"]
    assert {record.name for record in caplog.records} == {"ckptstore.trainer"}


def test_numbers_of_a_run() -> None:
    """What was saved, failed and written, without asking the storage."""
    place = url()
    loop = begun(place, save="every(steps=1)", mode="sync", final=False)
    for _ in range(3):
        loop.step()
    stats = loop.ckpt.stats()
    loop.ckpt.close()
    with cs.open(place) as store:
        written = sum(c.stored_bytes - c.borrowed_bytes for c in store.checkpoints())
    assert (stats.saves, stats.failed, stats.skipped, stats.written_bytes) == (3, 0, 0, written)
    assert 0 < stats.stall_s <= stats.elapsed_s
    assert 0 < stats.share <= 1


def test_closing_twice_and_using_it_afterwards() -> None:
    place = url()
    loop = begun(place)
    loop.step()
    loop.ckpt.close()
    loop.ckpt.close()
    assert listed(place) == [(1, ["final"])]
    for use in (loop.step, loop.ckpt.save, loop.ckpt.end_epoch, loop.ckpt.report, loop.ckpt.resume):
        with pytest.raises(cs.StateError):
            use()
    with pytest.raises(cs.StateError):
        next(loop.ckpt.epochs(1))
    with pytest.raises(cs.StateError):
        next(loop.ckpt.batches(torch.zeros(3)))
    assert listed(place) == [(1, ["final"])]
