"""Any history of saves, loads, deletions, crashes, damage and copies, against a model of what must be there."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import (
    CheckpointError,
    ExistsError,
    FormatError,
    IntegrityError,
    NoCheckpointError,
    NotFoundError,
    StaleWriterError,
    StorageError,
)
from ckptstore.format.layout import parse_id
from ckptstore.store import Store
from tests.integrity.crash import Crash, CrashingStorage
from tests.integrity.stores import FolderRaw, MemoryRaw, Raw, Tensors, flat, opened, read, save, silence, state

FAST = Path("/dev/shm")
COMPRESSION = ["none", "zstd", "float-zstd"]


@dataclass
class Known:
    """What the model knows of one checkpoint."""

    step: int
    tensors: Tensors
    buried: bool = False
    damaged: set[str] = field(default_factory=set)

    @property
    def record_damaged(self) -> bool:
        return any(key.startswith("commits/") for key in self.damaged)


class StoreMachine(RuleBasedStateMachine):
    """The model: which ids were acknowledged with which bytes, and what happened to them since."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Known] = {}
        self.holds: dict[str, str] = {}
        self.stores: list[Store] = []
        self.step = 0

    # -- where it lies ------------------------------------------------------------------------------------

    def place(self) -> Raw:
        return MemoryRaw(uuid4().hex)

    def copied(self) -> Raw:
        assert isinstance(self.raw, MemoryRaw)
        copy = MemoryRaw(uuid4().hex)
        copy.objects.update(self.raw.objects)
        return copy

    def drop(self, raw: Raw) -> None:
        assert isinstance(raw, MemoryRaw)
        raw.objects.clear()

    @initialize(compression=st.sampled_from(COMPRESSION))
    def begin(self, compression: str) -> None:
        self.raw = self.place()
        self.stores = [opened(self.raw.url, compression=compression)]

    @property
    def store(self) -> Store:
        return self.stores[-1]

    # -- what the model expects ---------------------------------------------------------------------------

    def live(self) -> list[str]:
        """Not buried, oldest first."""
        return sorted((id for id, known in self.known.items() if not known.buried), key=parse_id)

    def listed(self) -> list[str]:
        return [id for id in self.live() if not self.known[id].record_damaged]

    def good(self) -> list[str]:
        return [id for id in self.live() if not self.known[id].damaged]

    def newest_writer(self) -> int:
        return max((int(key[8:-5]) for key in self.raw.listing() if key.startswith("writers/")), default=0)

    def pick(self, ids: list[str], number: int) -> str:
        return ids[number % len(ids)]

    def acknowledged(self, saved: Checkpoint, tensors: Tensors) -> None:
        assert saved.id not in self.known
        newest = max((parse_id(id) for id in self.known), default=None)
        assert newest is None or parse_id(saved.id) > newest, "a save must become the newest"
        self.known[saved.id] = Known(saved.step, tensors)

    # -- rules --------------------------------------------------------------------------------------------

    def contents(self, seed: int) -> Tensors:
        rng = random.Random(seed)
        names = rng.sample(["model/w", "model/b", "ema/w", "optimizer/m", "x"], rng.randint(0, 4))
        tensors = {name: rng.randbytes(rng.choice([1, 7, 100, 5000])) for name in names if name != "x"}
        return {**tensors, "model/empty": b""} if "model/w" in tensors else tensors

    @rule(seed=st.integers(0, 1 << 16), back=st.integers(0, 3))
    def save(self, seed: int, back: int) -> None:
        """Steps may go back, after a roll-back."""
        self.step = max(0, self.step + 1 - back)
        tensors = self.contents(seed)
        self.acknowledged(save(self.store, state(tensors, seed=seed), self.step), tensors)

    @rule(seed=st.integers(0, 1 << 16))
    def save_by_an_older_store(self, seed: int) -> None:
        """Whoever opened before another saved: fenced off if it has a number, the newest if it hasn't."""
        store, tensors = self.stores[0], self.contents(seed)
        writer = store._dispatcher.claim.number
        if writer is not None and writer < self.newest_writer():
            with pytest.raises(StaleWriterError):
                save(store, state(tensors), self.step)
        elif writer is None:
            self.acknowledged(save(store, state(tensors), self.step), tensors)
            self.stores.append(store)

    @precondition(lambda self: self.known)
    @rule(number=st.integers(0, 99))
    def delete(self, number: int) -> None:
        id = self.pick(list(self.known), number)
        known = self.known[id]
        with silence():
            if known.buried:
                # Where all others are damaged, that is told first.
                with pytest.raises((NotFoundError, IntegrityError)):
                    self.store.delete(id)
            elif known.record_damaged:
                with pytest.raises(IntegrityError):
                    self.store.delete(id)
            elif id in self.holds.values():
                with pytest.raises(ExistsError):
                    self.store.delete(id)
            else:
                self.store.delete(id)
                known.buried = True

    @precondition(lambda self: any(known.buried for known in self.known.values()))
    @rule(number=st.integers(0, 99))
    def undelete(self, number: int) -> None:
        id = self.pick([id for id, known in self.known.items() if known.buried], number)
        with silence():
            assert self.store.undelete(id).id == id
        self.known[id].buried = False

    @precondition(lambda self: self.listed())
    @rule(number=st.integers(0, 99), name=st.sampled_from(["paper", "demo", "best-so-far"]))
    def hold(self, number: int, name: str) -> None:
        id = self.pick(self.listed(), number)
        with silence():
            if name in self.holds:
                with pytest.raises(ExistsError):
                    self.store.hold(id, name)
                return
            self.store.hold(id, name)
        self.holds[name] = id

    @rule(name=st.sampled_from(["paper", "demo", "best-so-far"]))
    def release(self, name: str) -> None:
        if name in self.holds:
            self.store.release(name)
            del self.holds[name]
        else:
            with pytest.raises(NotFoundError):
                self.store.release(name)

    @rule()
    def prune(self) -> None:
        with silence():
            report = self.store.prune(grace_s=0)
        # What a prune that was killed had begun is reclaimed too; the model has forgotten it already.
        assert set(report.reclaimed) & set(self.known) == self.reclaimable()
        for id in report.reclaimed:
            self.known.pop(id, None)

    def reclaimable(self) -> set[str]:
        """What is buried; but a damaged commit record may borrow from any that is older."""
        damaged = [parse_id(id) for id, known in self.known.items() if known.record_damaged]
        newest = max(damaged, default=None)
        buried = [id for id, known in self.known.items() if known.buried and not known.record_damaged]
        return {id for id in buried if newest is None or parse_id(id) > newest}

    @rule(compression=st.sampled_from(COMPRESSION))
    def reopen(self, compression: str) -> None:
        """Another process takes over; the stores opened before stay open, as a zombie's would."""
        self.stores.append(opened(self.raw.url, compression=compression))

    @precondition(lambda self: self.known)
    @rule(after=st.booleans(), at=st.integers(1, 12), action=st.sampled_from(["save", "delete", "hold", "prune"]))
    def crash(self, after: bool, at: int, action: str) -> None:
        """Killed in the middle of anything: each id then exists whole, or not at all, and nothing else is touched."""
        store = self.store
        crashing = CrashingStorage(store._storage, at, after=after)
        store._storage = store._finder._storage = store._tools.storage = store._dispatcher.claim._storage = crashing
        tensors = self.contents(at)
        victim = next((id for id in self.listed() if id not in self.holds.values()), None)
        actions: dict[str, Callable[[], object]] = {
            "save": lambda: save(store, state(tensors), self.step),
            "delete": lambda: victim and store.delete(victim),
            "hold": lambda: victim and store.hold(victim, f"crashed-{len(self.holds)}"),
            "prune": lambda: store.prune(grace_s=0),
        }
        done: object = None
        fired = True
        with silence():
            try:
                done = actions[action]()
                fired = False
            except Crash:
                pass
            except CheckpointError:
                fired = False
        assert fired == crashing.dead
        self.stores = [opened(self.raw.url, compression=store._tools.compressor.compression.codec)]
        if not fired and isinstance(done, Checkpoint) and action == "save":
            self.acknowledged(done, tensors)
        self.reconcile(action, victim, tensors)

    def reconcile(self, action: str, victim: str | None, tensors: Tensors) -> None:
        """Learn which of the two possible outcomes the crash left, and that it is one of them."""
        with silence():
            live = {c.id for c in self.store.checkpoints()}
            buried = {c.id for c in self.store.deleted()}
            holds = self.store.holds()
        for id in (live | buried) - set(self.known):
            assert action == "save"
            assert id in live
            self.known[id] = Known(self.step, tensors)
        for id, known in list(self.known.items()):
            if id in buried and not known.buried:
                assert (action, id) == ("delete", victim)
                known.buried = True
            elif id not in live | buried and not known.record_damaged:
                assert action == "prune"
                assert known.buried
                del self.known[id]
        for name in holds.keys() - self.holds.keys():
            assert (action, holds[name]) == ("hold", victim)
            self.holds[name] = holds[name]

    @precondition(lambda self: self.good())
    @rule(number=st.integers(0, 99), where=st.integers(0, 1 << 30), bit=st.integers(0, 7))
    def corrupt(self, number: int, where: int, bit: int) -> None:
        """One bit of any object of a good checkpoint."""
        id = self.pick(self.good(), number)
        keys = [key for key in self.raw.listing() if id in key and not key.startswith(("trash/", "holds/"))]
        key = self.pick(keys, where)
        data = bytearray(self.raw.get(key))
        data[where % len(data)] ^= 1 << bit
        self.raw.put(key, bytes(data))
        self.known[id].damaged.add(key)
        # Records don't change, so an open store may remember what they said.
        self.stores = [opened(self.raw.url)]

    @rule()
    def read_only(self) -> None:
        """Whoever only looks sees the same and changes nothing."""
        if not self.raw.listing():
            return
        before = {key: self.raw.get(key) for key in self.raw.listing()}
        with opened(self.raw.url, read_only=True) as looking, silence():
            assert [c.id for c in looking.checkpoints()] == self.listed()
            for action in (
                lambda: save(looking, state({}), 1),
                lambda: looking.prune(grace_s=0),
                lambda: looking.release("paper"),
            ):
                with pytest.raises((StorageError, NotFoundError)):
                    action()
        assert {key: self.raw.get(key) for key in self.raw.listing()} == before

    @rule()
    def copy(self) -> None:
        """A copy of the folder is the same store."""
        original, self.raw = self.raw, self.copied()
        try:
            self.check(opened(self.raw.url))
        finally:
            self.drop(self.raw)
            self.raw = original

    # -- what must hold after every step ------------------------------------------------------------------

    @invariant()
    def everything_acknowledged_is_there(self) -> None:
        if self.stores:
            self.check(self.store)
            self.check(opened(self.raw.url))

    def check(self, store: Store) -> None:
        with silence():
            listed = {c.id: c for c in store.checkpoints()}
            assert list(listed) == self.listed()
            assert [c.id for c in store.deleted()] == sorted(
                (id for id, known in self.known.items() if known.buried and not known.record_damaged), key=parse_id
            )
            assert store.holds() == self.holds
            for id, checkpoint in listed.items():
                if self.known[id].damaged:
                    with pytest.raises((IntegrityError, FormatError)):
                        read(store, checkpoint)
                else:
                    assert read(store, checkpoint) == dict(self.known[id].tensors)
            self.check_latest(store)

    def check_latest(self, store: Store) -> None:
        good = self.good()
        if good:
            assert store.resolve("latest").id == self.listed()[-1]
            assert flat(store.load("latest")) == dict(self.known[good[-1]].tensors)
            return
        with pytest.raises((IntegrityError, FormatError) if self.live() else NoCheckpointError):
            store.load("latest")

    def teardown(self) -> None:
        if not self.stores:
            return
        store = opened(self.raw.url)
        with silence():
            store.prune(grace_s=0)
            if self.raw.listing():
                report = store.verify()
                assert report.leftovers == []
                assert report.foreign == []
                assert {d.key for d in report.damages} == {
                    key for known in self.known.values() if not known.buried for key in known.damaged
                }
        self.drop(self.raw)


class FolderMachine(StoreMachine):
    """The same on the local storage; ``cp -r`` makes the copy."""

    def place(self) -> Raw:
        return FolderRaw(Path(tempfile.mkdtemp(dir=FAST if os.access(FAST, os.W_OK) else None)) / "store")

    def copied(self) -> Raw:
        assert isinstance(self.raw, FolderRaw)
        target = self.raw.path.with_name("copy")
        if self.raw.path.exists():
            shutil.copytree(self.raw.path, target)
        return FolderRaw(target)

    def drop(self, raw: Raw) -> None:
        assert isinstance(raw, FolderRaw)
        shutil.rmtree(raw.path if raw.path.name == "copy" else raw.path.parent, ignore_errors=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [StoreMachine, FolderMachine])
def test_any_history(machine: type[StoreMachine]) -> None:
    """As many histories as the profile says."""
    run_state_machine_as_test(machine, settings=settings())  # type: ignore[no-untyped-call]
