"""Where good turns into bad: found by halving, past what can't be tested, and with nothing left behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ckptstore as cs
from ckptstore.tools.bisect import Trial, bisect
from ckptstore.tools.bisectcommand import CommandTest


@pytest.fixture
def store(store_path: Path) -> Iterator[cs.Store]:
    """Steps 10 to 200."""
    with cs.open(store_path) as store:
        for step in range(10, 210, 10):
            store.save({"model": {"w": torch.full((4,), float(step))}}, step=step)
        yield store


def below(limit: int, skipped: tuple[int, ...] = ()) -> Callable[[cs.Checkpoint], bool | None]:
    return lambda c: None if c.step in skipped else c.step < limit


def test_every_place_is_found_by_halving(store: cs.Store) -> None:
    for limit in range(20, 210, 10):
        seen: list[tuple[Trial, int]] = []
        found = bisect(store, "step:10", "latest", below(limit), told=lambda *said: seen.append(said))  # noqa: B023

        assert (found.last_good.step, found.first_bad.step) == (limit - 10, limit)
        assert found.undecided == []
        assert [trial for trial, _ in seen] == list(found.trials)
        # The two ends, and at most 5 of the 18 between.
        assert len(found.trials) <= 7
        assert all(len(seen) - number <= left for number, (_, left) in enumerate(seen[1:], 2))
        assert [trial.verdict for trial in found.trials[:2]] == ["good", "bad"]


def test_neighbours_need_no_trial_but_their_own(store: cs.Store) -> None:
    assert len(bisect(store, "step:190", "step:200", below(200)).trials) == 2
    assert bisect(store, "step:190", "step:200", below(0), trust_ends=True).trials == []


def test_what_is_skipped_is_told_apart(store: cs.Store) -> None:
    """Another one is tried instead; where none is left between, the answer says so."""
    found = bisect(store, "step:10", "latest", below(100, skipped=(100, 110, 50)))
    assert (found.last_good.step, found.first_bad.step) == (90, 120)
    assert [c.step for c in found.undecided] == [100, 110]
    assert {t.checkpoint.step for t in found.trials if t.verdict == "skipped"} == {100, 110}


def test_ends_that_are_not_what_they_are_said_to_be(store: cs.Store) -> None:
    tested: list[int] = []

    def test(c: cs.Checkpoint) -> bool:
        tested.append(c.step)
        return c.step < 100

    with pytest.raises(cs.FormatError, match=r"\(step 150\) was given as good, and the test says bad: choose an older"):
        bisect(store, "step:150", "latest", test)
    assert tested == [150]
    with pytest.raises(cs.FormatError, match=r"\(step 50\) was given as bad, and the test says good: choose a newer"):
        bisect(store, "step:10", "step:50", test)
    with pytest.raises(cs.FormatError, match="the test skips it"):
        bisect(store, "step:10", "step:50", lambda c: None)
    with pytest.raises(cs.FormatError, match="both good and bad"):
        bisect(store, "latest", "step:200", test)
    with pytest.raises(cs.FormatError, match=r"was saved after the bad one.*swap them"):
        bisect(store, "latest", "step:10", test)
    with pytest.raises(cs.NotFoundError, match="the nearest are"):
        bisect(store, "step:15", "latest", test)


def test_what_a_rollback_left_behind_is_left_out(store: cs.Store) -> None:
    store.rollback("step:100")
    for step in (105, 115, 125):
        store.save({"model": {"w": torch.zeros(4)}}, step=step)
    tested: list[int] = []

    def test(c: cs.Checkpoint) -> bool:
        tested.append(c.step)
        return c.step < 115

    found = bisect(store, "step:80", "latest", test)
    assert (found.last_good.step, found.first_bad.step) == (105, 115)
    assert max(tested) == 125
    with pytest.raises(cs.FormatError, match="a roll-back to step 100 left it behind"):
        bisect(store, "step:150", "latest", test)


def damage(store: cs.Store, path: Path, step: int) -> None:
    file = path / "checkpoints" / store.resolve(f"step:{step}").id / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def test_damaged_ones_are_skipped_and_named(store: cs.Store, store_path: Path) -> None:
    damage(store, store_path, 100)
    found = bisect(store, "step:10", "latest", lambda c: bool(store.load(c.id)["model"]["w"][0] < 130))
    assert (found.last_good.step, found.first_bad.step) == (120, 130)
    (trial,) = [trial for trial in found.trials if trial.verdict == "damaged"]
    assert trial.checkpoint.step == 100
    assert "model.safetensors" in trial.why
    with pytest.raises(cs.IntegrityError, match="the good one can't be tested"):
        bisect(store, "step:100", "latest", lambda c: bool(store.load(c.id)["model"]["w"][0] < 130))


def shell(store: cs.Store, script: str, **options: str) -> CommandTest:
    return CommandTest(store, ["sh", "-c", script], folder=None, **options)


def test_exit_codes_of_a_command(store: cs.Store) -> None:
    one = store.resolve("step:10")
    codes = {0: True, 1: False, 124: False, 125: None, 126: False, 127: False}
    assert {code: shell(store, f"exit {code}")(one) for code in codes} == codes
    with pytest.raises(cs.CheckpointError, match=r"\(step 10\): its exit code was 128"):
        shell(store, "exit 128")(one)
    with pytest.raises(cs.CheckpointError, match=f"signal {int(signal.SIGKILL)} ended it"):
        shell(store, "kill -9 $$")(one)
    with pytest.raises(cs.FormatError, match="no-such-command can't be run: No such file"):
        CommandTest(store, ["no-such-command"], folder=None)(one)
    with pytest.raises(cs.FormatError, match="needs a command"):
        CommandTest(store, [], folder=None)


def test_words_are_filled_in_and_reach_no_shell(store: cs.Store, tmp_path: Path) -> None:
    one, said = store.resolve("step:20"), tmp_path / "said"
    script = f"printf '%s|' \"$@\" > '{said}'"
    words = ["{id}", "{step}", "{url}", "{other}", "{step}{step}", "$(id) ; {step}", "{}"]
    assert CommandTest(store, ["sh", "-c", script, "sh", *words], folder=None)(one)
    expected = [one.id, "20", store.url, "{other}", "2020", "$(id) ; 20", "{}"]
    assert said.read_text().split("|")[:-1] == expected


def test_what_a_command_says_goes_to_stderr(store: cs.Store, capfd: pytest.CaptureFixture[str]) -> None:
    assert shell(store, "echo said")(store.resolve("latest"))
    assert capfd.readouterr() == ("", "said\n")


def test_a_command_that_fails_for_damage_did_not_find_a_bad_one(store: cs.Store, store_path: Path) -> None:
    """Where nothing is exported, nothing else has read the checkpoint."""
    damage(store, store_path, 100)
    assert shell(store, "exit 0")(store.resolve("step:100"))
    with pytest.raises(cs.IntegrityError, match=r"model\.safetensors"):
        shell(store, "exit 1")(store.resolve("step:100"))
    found = bisect(store, "step:10", "latest", shell(store, "test {step} -lt 80"))
    assert found.first_bad.step == 80
    assert [t.checkpoint.step for t in found.trials if t.verdict == "damaged"] == [100]
