"""Deleting checkpoints whose files others borrow: what is lent outlives its owner, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import IntegrityError, NotFoundError
from ckptstore.format.layout import folder_id
from ckptstore.maintenance.prune import PruneReport
from tests.integrity.borrowing import MODEL, OPTIMIZER, borrow, content
from tests.integrity.crash import Crash, CrashingStorage
from tests.integrity.stores import (
    GOOD,
    NEW,
    FolderRaw,
    Forge,
    MemoryRaw,
    Raw,
    flat,
    opened,
    read,
    save,
    silence,
    state,
)

OWN = {"optimizer/m": NEW["optimizer/m"]}
MIXED = {name: data for name, data in GOOD.items() if name.startswith("model")} | OWN


@pytest.fixture(params=["memory", "folder"])
def raw(request: pytest.FixtureRequest, store_path: Path) -> Raw:
    return MemoryRaw(uuid4().hex) if request.param == "memory" else FolderRaw(store_path)


@pytest.fixture
def memory() -> MemoryRaw:
    return MemoryRaw(uuid4().hex)


def lender_and_borrower(raw: Raw) -> tuple[Checkpoint, Checkpoint]:
    """The second has the model of the first, and an optimizer of its own."""
    with opened(raw.url) as store:
        lender = save(store, state(GOOD), 1)
        return lender, borrow(store, raw, lender, OWN, 2)


def files(raw: Raw, checkpoint: Checkpoint) -> set[str]:
    """What lies in its folder."""
    begin = f"checkpoints/{checkpoint.id}/"
    return {key.removeprefix(begin) for key in raw.listing() if key.startswith(begin)}


def delete(raw: Raw, *checkpoints: Checkpoint) -> None:
    with opened(raw.url) as store, silence():
        for checkpoint in checkpoints:
            store.delete(checkpoint.id)


def prune(raw: Raw) -> PruneReport:
    with opened(raw.url) as store, silence():
        return store.prune(grace_s=0)


def clean(raw: Raw, *ids: str) -> None:
    """These are all that there is, whole, and nothing lies beside them."""
    with opened(raw.url) as store:
        assert [c.id for c in store.checkpoints()] == list(ids)
        report = store.verify()
    assert report.ok
    assert report.leftovers == report.foreign == []


def sizes(raw: Raw, checkpoint: Checkpoint, names: set[str]) -> int:
    return sum(len(raw.get(f"checkpoints/{checkpoint.id}/{name}")) for name in names)


def test_a_borrowed_file_loads(raw: Raw) -> None:
    lender, borrower = lender_and_borrower(raw)
    with opened(raw.url) as store:
        assert read(store, borrower) == MIXED
        assert read(store, lender) == dict(GOOD)
        assert flat(store.load("latest")) == MIXED
    assert files(raw, borrower) == {OPTIMIZER, "part-00000.json", "manifest.json"}
    clean(raw, lender.id, borrower.id)


def test_all_but_what_is_lent_is_reclaimed(raw: Raw) -> None:
    """The record, manifest, part and optimizer go at once, the model with the last who needs it."""
    lender, borrower = lender_and_borrower(raw)
    going = {OPTIMIZER, "part-00000.json", "manifest.json"}
    size = sizes(raw, lender, going)
    delete(raw, lender)
    report = prune(raw)
    assert (report.reclaimed, report.leftovers, report.freed_bytes) == ([lender.id], [], size)
    assert files(raw, lender) == {MODEL}
    assert f"commits/{lender.id}.json" not in raw.listing()
    assert f"trash/{lender.id}.json" in raw.listing()
    with opened(raw.url) as store:
        assert store.deleted() == []
        with pytest.raises(NotFoundError, match="nothing"):
            store.undelete(lender.id)
        assert read(store, borrower) == MIXED
    clean(raw, borrower.id)

    again = prune(raw)
    assert (again.reclaimed, again.leftovers, again.freed_bytes) == ([], [], 0)
    assert not any(key.startswith("commits/") and lender.id in key for key in raw.listing()), "condemned"

    last = sizes(raw, lender, {MODEL}) + sizes(raw, borrower, files(raw, borrower))
    delete(raw, borrower)
    report = prune(raw)
    assert (report.reclaimed, report.leftovers, report.freed_bytes) == ([lender.id, borrower.id], [], last)
    assert not any(folder_id(key) for key in raw.listing())
    clean(raw)


def test_lender_and_borrower_in_one_prune(raw: Raw) -> None:
    lender, borrower = lender_and_borrower(raw)
    delete(raw, lender, borrower)
    assert prune(raw).reclaimed == [lender.id, borrower.id]
    assert not any(folder_id(key) for key in raw.listing())


def test_a_buried_borrower_keeps_what_it_needs(memory: MemoryRaw) -> None:
    """It can be brought back, whole, after its lender is gone."""
    lender, borrower = lender_and_borrower(memory)
    delete(memory, borrower)
    memory.objects[f"trash/{borrower.id}.json"] = memory.objects[f"trash/{borrower.id}.json"]._replace(modified=1e11)
    delete(memory, lender)
    assert prune(memory).reclaimed == [lender.id]
    assert files(memory, lender) == {MODEL}
    with opened(memory.url) as store:
        assert [c.id for c in store.deleted()] == [borrower.id]
        store.undelete(borrower.id)
        assert read(store, borrower) == MIXED
    clean(memory, borrower.id)


def test_a_file_handed_on(memory: MemoryRaw) -> None:
    """Whoever borrowed from a borrower needs its owner only."""
    lender, between = lender_and_borrower(memory)
    with opened(memory.url) as store:
        last = borrow(store, memory, between, content(3, "optimizer/m"), 3)
    assert last.record.lenders == [lender.id]
    delete(memory, lender, between)
    assert prune(memory).reclaimed == [lender.id, between.id]
    assert (files(memory, lender), files(memory, between)) == ({MODEL}, set())
    clean(memory, last.id)


def test_different_borrowers_of_different_files(memory: MemoryRaw) -> None:
    """Each file goes with the last who needs it."""
    with opened(memory.url) as store:
        lender = save(store, state({**GOOD, "ema/w": b"ema" * 30}), 1)
        one = borrow(store, memory, lender, OWN, 2, [MODEL])
        two = borrow(store, memory, lender, OWN, 3, ["ema.safetensors"])
    delete(memory, lender)
    prune(memory)
    assert files(memory, lender) == {MODEL, "ema.safetensors"}
    delete(memory, one)
    assert prune(memory).reclaimed == [lender.id, one.id]
    assert files(memory, lender) == {"ema.safetensors"}
    clean(memory, two.id)


@pytest.mark.parametrize("name", ["part-00000.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "removed"])
def test_a_borrower_whose_records_are_damaged(memory: MemoryRaw, name: str, how: str) -> None:
    """What it borrows can't be told: all its lender's files stay, until it is repaired or deleted."""
    lender, borrower = lender_and_borrower(memory)
    before, key = files(memory, lender), f"checkpoints/{borrower.id}/{name}"
    good = memory.get(key)
    memory.put(key, bytes([good[0] ^ 1]) + good[1:]) if how == "flipped" else memory.remove(key)
    delete(memory, lender)
    report = prune(memory)
    assert (report.reclaimed, report.freed_bytes) == ([lender.id], 0)
    assert files(memory, lender) == before
    with opened(memory.url) as store:
        assert store.verify().leftovers == []
    memory.put(key, good)
    assert prune(memory).reclaimed == [lender.id]
    assert files(memory, lender) == {MODEL}
    clean(memory, borrower.id)


def test_a_damaged_commit_record_may_list_any_older_id(memory: MemoryRaw) -> None:
    """Nothing older than it is reclaimed or collected; what is newer is; and it comes back whole."""
    lender, borrower = lender_and_borrower(memory)
    with opened(memory.url) as store:
        old, dead, new = (save(store, state(content(n, "model/w")), n) for n in (3, 4, 5))
        damaged = borrow(store, memory, borrower, OWN, 6)
        dead_too, newest = (save(store, state(content(n, "model/w")), n) for n in (7, 8))
    delete(memory, lender, borrower)
    prune(memory)
    assert files(memory, lender) == {MODEL}
    for unfinished in (dead, dead_too):
        memory.remove(f"commits/{unfinished.id}.json")
    delete(memory, old, newest)
    key = f"commits/{damaged.id}.json"
    good = memory.get(key)
    memory.put(key, good.replace(b"commit", b"kommit"))
    report = prune(memory)
    assert (report.reclaimed, report.leftovers) == ([newest.id], [dead_too.id])
    assert files(memory, lender) == {MODEL}
    with opened(memory.url) as store, silence():
        assert [c.id for c in store.deleted()] == [old.id]
        verified = store.verify()
        assert ([d.key for d in verified.damages], verified.leftovers) == ([key], [])
    memory.put(key, good)
    report = prune(memory)
    assert (report.reclaimed, report.leftovers) == ([old.id], [dead.id])
    with opened(memory.url) as store:
        assert read(store, damaged) == MIXED
    clean(memory, new.id, damaged.id)


def test_a_borrower_with_holes_is_not_brought_back(raw: Raw) -> None:
    """A save that lost its lender buried itself; its tombstone stays where it is."""
    lender, borrower = lender_and_borrower(raw)
    delete(raw, borrower)
    raw.remove(f"checkpoints/{lender.id}/{MODEL}")
    with opened(raw.url) as store, silence():
        with pytest.raises(NotFoundError, match=f"{lender.id}/{MODEL}.*removed") as caught:
            store.undelete(borrower.id)
        assert caught.value.id == borrower.id
        assert [c.id for c in store.checkpoints()] == [lender.id]
        assert [c.id for c in store.deleted()] == [borrower.id]


def test_a_damaged_borrower_is_brought_back_as_it_is(memory: MemoryRaw) -> None:
    _, borrower = lender_and_borrower(memory)
    delete(memory, borrower)
    memory.put(f"checkpoints/{borrower.id}/manifest.json", b"x")
    with opened(memory.url) as store:
        assert store.undelete(borrower.id) == borrower
        with pytest.raises(IntegrityError):
            read(store, borrower)


def test_the_tombstone_of_a_lender_stays_as_long_as_its_files(memory: MemoryRaw) -> None:
    lender, borrower = lender_and_borrower(memory)
    delete(memory, lender)
    prune(memory)

    def age() -> None:
        for key, it in memory.objects.items():
            memory.objects[key] = it._replace(modified=0.0)

    tombstone = f"trash/{lender.id}.json"
    age()
    prune(memory)
    assert tombstone in memory.listing()
    delete(memory, borrower)
    age()
    prune(memory)
    assert not files(memory, lender)
    assert tombstone in memory.listing(), "it outlives the files"
    prune(memory)
    assert tombstone not in memory.listing()


def test_an_unfinished_save_that_a_record_names_as_lender(memory: MemoryRaw) -> None:
    """The register decides, whatever the records say: who was named without having been committed is condemned."""
    lender, borrower = lender_and_borrower(memory)
    memory.remove(f"commits/{lender.id}.json")
    report = prune(memory)
    assert (report.reclaimed, report.leftovers) == ([], [lender.id])
    assert files(memory, lender) == {MODEL}
    assert f"commits/{lender.id}.json" in memory.listing()
    clean(memory, borrower.id)


# -- verify ------------------------------------------------------------------------------------------------


def test_a_shared_file_is_verified_once(memory: MemoryRaw) -> None:
    """And its damage is damage to everybody who needs it."""
    with opened(memory.url) as store:
        chain = [save(store, state(GOOD), 1)]
        for step in range(2, 6):
            chain.append(borrow(store, memory, chain[-1], content(step, "optimizer/m"), step))
    key, read_from, seen = f"checkpoints/{chain[0].id}/{MODEL}", [], []
    with opened(memory.url) as store:
        open_reader = store._storage.open_reader
        store._storage.open_reader = lambda key, **how: read_from.append(key) or open_reader(key, **how)  # type: ignore[method-assign, func-returns-value]
        report = store.verify(progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert sorted(read_from) == sorted(set(read_from))
    assert len(read_from) == 6
    assert seen[-1][0] == seen[-1][1] == sum(c.stored_bytes for c in chain)
    assert [one.read_bytes for one in report.checkpoints] == [c.stored_bytes for c in chain]
    shared = len(memory.get(key))
    assert report.read_bytes == seen[-1][1] - 4 * shared

    memory.put(key, memory.get(key)[:-1] + b"!")
    with opened(memory.url) as store:
        report = store.verify()
    assert [(d.key, d.id, d.block) for d in report.damages] == [(key, c.id, 0) for c in chain]
    assert all(set(d.tensors) == {"model/w", "model/b"} for d in report.damages)
    memory.remove(key)
    with opened(memory.url) as store:
        assert [(d.key, d.id) for d in store.verify().damages] == [(key, c.id) for c in chain]


def test_another_description_of_a_shared_file_is_proven_by_itself(memory: MemoryRaw) -> None:
    """One borrower's part tells lies about the file: only that one is damaged."""
    lender, borrower = lender_and_borrower(memory)
    forge = Forge(memory, borrower.id)
    [entry] = [file for file in forge.part["files"] if file["owner"] == lender.id]
    entry["blocks"][0]["digest"] = "0" * 64
    forge.write()
    with opened(memory.url) as store:
        assert [d.id for d in store.verify().damages] == [borrower.id]


# -- many generations --------------------------------------------------------------------------------------


@dataclass
class Generations:
    """A store under random saves that borrow, deletions, returns and prunes, and what must be in it."""

    raw: Raw
    choose: random.Random
    whole: dict[str, dict[str, bytes]] = field(default_factory=dict)
    needs: dict[str, set[str]] = field(default_factory=dict)
    """The data files of each checkpoint that isn't reclaimed."""
    live: list[Checkpoint] = field(default_factory=list)
    buried: list[Checkpoint] = field(default_factory=list)
    step: int = 0

    def save(self) -> None:
        self.step += 1
        names = ["model/w", "ema/w", "optimizer/m"]
        with opened(self.raw.url) as store:
            if not self.live or self.choose.random() < 0.1:
                own = content(self.step, *names)
                self.known(save(store, state(own), self.step), own)
                return
            via = self.choose.choice(self.live)
            same = self.choose.sample(names[:2], self.choose.randint(1, 2))
            own = content(self.step, *(name for name in names if name not in same))
            borrowed = {name: self.whole[via.id][name] for name in same}
            files = [name.partition("/")[0] + ".safetensors" for name in same]
            self.known(borrow(store, self.raw, via, own, self.step, files), {**borrowed, **own})

    def known(self, saved: Checkpoint, tensors: dict[str, bytes]) -> None:
        self.live.append(saved)
        self.whole[saved.id] = tensors
        with opened(self.raw.url) as store:
            self.needs[saved.id] = {file.key for file in store.contents(saved).files}

    def delete(self) -> None:
        if self.live:
            victim = self.live.pop(self.choose.randrange(len(self.live)))
            delete(self.raw, victim)
            self.buried.append(victim)

    def undelete(self) -> None:
        if self.buried:
            back = self.buried.pop(self.choose.randrange(len(self.buried)))
            with opened(self.raw.url) as store:
                store.undelete(back.id)
            self.live = sorted([*self.live, back], key=lambda c: c.order)

    def prune(self) -> None:
        report = prune(self.raw)
        assert {c.id for c in self.buried} <= set(report.reclaimed)
        assert not report.leftovers
        for gone in self.buried:
            del self.needs[gone.id]
        self.buried.clear()
        left = {key for key in self.raw.listing() if key.startswith("checkpoints/")}
        records = {f"checkpoints/{id}/{name}" for id in self.needs for name in ("manifest.json", "part-00000.json")}
        assert left == records.union(*self.needs.values()), "all that is needed, and nothing else"

    def check(self) -> None:
        with opened(self.raw.url) as store:
            assert [c.id for c in store.checkpoints()] == [c.id for c in self.live]
            for checkpoint in self.live:
                assert read(store, checkpoint) == self.whole[checkpoint.id]
            report = store.verify() if self.live else None
        assert report is None or (report.ok and not report.leftovers and not report.foreign)


@pytest.mark.parametrize("seed", range(4))
def test_random_generations(memory: MemoryRaw, seed: int, full: bool) -> None:
    """Whatever the order: every checkpoint that isn't reclaimed is whole, and prune leaves what these need, exactly."""
    it = Generations(memory, random.Random(seed))
    actions: list[Callable[[], None]] = [it.save] * 5 + [it.delete] * 4 + [it.undelete, it.prune]
    for number in range(400 if full else 60):
        it.choose.choice(actions)()
        it.check()
        if number % 20 == 19:
            it.prune()
    assert it.step > 10


@pytest.mark.parametrize("count", [1, 2, 50])
def test_one_lends_to_many(memory: MemoryRaw, count: int) -> None:
    """The base of a long run is stored once, and goes with the last of all."""
    choose = random.Random(count)
    with opened(memory.url) as store:
        base = save(store, state(GOOD), 0)
        chain = [base]
        for step in range(1, count + 1):
            chain.append(borrow(store, memory, choose.choice(chain), content(step, "optimizer/m"), step))
    assert all(c.record.lenders == [base.id] for c in chain[1:])
    order = [base, *choose.sample(chain[1:], count)]
    for number, victim in enumerate(order):
        delete(memory, victim)
        prune(memory)
        assert files(memory, base) == ({MODEL} if number < count else set())
        clean(memory, *(c.id for c in chain if c not in order[: number + 1]))


# -- killed in the middle ----------------------------------------------------------------------------------


def outcomes(memory: MemoryRaw, *, after: bool) -> Iterator[bool]:
    """Kill a prune of a lender, and of a borrower of another, at each change; whether it was killed."""
    with opened(memory.url) as store:
        lender = save(store, state({**GOOD, "ema/w": b"ema" * 30}), 1)
        one = borrow(store, memory, lender, OWN, 2)
        two = borrow(store, memory, one, OWN, 3)
        dead = save(store, state(NEW), 4)
    delete(memory, lender, one)
    memory.remove(f"commits/{dead.id}.json")
    before = dict(memory.objects)
    killed, at = True, 0
    while killed:
        at += 1
        memory.objects.clear()
        memory.objects.update(before)
        with opened(memory.url) as store:
            crashing = CrashingStorage(store._storage, at, after=after)
            store._storage = crashing
            with suppress(Crash):
                store.prune(grace_s=0)
            killed = crashing.dead
        with opened(memory.url) as store:
            assert read(store, two) == MIXED
            assert store.verify().ok
        prune(memory)
        assert (files(memory, lender), files(memory, one), files(memory, dead)) == ({MODEL}, set(), set())
        clean(memory, two.id)
        yield killed


@pytest.mark.parametrize("after", [False, True])
def test_a_prune_killed_at_every_change(memory: MemoryRaw, after: bool) -> None:
    """Whoever is not deleted loads, and the next prune finishes the work."""
    assert sum(outcomes(memory, after=after)) >= 12
