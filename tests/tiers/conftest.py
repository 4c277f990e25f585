"""Two or three places for one store."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def primary(tmp_path: Path) -> Path:
    """Where the store lies; not yet there."""
    return tmp_path / "primary"


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """Where it is copied to; not yet there."""
    return tmp_path / "backup"
