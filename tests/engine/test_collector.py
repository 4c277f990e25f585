"""Pausing the cycle collector leaves it as it was."""

from __future__ import annotations

import gc

import pytest

from ckptstore.engine.collector import collector_paused


def test_pauses_and_resumes() -> None:
    """Off inside, on again afterwards, also after an error."""

    def fails() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise ValueError("inside")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"):
        fails()
    assert gc.isenabled()


def test_leaves_a_disabled_collector_off() -> None:
    """Who switched it off wants it off."""
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
