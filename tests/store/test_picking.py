"""Picking several checkpoints at once, as an evaluation does."""

from __future__ import annotations

from uuid import uuid4

import pytest

import ckptstore as cs
from ckptstore.errors import FormatError, NotFoundError


@pytest.fixture
def store() -> cs.Store:
    made = cs.open(f"memory://{uuid4().hex}")
    for step in (100, 9, 10, 9):
        made.save({"x": step}, step=step, metrics={"acc": -step})
    return made


def steps(found: list[cs.Checkpoint]) -> list[int]:
    return [checkpoint.step for checkpoint in found]


def test_all(store: cs.Store) -> None:
    """By number, not as text; without a selection in the order in which they were saved."""
    assert steps(store.checkpoints("all")) == [9, 9, 10, 100]
    assert steps(store.checkpoints()) == [100, 9, 10, 9]


def test_some(store: cs.Store) -> None:
    """By step (the newest of it) and selector, each once, in the order of their steps."""
    assert steps(store.checkpoints([100, "latest", "best:acc", 9])) == [9, 100]
    assert store.checkpoints([9]) == [store.resolve("latest")]
    assert steps(store.checkpoints(range(9, 11))) == [9, 10]


def test_missing(store: cs.Store) -> None:
    """Is told, and no error as long as anything is found."""
    with pytest.warns(UserWarning, match="step:300"):
        assert steps(store.checkpoints([300, 10])) == [10]
    with pytest.raises(NotFoundError, match="step:300"):
        store.checkpoints([300])
    assert store.checkpoints([]) == []


@pytest.mark.parametrize("select", ["last", 3, [1.5], [True], {"a": 1}])
def test_no_selection(store: cs.Store, select: object) -> None:
    """An error that says what to write."""
    with pytest.raises(FormatError, match="write 'all', or a list"):
        store.checkpoints(select)  # type: ignore[arg-type]
