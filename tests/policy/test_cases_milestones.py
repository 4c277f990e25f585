"""Counts as people write them, and saves when they are reached."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.counts import count_name, count_text, parse_count, parse_counts
from ckptstore.policy.progress import Length, Past, Progress
from tests.policy.histories import saved, steps

B = 10**9
UNKNOWN = Length()


def counts(text: str) -> list[int]:
    return parse_counts(text, billions=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,5,10,30", [B, 5 * B, 10 * B, 30 * B]),
        ("1B,5B,10B", [B, 5 * B, 10 * B]),
        ("100M,500M,1B", [B // 10, B // 2, B]),
        ("500M,1B,3B", [B // 2, B, 3 * B]),
    ],
)
def test_M01_lists(text: str, expected: list[int]) -> None:
    assert counts(text) == expected
    assert cs.milestones(text).counts == tuple(expected)


def test_M02_spaces_and_small_letters() -> None:
    assert counts("1b, 5b") == [B, 5 * B]
    assert counts(" 2 , 3 ") == [2 * B, 3 * B]
    assert counts("1 B") == [B]
    assert counts("1.5b,250k") == [250_000, 1_500_000_000]


def test_M03_sorted_each_once() -> None:
    assert counts("30,1,10,5") == [B, 5 * B, 10 * B, 30 * B]
    assert counts("1,1") == counts("1B,1000M") == [B]


def test_M04_fractions_and_exponents() -> None:
    written = {"0.5B": B // 2, "0.125": B // 8, "1e3": 1000, "1e9": B}
    assert {text: parse_count(text, billions=True) for text in written} == written


def test_M05_small_numbers_are_billions() -> None:
    """Kept, as it is how people say how large a model is; never of steps, and a list of ints is taken as it is."""
    written = {"999": 999 * B, "1000": 1000, "1000000": 1_000_000}
    assert {text: parse_count(text, billions=True) for text in written} == written
    assert cs.milestones("999", of="steps").counts == (999,)
    assert cs.milestones("999", of="tokens").counts == (999 * B,)
    assert cs.milestones([999]).counts == (999,)


NO_COUNTS = """abc 1T 1GB 100MB B nan inf -1 0 0B 1e99 1.0000000001B 0x10 1_000 +1 1e-3 999999999999999999 1;2 1B5B
    1,,5 1, ,1 1.2.3B \u0661""".split()


@pytest.mark.parametrize("text", ["", " ", "1 000", *NO_COUNTS])
def test_M06_what_is_no_count(text: str) -> None:
    """Always a ValueError that says what was read; never an OverflowError, never silently something else."""
    with pytest.raises(cs.FormatError, match="milestones: "):
        cs.milestones(text)


@pytest.mark.parametrize("given", [[], [True], [1.5], [None], [0], [-1], [10**16], 5, 5.0, True])
def test_M06_what_is_no_list(given: object) -> None:
    with pytest.raises(cs.FormatError, match="write numbers with commas between them, as 1B,5B"):
        cs.milestones(given)  # type: ignore[call-overload]


def test_M06_what_is_not_counted() -> None:
    with pytest.raises(cs.FormatError, match="must be 'params', 'tokens' or 'steps'"):
        cs.milestones("1B", of="epochs")  # type: ignore[call-overload]


def test_M06_beyond_the_end() -> None:
    with pytest.raises(cs.FormatError, match="2K is never reached, the run has 1,000 steps: leave it out"):
        cs.milestones("500,2k", of="steps").steps(1000)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (B, "1.0B"),
        (1_200_000_000, "1.2B"),
        # Decided: one decimal always, so that columns of them stand under each other.
        (500_000_000, "500.0M"),
        (124_439_808, "124.4M"),
        (1500, "1.5K"),
        (999, "1.0K"),
        (999_999_999, "1.0B"),
        (999_950, "1.0M"),
        (999_949, "999.9K"),
        (2 * 10**12, "2000.0B"),
    ],
)
def test_M08_for_reading(count: int, text: str) -> None:
    assert count_text(count) == text


def test_M08_names_are_exact() -> None:
    """Two counts have two names, however close they are."""
    named = {B: "1B", 1000: "1K", 1040: "1040", 1_040_000: "1.04M", 2_010_000_000: "2.01B", B - 1: "999999999"}
    assert {count: count_name(count) for count in named} == named


@given(st.integers(1, 10**15) | st.integers(1, 10**9).map(lambda n: n * 10**6))
def test_M08_names_read_back(count: int) -> None:
    assert parse_count(count_name(count)) == count
    assert len(count_name(count)) <= len(str(count))


def test_M04_two_decimals_are_exact() -> None:
    """As no float is."""
    for hundredths in range(1, 30_000, 7):
        text = f"{hundredths // 100}.{hundredths % 100:02d}"
        assert parse_count(f"{text}B") == hundredths * 10**7
        assert parse_count(f"{text}M") == hundredths * 10**4


def test_M09_several_at_once() -> None:
    """Those that are reached together are one save, for all of these reasons in order; the next is still to come."""
    schedule, past = cs.milestones([100, 1000, 5000, 20_000]), Past()
    now = Progress(step=1, parameters=10_100)
    reasons = schedule.due(now, past, UNKNOWN)
    assert reasons == ["milestone 100", "milestone 1K", "milestone 5K"]
    past = past.decided(now).saved(now, reasons)
    assert schedule.due(Progress(step=2, parameters=10_100), past, UNKNOWN) == []
    assert schedule.due(Progress(step=3, parameters=20_000), past, UNKNOWN) == ["milestone 20K"]


def test_M09_not_before_the_first_step() -> None:
    """A model that is large from the beginning has learnt nothing yet."""
    schedule = cs.milestones([100])
    assert schedule.due(Progress(step=0, parameters=500), Past(), UNKNOWN) == []
    assert schedule.due(Progress(step=1, parameters=500), Past(step=0), UNKNOWN) == ["milestone 100"]


def test_M13_what_was_reached_is_remembered() -> None:
    """After a resume: nothing is saved twice, and the next one is right; another list adds only what is new in it."""
    past = Past(step=9, reached=frozenset({"milestone 100", "milestone 1K"}))
    now = Progress(step=10, parameters=1200)
    assert cs.milestones([100, 1000, 5000]).due(now, past, UNKNOWN) == []
    assert cs.milestones([100, 500, 5000]).due(now, past, UNKNOWN) == ["milestone 500"]
    # What is counted is part of the name: 1K parameters are not 1K tokens.
    assert cs.milestones([1000], of="tokens").due(Progress(step=10, tokens=1000), past, UNKNOWN) == [
        "milestone 1K tokens"
    ]


def test_M13_a_model_that_shrinks_and_grows_again() -> None:
    schedule, past, saves = cs.milestones([100, 200]), Past(), []
    for step, parameters in enumerate([50, 100, 50, 150, 250, 10, 300], 1):
        now = Progress(step=step, parameters=parameters)
        reasons = schedule.due(now, past, UNKNOWN)
        past = past.decided(now)
        if reasons:
            past, saves = past.saved(now, reasons), [*saves, (step, reasons)]
    assert saves == [(2, ["milestone 100"]), (5, ["milestone 200"])]


def test_M15_kept_whatever_else_goes() -> None:
    """All milestones stay, and of one that was reached twice the newer; a damaged one does not cost the others."""
    history = [saved(step, reasons=[why]) for step, why in enumerate(["milestone 1B", "every 5 steps", "milestone 5B"])]
    history += [saved(7, reasons=["milestone 1B", "epoch 1"]), saved(8)]
    assert steps(cs.milestones(), history) == [2, 7, 8]
    assert steps(cs.milestones(), history, bad={"step 7": "torn"}) == [0, 2, 7, 8]


def test_M16_what_was_given_is_not_changed() -> None:
    given: list[int | str] = [30, "1B", 5]
    schedule = cs.milestones(given)
    metrics = {"loss": 1.0}
    now = Progress(step=1, parameters=50, metrics=metrics)
    Past().saved(now, schedule.due(now, Past(), UNKNOWN))
    assert given == [30, "1B", 5]
    assert metrics == {"loss": 1.0}
