"""Every interleaving of borrowers, a deleter and two prunes: nothing acknowledged loses a file; each rule counts."""

from __future__ import annotations

import pytest

from tests.integrity.protocol import Rules, explored


@pytest.mark.parametrize("at_once", [True, False], ids=["listed at once", "listed in steps"])
@pytest.mark.parametrize("looks_for", ["record", pytest.param("both", marks=pytest.mark.full)])
def test_no_interleaving_loses_a_file(at_once: bool, looks_for: str) -> None:
    """The record is enough; who looks for the tombstone too only gives way more often."""
    states, loss = explored(Rules(at_once=at_once, looks_for=looks_for))
    assert loss is None, loss
    # It doesn't hold because nobody ever borrows, gives way, or reclaims.
    assert any(state.acknowledged == {"L", "B", "V"} for state in states)
    assert any("B" in state.graves - state.acknowledged for state in states)
    assert any(not state.file for state in states)


@pytest.mark.parametrize(
    "mutant",
    [
        Rules(looks_for="nothing", at_once=True),
        Rules(looks_for="tombstone", at_once=True),
        Rules(counts_buried=False, at_once=True),
        Rules(lists="before", at_once=True),
        Rules(lists="before", looks_for="both", at_once=True),
        Rules(lists="first", at_once=True),
        Rules(lists="first", looks_for="both", at_once=True),
        Rules(settles=False),
        Rules(trusts_the_dead=True, at_once=True),
    ],
    ids=str,
)
def test_without_any_one_rule_some_interleaving_loses_a_file(mutant: Rules) -> None:
    """The shortest history that does is told."""
    _, history = explored(mutant)
    assert history is not None
    assert history[-1].lost
    assert not history[-2].lost
