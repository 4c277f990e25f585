"""A prune of a lender, and in between any two of its calls: a borrower's commit, an undelete, another prune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations_with_replacement, product
from uuid import uuid4

import pytest

from ckptstore.engine.catalogue import Catalogue
from ckptstore.errors import IntegrityError, NotFoundError
from ckptstore.format import layout
from ckptstore.storage.base import Storage
from tests.integrity.borrowing import Borrower, borrow, content, interrupted
from tests.integrity.stores import GOOD, MemoryRaw, opened, read, save, state

GRACE_S = 3600.0
"""Tombstones are older here, unfinished saves are younger."""


class Scene:
    """A lender that is buried, and a borrower on its way: directly, or by way of one that is buried as well."""

    def __init__(self, *, direct: bool) -> None:
        self.raw = MemoryRaw(uuid4().hex)
        with opened(self.raw.url) as store:
            lender = save(store, state(GOOD), 1)
            via = lender if direct else borrow(store, self.raw, lender, content(2, "optimizer/m"), 2)
            own = content(3, "optimizer/m")
            self.borrower = Borrower(self.raw, borrow(store, self.raw, via, own, 3), via)
            for id in {lender.id, via.id}:
                store.delete(id)
                self.raw.objects[f"trash/{id}.json"] = self.raw.objects[f"trash/{id}.json"]._replace(modified=0.0)
        self.whole = {name: data for name, data in GOOD.items() if name.startswith("model")} | own

    def prune(self, actions: Mapping[int, Sequence[Callable[[], object]]]) -> int:
        """Prune with these actions before its calls; how many calls it made."""
        store, storage = interrupted(self.raw.url, {n: lambda n=n: [do() for do in actions[n]] for n in actions})
        store.prune(grace_s=GRACE_S)
        return storage.calls

    def prune_too(self) -> None:
        with opened(self.raw.url) as store:
            store.prune(grace_s=GRACE_S)

    def undelete(self) -> None:
        with opened(self.raw.url) as store, suppress(NotFoundError):
            store.undelete(self.borrower.via.id)

    def end(self) -> str:
        """Let the borrower end; what was acknowledged is whole and stays so, and at last all can be collected."""
        if self.borrower.state == "written":
            self.borrower.commit()
        if self.borrower.state == "committed":
            self.borrower.look_again()
        with opened(self.raw.url) as store:
            there = [c for c in store.checkpoints() if c.id == self.borrower.checkpoint.id]
            assert bool(there) == (self.borrower.state == "acknowledged")
            for _ in range(2):
                for checkpoint in store.checkpoints():
                    assert read(store, checkpoint)["model/w"] == GOOD["model/w"]
                assert [read(store, c) for c in there] == [self.whole] * len(there)
                store.prune(grace_s=0)
            for checkpoint in store.checkpoints():
                store.delete(checkpoint.id)
            store.prune(grace_s=0)
        assert not [key for key in self.raw.listing() if key.startswith("checkpoints/")]
        self.raw.objects.clear()
        return self.borrower.state


def calls(*, direct: bool) -> range:
    """The calls of an undisturbed prune, and one more for what comes after it."""
    return range(1, Scene(direct=direct).prune({}) + 2)


DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["from the owner", "from a borrower"])


@DIRECT
def test_a_commit_during_a_prune(direct: bool) -> None:
    """Committed before any call, checked before any later one: acknowledged and whole, or buried."""
    outcomes: Counter[str] = Counter()
    for commits, looks in combinations_with_replacement(calls(direct=direct), 2):
        scene, actions = Scene(direct=direct), {}
        for number, do in ((commits, scene.borrower.commit), (looks, scene.borrower.look_again)):
            actions.setdefault(number, []).append(do)
        scene.prune(actions)
        outcomes[scene.end()] += 1
    assert set(outcomes) == {"acknowledged", "buried"}


@DIRECT
@pytest.mark.parametrize("other", ["undelete", "prune_too"])
def test_a_commit_and_another_during_a_prune(direct: bool, other: str, full: bool) -> None:
    """The same with an undelete of the lender, or a second prune, at any place."""
    outcomes: Counter[str] = Counter()
    numbers = calls(direct=direct)[:: 1 if full else 4]
    for (commits, looks), others in product(combinations_with_replacement(numbers, 2), numbers):
        scene, actions = Scene(direct=direct), {}
        doing = ((others, getattr(scene, other)), (commits, scene.borrower.commit), (looks, scene.borrower.look_again))
        for number, do in doing:
            actions.setdefault(number, []).append(do)
        scene.prune(actions)
        outcomes[scene.end()] += 1
    assert set(outcomes) == {"acknowledged", "buried"}


def test_the_instrument_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune that trusts the commits as they were before it removed a record loses an acknowledged checkpoint."""

    def unchanged(storage: Storage, catalogue: Catalogue) -> Catalogue:
        there = {entry.key for entry in storage.list(layout.COMMITS)}
        return replace(catalogue, buried=[c for c in catalogue.buried if layout.commit_key(c.order) in there])

    monkeypatch.setattr("ckptstore.maintenance.prune.settled", unchanged)
    with pytest.raises((AssertionError, IntegrityError)):
        test_a_commit_during_a_prune(direct=True)
