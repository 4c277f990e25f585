"""Killed at every change of a copy, a repair, an eviction and a return: nothing is lost, and the next try ends it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckptstore.engine.backups import Backups
from ckptstore.engine.catalogue import Checkpoint, Damage
from ckptstore.engine.finder import Finder
from ckptstore.engine.rescue import Rescuer
from ckptstore.maintenance.evict import evict
from ckptstore.maintenance.repair import Repairer
from ckptstore.maintenance.verify import prove
from ckptstore.policy.rules import last
from ckptstore.storage.base import Storage
from ckptstore.store import Store
from tests.integrity.crash import Crash, CrashingStorage
from tests.integrity.stores import POOL, Raw, opened, save, silence, state
from tests.tiers.scenes import (
    CARRIER,
    Objects,
    Wanted,
    folder,
    loads,
    memory,
    objects,
    opened_with,
    put_back,
    replicator,
    storage_of,
    tidy,
    whole_alone,
)


@dataclass
class Scene:
    """Places, what lay in them at the beginning, and the checkpoints that exist; the first place is the primary."""

    places: Sequence[Raw]
    wanted: Wanted
    before: list[Objects] = field(init=False)

    def __post_init__(self) -> None:
        self.keep()

    def keep(self) -> None:
        """This is how it is at the beginning."""
        self.before = [objects(raw) for raw in self.places]

    def begin(self) -> None:
        for raw, before in zip(self.places, self.before, strict=True):
            put_back(raw, before)

    @property
    def ids(self) -> list[str]:
        return sorted(self.wanted)


def points(scene: Scene, place: Raw, operate: Callable[[Storage], object]) -> int:
    """How many changes an undisturbed ``operate`` makes to ``place``."""
    scene.begin()
    counting = CrashingStorage(storage_of(place), 1 << 40, after=False)
    operate(counting)
    assert not counting.dead
    return (1 << 40) - counting.left


def each_crash(
    scene: Scene, place: Raw, operate: Callable[[Storage], object], *, at_least: int, every: int = 1
) -> Iterator[str]:
    """Kill ``operate`` before and after each change that it makes to ``place``, and let the caller look."""
    count = points(scene, place, operate)
    assert count >= at_least, f"only {count} changes"
    for at, after in itertools.product(range(1, count + 1, every), (False, True)):
        scene.begin()
        storage = CrashingStorage(storage_of(place), at, after=after)
        with pytest.raises(Crash):
            operate(storage)
        assert storage.dead
        yield f"{'after' if after else 'before'} change {at} of {count}"


# --- what is copied ---


@pytest.fixture(params=["memory", "folder"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Raw, Raw]:
    """Two places."""
    if request.param == "memory":
        return memory(), memory()
    return folder(tmp_path / "primary"), folder(tmp_path / "backup")


@pytest.fixture
def every(request: pytest.FixtureRequest, full: bool) -> int:
    """Every point, or a sample: more in memory, where they cost little, than on the disk."""
    return 1 if full else 2 if "memory" in request.node.name else 9


TEXT = b"compresses well " * 4000


def tensors_of(step: int) -> dict[str, bytes]:
    """One file that never changes, and two that do."""
    return {"base/w": b"frozen" * 5000, "model/w": b"%d " % step * 100, "optimizer/m": b"m%d " % step * 100}


def save_tuned(store: Store, step: int) -> Checkpoint:
    made = state(tensors_of(step))
    for source in made.sources:
        source.frozen = source.spec.name == "base/w"
    return save(store, made, step)


def fill(raw: Raw) -> Wanted:
    """Three checkpoints: files of its own, files borrowed from that one, and encoded ones; and what they hold."""
    wanted = {}
    with opened(raw.url) as store:
        for step in (1, 2):
            saved = save_tuned(store, step)
            assert bool(saved.record.lenders) == (step == 2)
            wanted[saved.id] = tensors_of(step)
    with opened(raw.url, compression="zstd") as store:
        tensors = {"model/w": TEXT, "model/b": b"b", "optimizer/m": TEXT[::-1]}
        wanted[save(store, state(tensors), 3).id] = tensors
    return wanted


def copying(primary: Raw, number: int) -> Callable[[Storage], object]:
    """Copy all that a backup lacks, as writer ``number``."""
    return lambda backup: replicator(storage_of(primary), backup, number=number)._round()


def ends_well(scene: Scene, again: Callable[[Storage], object], place: Raw) -> None:
    """Another process does the same once more: all is in every place, and nothing else is."""
    again(storage_of(place))
    for raw in scene.places:
        assert sorted(whole_alone(scene.wanted, raw)) == scene.ids
        tidy(raw)
        assert sorted(whole_alone(scene.wanted, raw)) == scene.ids


def test_copy_to_an_empty_place(two: tuple[Raw, Raw], every: int) -> None:
    primary, backup = two
    scene = Scene(two, fill(primary))
    for _ in each_crash(scene, backup, copying(primary, 2), at_least=35, every=every):
        assert sorted(whole_alone(scene.wanted, primary)) == scene.ids
        if "store.json" in backup.listing():
            whole_alone(scene.wanted, backup)
        loads(scene.wanted, primary, backup)
        ends_well(scene, copying(primary, 3), backup)


def test_copy_broken_off_and_pruned(two: tuple[Raw, Raw], every: int) -> None:
    """What a broken copy left is collected in the backup: nothing that is whole there goes, nor anything here."""
    primary, backup = two
    scene = Scene(two, fill(primary))
    for _ in each_crash(scene, backup, copying(primary, 2), at_least=35, every=max(2, every)):
        if "store.json" not in backup.listing():
            continue
        there = whole_alone(scene.wanted, backup)
        tidy(backup)
        assert whole_alone(scene.wanted, backup) == there
        assert sorted(whole_alone(scene.wanted, primary)) == scene.ids


def half_copied(primary: Raw, backup: Raw) -> Scene:
    """The backup has one checkpoint, and of the others whole, cut off, changed, overlong and zeroed objects."""
    wanted = fill(primary)
    replicator(storage_of(primary), storage_of(backup), number=2)._round()
    _, second, third = sorted(wanted)
    for id in (second, third):
        backup.remove(f"commits/{id}.json")
    backup.remove(f"checkpoints/{third}/manifest.json")

    def damage(key: str, change: Callable[[bytes], bytes]) -> None:
        backup.put(key, change(backup.get(key)))

    damage(f"checkpoints/{second}/optimizer.safetensors", lambda data: data[:50])
    damage(f"checkpoints/{second}/manifest.json", lambda data: b"\x00" * len(data))
    damage(f"checkpoints/{third}/model.blocks", lambda data: data + b"more")
    damage(f"checkpoints/{third}/optimizer.blocks", lambda data: bytes([data[0] ^ 1]) + data[1:])
    damage(f"checkpoints/{third}/part-00000.json", lambda data: data[:-1])
    return Scene((primary, backup), wanted)


def test_copy_over_what_was_copied_in_part(two: tuple[Raw, Raw], every: int) -> None:
    primary, backup = two
    scene = half_copied(primary, backup)
    first = scene.ids[0]
    for _ in each_crash(scene, backup, copying(primary, 3), at_least=25, every=every):
        assert first in whole_alone(scene.wanted, backup)
        assert sorted(whole_alone(scene.wanted, primary)) == scene.ids
        ends_well(scene, copying(primary, 4), backup)


# --- repairs ---


def repair(backup: Raw, id: str) -> Callable[[Storage], object]:
    """Repair what is damaged of ``id``, as ``verify(repair=True)`` does."""

    def act(primary: Storage) -> None:
        repairer = Repairer(primary, [storage_of(backup)], CARRIER)
        finder = Finder(primary, read_only=False)
        with silence():
            catalogue = finder.scan(afresh=True)
        store_id = catalogue.store_id
        repairer.records([*catalogue.damaged, *([] if finder.store_record() else [STORE])], store_id)
        chosen = [c for c in finder.scan(afresh=True).checkpoints if c.id == id]
        with closing(Rescuer(repairer.others)) as rescuer:
            prove(primary, chosen, rescuer, pool=POOL, threads=1)
        assert not repairer.noted(rescuer)

    return act


STORE = Damage("store.json", "damaged")

CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: bytes([data[0] ^ 4]) + data[1:],
    "cut off": lambda data: data[: len(data) // 2],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["file", "borrowed", "encoded", "part", "manifest", "commit", "store"])
def test_repair(two: tuple[Raw, Raw], every: int, kind: str, change: str) -> None:
    primary, backup = two
    wanted = fill(primary)
    replicator(storage_of(primary), storage_of(backup), number=2)._round()
    first, second, third = sorted(wanted)
    key, id = {
        "file": (f"checkpoints/{second}/optimizer.safetensors", second),
        "borrowed": (f"checkpoints/{first}/base-frozen.safetensors", second),
        "encoded": (f"checkpoints/{third}/optimizer.blocks", third),
        "part": (f"checkpoints/{second}/part-00000.json", second),
        "manifest": (f"checkpoints/{third}/manifest.json", third),
        "commit": (f"commits/{third}.json", third),
        "store": ("store.json", third),
    }[kind]
    primary.put(key, CHANGES[change](primary.get(key)))
    scene = Scene(two, wanted)
    # A file is reserved, written, finished and exchanged; a record is created and exchanged.
    at_least = 4 if kind in ("file", "borrowed", "encoded") else 2
    for _ in each_crash(scene, primary, repair(backup, id), at_least=at_least, every=1 if every == 1 else 2):
        loads(wanted, primary, backup)
        with opened(primary.url, read_only=True) as store, silence():
            assert {damage.key for damage in store.verify().damages} <= {key}
        assert sorted(whole_alone(wanted, backup)) == scene.ids
        ends_well(scene, repair(backup, id), primary)


# --- letting go ---


def letting_go(*backups: Raw) -> Callable[[Storage], object]:
    def act(primary: Storage) -> None:
        finder = Finder(primary, Backups([storage_of(raw) for raw in backups]), read_only=False)
        evict(primary, finder, last(1), threading.RLock())

    return act


def in_three_places(tmp_path: Path, kind: str) -> Scene:
    places = [memory() for _ in range(3)] if kind == "memory" else [folder(tmp_path / f"p{n}") for n in range(3)]
    primary, *backups = places
    wanted = fill(primary)
    for backup in backups:
        replicator(storage_of(primary), storage_of(backup), number=2)._round()
    return Scene(places, wanted)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_letting_go(tmp_path: Path, every: int, kind: str) -> None:
    scene = in_three_places(tmp_path, kind)
    primary, *backups = scene.places
    newest = scene.ids[-1]
    operate = letting_go(*backups)
    for point in each_crash(scene, primary, operate, at_least=10, every=every):
        assert newest in whole_alone(scene.wanted, primary), point
        loads(scene.wanted, primary, *backups)
        operate(storage_of(primary))
        assert whole_alone(scene.wanted, primary) == {newest}
        assert not [key for key in primary.listing() if key.startswith("trash/")]
        for raw in scene.places:
            tidy(raw)
        assert whole_alone(scene.wanted, primary) == {newest}
        for backup in backups:
            assert sorted(whole_alone(scene.wanted, backup)) == scene.ids
        loads(scene.wanted, primary, *backups)


def test_letting_go_and_pruned_before_it_is_done_again(tmp_path: Path) -> None:
    """A prune comes in between: what the backups have is seen all the same."""
    scene = in_three_places(tmp_path, "memory")
    primary, *backups = scene.places
    for _ in each_crash(scene, primary, letting_go(*backups), at_least=10):
        tidy(primary)
        loads(scene.wanted, primary, *backups)
        letting_go(*backups)(storage_of(primary))
        assert whole_alone(scene.wanted, primary) == {scene.ids[-1]}
        loads(scene.wanted, primary, *backups)


def test_deleted_stays_deleted(tmp_path: Path) -> None:
    """As opposed to what was let go: the tombstones look alike."""
    scene = in_three_places(tmp_path, "memory")
    primary, *backups = scene.places
    first = scene.ids[0]
    with opened_with(primary, *backups) as store:
        store.delete(first)
        store.prune(grace_s=0)
        assert [c.id for c in store.checkpoints()] == scene.ids[1:]
    letting_go(*backups)(storage_of(primary))
    with opened_with(primary, *backups) as store:
        assert [c.id for c in store.checkpoints()] == scene.ids[1:]
        assert first not in [c.id for c in store.deleted()]


# --- back to a primary that was lost ---


def bringing_back(backup: Raw, *, newest_first: bool = True) -> Callable[[Storage], object]:
    def act(primary: Storage) -> None:
        found = Finder(storage_of(backup), read_only=True).scan().checkpoints
        back = replicator(primary, storage_of(backup))
        back._missed += reversed(found) if newest_first else found
        back._round()

    return act


def test_bringing_back(two: tuple[Raw, Raw], every: int) -> None:
    primary, backup = two
    wanted = fill(primary)
    replicator(storage_of(primary), storage_of(backup), number=2)._round()
    put_back(primary, {})
    scene = Scene(two, wanted)
    for _ in each_crash(scene, primary, bringing_back(backup), at_least=35, every=every):
        assert sorted(whole_alone(wanted, backup)) == scene.ids
        if "store.json" in primary.listing():
            whole_alone(wanted, primary)
            loads(wanted, primary, backup)
        with opened_with(primary, backup) as store, silence():
            store.load("latest")
        again = bringing_back(backup)
        ends_well(scene, again, primary)


def test_a_lost_primary_is_filled_by_loading(two: tuple[Raw, Raw]) -> None:
    primary, backup = two
    wanted = fill(primary)
    replicator(storage_of(primary), storage_of(backup), number=2)._round()
    put_back(primary, {})
    with opened_with(primary, backup) as store:
        store.load("latest")
    assert whole_alone(wanted, primary) == set(wanted)
