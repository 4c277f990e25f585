"""Policies as text: what is written reads back as the same, and what is no policy says so before anything runs."""

from __future__ import annotations

from functools import reduce
from operator import or_

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.retention import Keep
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.text import parse_keep, parse_schedule
from ckptstore.units import duration_s, duration_text
from tests.policy.strategies import plans

NAMES = st.text(min_size=1, max_size=12).filter(lambda name: ":" not in name)
WHOLE = st.integers(1, 10**6) | st.sampled_from([10**12, 10**15])
MODES = st.sampled_from(["auto", "min", "max"])
STEPS = st.integers(0, 10**6) | st.sampled_from(["5-50/5", " 7 - 9 / 1 ", "2000-10000/1000"])
COUNTS = st.lists(st.integers(1, 10**4) | st.sampled_from([10**9, 10**15]), min_size=1, max_size=4)
OF = st.sampled_from(["params", "tokens", "steps"])
SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True) | st.sampled_from(["1%", "0.07%", "33.3%", 1e-300, 1 / 3])
TIMES = st.floats(1e-300, 86400e6) | st.sampled_from(["6h", "90s", "0.5d", 1, 12345.678, 10**9])
SCHEDULES = st.one_of(
    st.lists(STEPS, min_size=1, max_size=5).map(lambda steps: cs.at(*steps)),
    WHOLE.map(lambda n: cs.every(steps=n)),
    WHOLE.map(lambda n: cs.every(epochs=n)),
    WHOLE.map(lambda n: cs.every(tokens=n)),
    st.floats(1e-6, 1e9).map(lambda minutes: cs.every(minutes=minutes)),
    st.floats(1e-15, 1).map(lambda share: cs.every(fraction=share)),
    plans(),
    st.builds(cs.on_best, NAMES, MODES),
    st.builds(cs.milestones, COUNTS, OF),
    st.builds(cs.budget, SHARES, TIMES),
)
RULES = st.one_of(
    WHOLE.map(cs.last),
    st.builds(cs.best, NAMES, WHOLE, MODES),
    WHOLE.map(cs.epochs),
    WHOLE.map(lambda n: cs.every_kept(steps=n)),
    st.just(cs.milestones()),
    st.sampled_from(["7d", "0.5h", "1s"]).map(cs.within),
    st.lists(st.text(min_size=1, max_size=12) | st.just("eval 1-2/3 'x'"), min_size=1, max_size=3).map(
        lambda reasons: cs.tagged(*reasons)
    ),
    (st.integers(1, 10**20) | st.sampled_from(["9GB", "1.5GiB", "7B"])).map(cs.at_most),
)


@given(st.lists(SCHEDULES, min_size=1, max_size=4))
def test_schedules_read_back(parts: list[Schedule]) -> None:
    schedule = reduce(or_, parts)
    assert parse_schedule(str(schedule)) == schedule
    assert str(parse_schedule(str(schedule))) == str(schedule)


@given(st.lists(RULES, min_size=1, max_size=4))
def test_rules_read_back(parts: list[Keep]) -> None:
    keep = reduce(or_, parts)
    assert parse_keep(str(keep)) == keep
    assert str(parse_keep(str(keep))) == str(keep)


@given(st.floats(1e-9, 1e15))
def test_durations_can_be_read(seconds: float) -> None:
    """Whatever they are, to four digits."""
    assert duration_s(duration_text(seconds)) == pytest.approx(seconds, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("every(steps=250) | on_best(val_loss)", cs.every(steps=250) | cs.on_best("val_loss")),
        (" at(0, 10, 2000-10000/1000) ", cs.at(0, 10, "2000-10000/1000")),
        ("at(0, '2000-10000/1000')", cs.at(0, "2000-10000/1000")),
        ("at(5-9/2)", cs.at("5-9/2")),
        ("every(tokens='1B')|every(600s)", None),
        ("every('600s')", cs.every(minutes=10)),
        ("epoch_plan()", cs.epoch_plan()),
        ("epoch_plan(5, linear, interval=50)", cs.epoch_plan(5, "linear", interval=50)),
        ("milestones('1B,5B', of=tokens)", cs.milestones("1B,5B", of="tokens")),
        ("budget('1%', mtbf='6h')", cs.budget()),
        ("at(1) | (at(2) | at(3))", cs.at(1) | cs.at(2) | cs.at(3)),
        ("(((at(1))))", cs.at(1)),
    ],
)
def test_as_people_write_them(text: str, schedule: Schedule | None) -> None:
    if schedule is None:
        with pytest.raises(cs.FormatError, match="write it as"):
            parse_schedule(text)
    else:
        assert parse_schedule(text) == schedule


HOSTILE = {
    "import": "__import__('os').system('true')",
    "bare import": "__import__('os')",
    "attribute": "last.__class__(1)",
    "method": "last(1).kept([], None)",
    "attributes in arguments": "last(().__class__.__bases__)",
    "lambda": "(lambda: last(1))()",
    "lambda in arguments": "last(lambda: 1)",
    "f-string": "last(f'{1}')",
    "power": "last(9**9**9)",
    "product": "tagged('a' * 10**9)",
    "comprehension": "last(*[1 for _ in range(10**9)])",
    "starred": "last(*'1')",
    "double starred": "last(**{'n': 1})",
    "walrus": "(last := 1)",
    "condition": "last(1) if 1 else last(2)",
    "or": "last(1) or last(2)",
    "and": "last(1) & last(2)",
    "list": "[last(1)]",
    "subscript": "last[1]",
    "two statements": "last(1); last(2)",
    "lines": "last(1)\nlast(2)",
    "empty": "",
    "blank": "  ",
    "comment": "# last(1)",
    "nul": "last(1)\0",
    "surrogate": "last(\ud800)",
    "bytes": "best(b'loss')",
    "number": "5",
    "name": "last",
    "text": "'last(1)'",
    "unknown": "latest(5)",
    "set": "tagged({'a'})",
    "tuple": "tagged(('a',))",
    "complex": "last(1j)",
    "ellipsis": "last(...)",
    "deep parentheses": "last(" + "(" * 5000 + "1" + ")" * 5000 + ")",
    "deep brackets": "last(" + "[" * 150 + "1" + "]" * 150 + ")",
    "unclosed": "last(" * 90,
    "deep signs": "last(" + "-" * 900 + "1)",
    "deeper signs": "-" * 50_000 + "1",
    "many attributes": "last" + ".a" * 20_000,
    "many calls": "last" + "(1)" * 3000,
    "many parts": "last(1)|" * 11_000 + "last(1)",
    "many products": "last(" + "1*" * 3000 + "1)",
    "long name": "a" * 99_999,
    "very long": "last(1)" + " " * 200_000,
    "long number": "last(" + "9" * 5000 + ".0)",
    "digits": "last(" + "9" * 50_000 + ")",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text(text: str) -> None:
    """Is no policy, and nothing of it runs; the message stays short."""
    for parse in (parse_keep, parse_schedule):
        with pytest.raises(cs.FormatError) as caught:
            parse(text)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("value", [None, 5, b"last(1)", ["last(1)"], cs.last(1)])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(cs.FormatError, match="write text, as last"):
        parse_keep(value)
    with pytest.raises(cs.FormatError, match="write text, as every"):
        parse_schedule(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evry(steps=5)", "did you mean every?"),
        ("last(5)", "is not a schedule.*There are at, every, epoch_plan"),
        ("every(step=5)", "unexpected keyword argument 'step'"),
        ("every(steps=5, steps=6)", "give each argument once"),
        ("every(steps=5, epochs=1)", "combine two with |"),
        ("every(steps=ten)", "must be a whole number"),
        ("every(steps=True)", "must be a whole number"),
        ("every(steps=0)", "must be a whole number from 1"),
        ("every(steps=-5)", "must be a whole number from 1"),
        ("every(steps=1e3)", "must be a whole number from 1"),
        ("every(minutes=1e999)", "must be from"),
        ("every(minutes=nan)", "must be from"),
        ("every(steps=None)", "give just one interval"),
        ("at(ten)", "write whole numbers from 0"),
        ("at(-5)", "write whole numbers from 0"),
        ("at()", "give at least one step"),
        ("at([1, 2])", r"write at\(\*steps\)"),
        ("at(9-5/1)", "LAST not before FIRST"),
        ("at(0-999999999/1)", "write longer intervals"),
        ("at(" + ",".join(f"0-{499_999 - n}/1" for n in range(6000)) + ")", "write longer intervals"),
        ("epoch_plan(base=1)", "must be over 1"),
        ("epoch_plan(spacing=log)", "unexpected keyword argument 'spacing'"),
        ("milestones()", "milestones..1B.. says when to save"),
        ("milestones(5)", "write numbers with commas"),
        ("budget('1')", "as '1%' or 0.01"),
        ("budget('0%')", "over 0 and below 100 %"),
        ("budget('100%')", "over 0 and below 100 %"),
        ("budget(mtbf='soon')", "write a number and a unit, as 90s"),
        ("budget(mtbf=0)", "must be over 0"),
        ("budget(overhead=" + "9" * 4000 + ")", "below 100 %"),
        ("budget(mtbf=" + "9" * 4000 + ")", "is no duration"),
        ("on_best(eval/loss)", "write a number, or text in quotes"),
    ],
)
def test_what_to_write_instead(text: str, message: str) -> None:
    with pytest.raises(cs.FormatError, match=message):
        parse_schedule(text)


def test_milestones_are_a_rule_without_counts() -> None:
    assert parse_keep("milestones()") == cs.milestones()
    with pytest.raises(cs.FormatError, match=r"milestones\(\) says what stays"):
        parse_keep("milestones('1B')")


def test_schedules_and_rules_do_not_mix() -> None:
    with pytest.raises(TypeError):
        cs.every(steps=5) | cs.last(5)
    with pytest.raises(TypeError):
        cs.last(5) | "epochs()"
