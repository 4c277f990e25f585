"""One process that loads PyTorch for all tests that import foreign checkpoints; each import still has its own fork."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptstore.tools.importing.sandbox import Sandbox


class Shared(Sandbox):
    """A sandbox that lasts longer than its block."""

    def __exit__(self, *ended: object) -> None:
        pass


@pytest.fixture(scope="session")
def _shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.close()


@pytest.fixture
def sandbox(_shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """What all imports of the test use."""
    monkeypatch.setattr("ckptstore.tools.importing.run.Sandbox", lambda: _shared)
    monkeypatch.setattr("ckptstore.integrations.dcp_import.Sandbox", lambda: _shared)
    return _shared
