"""A pair of checkpoints, and the forger of the newer one."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tests.integrity.stores import Forge, MemoryRaw, Pair, pair


@pytest.fixture
def p() -> Pair:
    return pair(MemoryRaw(uuid4().hex))


@pytest.fixture
def forge(p: Pair) -> Forge:
    return Forge(p.raw, p.bad.id)
