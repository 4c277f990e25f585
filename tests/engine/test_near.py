"""What may have been meant."""

from __future__ import annotations

import pytest

from ckptstore.near import meant, meant_pattern, near

NAMES = ["model/layers.0.weight", "model/layers.1.weight", "model/head.bias", "optimizer/state/0/exp_avg"]


def test_near_names() -> None:
    """Case doesn't count, and of very many names only some are looked at."""
    assert near("VAL_LOS", ["acc", "val_loss"]) == ["val_loss"]
    assert near("x" * 5000, ["x" * 5000, "y"]) == ["x" * 5000]
    assert meant("verfy", ["verify", "ls"]) == "; did you mean 'verify'?"
    assert meant("nonsense", ["verify", "ls"]) == meant("", ["a"]) == ""
    assert near("name 99999", (f"name {number}" for number in range(100_000))) != ["name 99999"]


@pytest.mark.parametrize(
    ("pattern", "better"),
    [
        ("modle/*", "'model/*'"),
        ("modle", "'model'"),
        ("optimiser/*avg", "'optimizer/*avg'"),
        ("model/hed.bias", "'model/head.bias'"),
        ("model/layer.[01].weight", "'model/layers"),
    ],
)
def test_near_patterns(pattern: str, better: str) -> None:
    assert better in meant_pattern(pattern, NAMES)


@pytest.mark.parametrize("pattern", ["*", "*.weigth", "", "{}", "[", "zzz"])
def test_patterns_that_are_like_nothing(pattern: str) -> None:
    assert meant_pattern(pattern, NAMES) == ""
