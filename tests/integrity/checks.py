"""What must hold of a store whose newer checkpoint is damaged."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptstore.engine.catalogue import Damage
from ckptstore.engine.damage import DamageWarning, FallbackWarning
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError
from ckptstore.maintenance.verify import VerifyReport
from ckptstore.store import Store
from tests.integrity.stores import GOOD, Pair, flat, opened, read, silence

REFUSALS = (IntegrityError, FormatError)


def error_of(action: Callable[[], object]) -> CheckpointError | None:
    """The library's error that ``action`` ends with; any other kind goes through."""
    with silence():
        try:
            action()
        except CheckpointError as error:
            return error
    return None


def refuses(pair: Pair, kinds: tuple[type[CheckpointError], ...] = REFUSALS) -> CheckpointError:
    """Loading the damaged checkpoint by its id fails with one of ``kinds``, and the message names it."""
    with opened(pair.raw.url) as store:
        error = error_of(lambda: read(store, store.resolve(pair.bad.id)))
    assert isinstance(error, kinds), f"expected {kinds}, got {error!r}"
    assert pair.bad.id in str(error)
    return error


def falls_back(pair: Pair) -> None:
    """``latest`` is the older checkpoint, exactly, and a warning names the damaged one."""
    with opened(pair.raw.url) as store, silence() as caught:
        loaded = store.load("latest")
    assert loaded["epoch"] == 1
    assert flat(loaded) == dict(GOOD)
    told = [str(w.message) for w in caught if issubclass(w.category, DamageWarning)]
    assert any(pair.bad.id in text for text in told), told


def verified(pair: Pair) -> VerifyReport:
    """The report of a store opened anew."""
    with opened(pair.raw.url) as store, silence():
        return store.verify()


def reports(pair: Pair, key: str) -> list[Damage]:
    """``verify`` names ``key`` as damaged, and nothing else."""
    report = verified(pair)
    assert not report.ok
    assert {damage.key for damage in report.damages} == {key}
    return report.damages


def detected(pair: Pair, key: str) -> None:
    """All three: refused by id, named by ``verify``, skipped by ``latest``."""
    refuses(pair)
    reports(pair, key)
    falls_back(pair)


def intact(pair: Pair) -> None:
    """Both checkpoints load exactly: what a test undid is undone."""
    with opened(pair.raw.url) as store:
        assert store.verify().ok
        assert store.load("latest")["epoch"] == 2


def gone(store: Store, id: str) -> None:
    """There is no such checkpoint."""
    with pytest.raises(NotFoundError):
        store.resolve(id)


__all__ = [
    "FallbackWarning",
    "REFUSALS",
    "detected",
    "error_of",
    "falls_back",
    "gone",
    "intact",
    "refuses",
    "reports",
    "verified",
]
