"""Every reason that a schedule or a rule gives has a kind, which says it for all of its sort."""

from __future__ import annotations

import pytest

from ckptstore.policy import rules
from ckptstore.policy.kinds import kept_as, kinds, saved_as
from ckptstore.policy.plan import foresee
from ckptstore.policy.progress import Length
from ckptstore.policy.retention import AtMost, Keep
from ckptstore.policy.text import parse_keep, parse_schedule

LENGTH = Length.of(100, 4, tokens_per_step=100, step_s=60)
RULES = {
    "last(3)": {"the newest 3"},
    "last(1)": {"the newest"},
    "epochs()": {"ends of epochs"},
    "every_kept(steps=50)": {"the first of each stretch"},
    "milestones()": {"milestones", "the newest"},
    "within('10m')": {"younger than 10m"},
    "tagged('epoch *')": {"saved for 'epoch 1'", "saved for 'epoch 2'", "saved for 'epoch 3'", "saved for 'epoch 4'"},
    "at_most('3GB')": {"room within 3GB"},
    "best(x)": {"the newest"},
}


def test_all_rules_are_tried_here() -> None:
    known = {each for each in vars(rules).values() if isinstance(each, type) and issubclass(each, Keep)}
    assert {type(parse_keep(text)) for text in RULES} == known - {Keep} | {AtMost}


@pytest.mark.parametrize("text", RULES)
def test_kept(text: str) -> None:
    save = parse_schedule("every(steps=5) | every(epochs=1) | milestones('10,35', of=steps)")
    plan = foresee(save, parse_keep(text), LENGTH, checkpoint_bytes=10**9)
    assert {kept_as(verdict.why) for verdict in plan.final} == RULES[text]


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        ("the best val_loss", "best val_loss"),
        ("2nd best val_loss, one of the newest 3", "best val_loss"),
        ("one of the newest 3, end of epoch 2", "ends of epochs"),
        ("end of epoch 2, milestone 1B", "milestones"),
        ("something else", "something else"),
    ],
)
def test_the_one_that_keeps_longest(why: str, kind: str) -> None:
    assert kept_as(why) == kind


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        ("every(steps=50)", {"every 50 steps"}),
        ("every(epochs=1)", {"epochs"}),
        ("epoch_plan(first=3)", {"epoch plan"}),
        ("at(3, 9)", {"named steps", "final"}),
        ("milestones('10,35', of=steps)", {"milestones", "final"}),
        ("every(fraction=0.5)", {"every 50 % of the run"}),
    ],
)
def test_saved(save: str, expected: set[str]) -> None:
    plan = foresee(parse_schedule(save), None, LENGTH, checkpoint_bytes=1)
    assert {saved_as(reason) for moment in plan.moments for reason in moment.reasons} == expected
    assert kinds(["epoch 1", "epoch 2", "final"]) == ["epochs", "final"]
