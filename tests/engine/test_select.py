"""Selectors: what each names, and what is said where nothing fits."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.select import default_mode, select
from ckptstore.errors import FormatError, NoCheckpointError, NotFoundError


def checkpoint(seq: int, step: int, **fields: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "epoch": None,
        "metrics": {},
        "modes": {},
        "reasons": (),
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "parameters": 0,
        "tensors": 0,
        "files": 0,
        "raw_bytes": 0,
        "stored_bytes": 0,
        "borrowed_bytes": 0,
        "world_size": 1,
        "record": None,
    }
    return Checkpoint(id=f"0001-{seq:06d}-step{step}-{seq:016x}", step=step, **{**values, **fields})


SEVERAL = [
    checkpoint(1, 100, epoch=1, metrics={"val_loss": 3.0, "acc": 0.1}, reasons=("milestone 1B",)),
    checkpoint(2, 200, epoch=1, metrics={"val_loss": 1.0, "acc": 0.9}),
    checkpoint(3, 300, epoch=2, metrics={"val_loss": math.nan}),
    # After a roll-back: saved later, of a smaller step.
    checkpoint(4, 200, metrics={"val_loss": 1.0, "odd": 5.0}, modes={"odd": "min"}),
    checkpoint(5, 250, metrics={"odd": 7.0}, modes={"odd": "min"}),
]


def chosen(selector: str, holds: dict[str, str] | None = None) -> int:
    return select(SEVERAL, holds or {}, selector, "here").order.seq


@pytest.mark.parametrize(
    ("selector", "seq"),
    [
        ("latest", 5),
        ("step:100", 1),
        ("step:200", 4),
        ("epoch:1", 2),
        ("milestone:1B", 1),
        ("best:val_loss", 4),
        ("best:val_loss:max", 1),
        ("best:acc", 2),
        ("best:acc:min", 1),
        ("best:odd", 4),
        ("best:odd:max", 5),
        ("0001-000003", 3),
    ],
)
def test_each_selector(selector: str, seq: int) -> None:
    """Newest of equals wins; nan is never best; the recorded mode of a metric counts."""
    assert chosen(selector) == seq


def test_a_hold_selects_what_it_pins() -> None:
    """A hold's name stands for the id."""
    assert chosen("release", {"release": SEVERAL[1].id}) == 2


@pytest.mark.parametrize("selector", ["step:7", "epoch:9", "milestone:2B", "best:nothing", "0009", "no-such-hold"])
def test_nothing_fits(selector: str) -> None:
    """What is missing is NotFoundError, and never NoCheckpointError: that would mean a fresh start."""
    with pytest.raises(NotFoundError) as caught:
        chosen(selector)
    assert not isinstance(caught.value, NoCheckpointError)


@pytest.mark.parametrize(
    "selector", ["", "step:", "step:x", "step:-1", "step:²", "epoch:1.5", "worst:acc", "best:", "best:a:b"]
)
def test_no_selector(selector: str) -> None:
    """A wrong selector is told apart from a missing checkpoint, with the right spelling."""
    with pytest.raises(FormatError, match="selector"):
        chosen(selector)


def test_ambiguous_beginning() -> None:
    """The beginning of several ids is refused with one whole id as a hint."""
    with pytest.raises(FormatError, match="5 checkpoints"):
        chosen("0001-")


def test_empty_store() -> None:
    """An empty store is its own error, whatever is asked for."""
    for selector in ("latest", "step:1", "best:x", "name"):
        with pytest.raises(NoCheckpointError):
            select([], {}, selector, "here")


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val_loss", "min"), ("Error", "min"), ("Perplexity", "min"), ("accuracy", "max"), ("f1", "max")],
)
def test_mode_by_name(metric: str, mode: str) -> None:
    """Losses, errors and perplexities are better when smaller."""
    assert default_mode(metric) == mode


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("step:260", "the nearest are step 200, 250, 300."),
        ("epoch:9", "there is epoch 1, 2."),
        ("milestone:2B", "milestones here: 1B."),
        ("best:val_los", "metrics here: acc, odd, val_loss; did you mean 'val_loss'?"),
        ("250", "did you mean 'step:250'?"),
        ("acc", "did you mean 'best:acc'?"),
        ("0001-000006", f"did you mean '{SEVERAL[4].id}'"),
        ("papre", "did you mean 'paper'?"),
        ("lates", "did you mean 'latest'?"),
        ("nonsense", "holds here: paper."),
    ],
)
def test_what_was_meant_is_told(selector: str, hint: str) -> None:
    """A misspelt or missing one is answered with what is there and nearest to it."""
    with pytest.raises(NotFoundError) as caught:
        chosen(selector, {"paper": SEVERAL[1].id})
    assert hint in str(caught.value)


def test_a_misspelt_kind_is_told() -> None:
    with pytest.raises(FormatError, match=r"did you mean 'step:10'\? Use latest"):
        chosen("stp:10")
    with pytest.raises(FormatError, match="'s3://x' is no selector; use latest"):
        chosen("s3://x")


def test_of_very_many_only_some_are_shown() -> None:
    many = [checkpoint(n, n, metrics={f"metric {n}": 1.0}) for n in range(1, 3000)]
    for selector in ("best:metric", "step:5000", "metric", "x" * 100_000):
        with pytest.raises(NotFoundError) as caught:
            select(many, {f"hold{n}": many[0].id for n in range(1000)}, selector, "here")
        assert len(str(caught.value)) < 1000
