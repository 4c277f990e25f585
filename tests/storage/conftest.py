"""What the tests of local storage share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptstore.storage import LocalStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    """With its folders made and synced, so that a test sees only what its own call does."""
    storage = LocalStorage(root)
    storage.create("commits/first", b"")
    return storage
