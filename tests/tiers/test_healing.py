"""Whatever is damaged on the primary, a good backup gives the bytes, and the primary is as it was before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from ckptstore.engine.damage import DamageWarning, FallbackWarning
from ckptstore.errors import IntegrityError
from tests.integrity.stores import GOOD, Forge, MemoryRaw, Raw, Source, Spec, State, Tensors, flat, save, silence, state
from tests.tiers.scenes import (
    Wanted,
    hook_backups,
    loads,
    memory,
    objects,
    opened_with,
    put_back,
    whole_alone,
)

BLOCK = 16 << 20
ENCODINGS = ["none", "zstd", "float-zstd"]
CODECS = {"none": "none", "zstd": "zstd", "float-zstd": "float-zstd"}


def floats(count: int, seed: int) -> bytes:
    """Numbers that both encodings make smaller."""
    found = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    # Half of the mantissa is zero, as in weights that were bfloat16 once.
    return (found.view(np.uint32) & 0xFFFF0000).tobytes()


def contents(*, large: bool, seed: int = 0) -> Tensors:
    """One byte, 300 KB, and a little more than a block."""
    made = {"tiny/x": bytes([seed + 7]), "middle/x": floats(75_000, seed)}
    return made | ({"large/x": floats((BLOCK + 40_000) // 4, seed)} if large else {})


def floating(tensors: Tensors) -> State:
    """A state of these, as float32 where there is more than a byte."""
    made = state(tensors)
    made.sources = [
        Source(Spec(it.spec.name, "F32", (len(it.data) // 4,)) if len(it.data) > 1 else it.spec, it.data)
        for it in made.sources
    ]
    return made


@dataclass
class Scene:
    """A primary and its backups, all of them whole; ``id`` is the newest checkpoint."""

    primary: MemoryRaw
    backups: Sequence[MemoryRaw]
    wanted: Wanted
    id: str

    def __post_init__(self) -> None:
        self.before = objects(self.primary)

    @property
    def keys(self) -> list[str]:
        """Every object that the newest checkpoint needs, or that tells of it."""
        own = [key for key in self.primary.listing() if self.id in key and not key.startswith("receipts/")]
        return [*own, "store.json"]

    def file(self, component: str, id: str | None = None) -> str:
        begin = f"checkpoints/{id or self.id}/{component}"
        return next(key for key in self.primary.listing() if key.startswith(begin))

    def load(self, **options: object) -> tuple[Tensors, list[str]]:
        """What a load of the newest gives, and what it warned of."""
        with opened_with(self.primary, *self.backups) as store, silence() as caught:
            loaded = flat(store.load(self.id, **options))
        return loaded, [str(one.message) for one in caught if issubclass(one.category, DamageWarning)]

    def heals(self) -> None:
        """A load gives the exact bytes, and then the primary is what it was, and suffices."""
        assert objects(self.primary) != self.before, "nothing is damaged"
        loaded, _ = self.load()
        assert loaded == dict(self.wanted[self.id])
        assert objects(self.primary) == self.before
        whole_alone(self.wanted, self.primary)

    def suffices(self) -> None:
        """A load reads nothing of a checkpoint from the backups."""
        calls: list[str] = []
        with opened_with(self.primary, *self.backups) as store:
            hook_backups(store, lambda call, key: calls.append(f"{call} {key}"))
            assert flat(store.load("latest")) == dict(self.wanted[self.id])
        assert calls, "the backup isn't watched"
        assert not [call for call in calls if "checkpoints/" in call and not call.startswith("list")]


def scene(encoding: str = "none", *, large: bool = False, backups: int = 1, steps: Sequence[int] = (1,)) -> Scene:
    primary, others = memory(), [memory() for _ in range(backups)]
    wanted = {}
    with opened_with(primary, *others, compression=encoding) as store:
        for step in steps:
            tensors = contents(large=large, seed=step)
            wanted[save(store, floating(tensors), step).id] = tensors
    made = Scene(primary, others, wanted, max(wanted))
    codecs = {block["codec"] for file in Forge(primary, made.id).part["files"] for block in file["blocks"]}
    assert CODECS[encoding] in codecs
    for other in others:
        assert whole_alone(wanted, other) == set(wanted)
    return made


def flip(raw: Raw, key: str, offset: int, bit: int = 0) -> None:
    data = bytearray(raw.get(key))
    data[offset] ^= 1 << bit
    raw.put(key, bytes(data))


def _cut(length: Callable[[int], int]) -> Callable[[MemoryRaw, str], None]:
    def change(raw: MemoryRaw, key: str) -> None:
        data = raw.get(key)
        raw.put(key, data[: length(len(data))])

    return change


CHANGES: dict[str, Callable[[MemoryRaw, str], None]] = {
    "first bit": lambda raw, key: flip(raw, key, 0),
    "last bit": lambda raw, key: flip(raw, key, -1, 7),
    "empty": _cut(lambda length: 0),
    "half": _cut(lambda length: length // 2),
    "one byte less": _cut(lambda length: length - 1),
    "longer": lambda raw, key: raw.put(key, raw.get(key) + b"\x00"),
    "zeroed": lambda raw, key: raw.put(key, bytes(len(raw.get(key)))),
    "deleted": lambda raw, key: raw.remove(key),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_object_damaged_in_every_way(encoding: str, full: bool) -> None:
    s = scene(encoding)
    # Two data files, part, manifest, commit record, store.json.
    assert len(s.keys) == 6
    for number, key in enumerate(s.keys):
        for change in [*CHANGES.values()][0 if full else number % 3 :: 1 if full else 3]:
            change(s.primary, key)
            s.heals()
    s.suffices()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_of_several_blocks(encoding: str, full: bool) -> None:
    s = scene(encoding, large=True)
    assert max(len(file["blocks"]) for file in Forge(s.primary, s.id).part["files"]) == 2
    for change in [*CHANGES.values()][:: 1 if full else 4]:
        change(s.primary, s.file("large"))
        s.heals()
    s.suffices()


def flips(seed: int, s: Scene, count: int) -> Iterator[tuple[str, int, int]]:
    """As many bits in each kind of object, small ones too."""
    choose = random.Random(seed)
    for number in range(count):
        key = s.keys[number % len(s.keys)]
        yield key, choose.randrange(len(s.primary.get(key))), choose.randrange(8)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_flipped_bits(encoding: str, full: bool) -> None:
    s = scene(encoding)
    count = 0
    for key, offset, bit in flips(3, s, 700 if full else 30):
        flip(s.primary, key, offset, bit)
        s.heals()
        count += 1
    assert count >= (700 if full else 30)
    s.suffices()


def test_everything_at_once() -> None:
    """All that the primary has of a checkpoint is damaged."""
    s = scene()
    for key in s.keys:
        CHANGES["zeroed"](s.primary, key)
    s.heals()
    s.suffices()


def test_first_backup_is_damaged_too() -> None:
    s = scene(large=True, backups=2)
    key = s.file("large")
    for raw in (s.primary, s.backups[0]):
        flip(raw, key, BLOCK + 5)
    s.heals()
    first, second = s.backups
    with opened_with(first, s.primary, second) as store:
        report = store.verify(repair=True, record=False)
    assert report.ok
    assert [(damage.key, damage.block) for damage in report.repaired] == [(key, 1)]
    assert whole_alone(s.wanted, first) == {s.id}


@pytest.mark.parametrize("how", ["a bit", "cut off"])
@pytest.mark.parametrize("where", ["primary first", "backup first"])
def test_damaged_at_different_places(where: str, how: str) -> None:
    """Neither has the file, and together they have it: each is made whole by the other."""
    s = scene(large=True)
    key, backup = s.file("large"), s.backups[0]
    begin, end = (s.primary, backup) if where == "primary first" else (backup, s.primary)
    flip(begin, key, 5000)
    if how == "a bit":
        flip(end, key, BLOCK + 5)
    else:
        end.put(key, end.get(key)[: BLOCK + 5])
    s.heals()
    with opened_with(backup, s.primary) as store:
        report = store.verify(repair=True, record=False)
    assert report.ok
    assert {damage.key for damage in report.repaired} == {key}
    assert whole_alone(s.wanted, backup) == {s.id}


@pytest.mark.parametrize("how", ["first bit", "half", "deleted", "zeroed"])
@pytest.mark.parametrize("component", ["middle", "part-", "manifest"])
def test_damaged_everywhere(component: str, how: str) -> None:
    """``latest`` is the one before; by its id there is an error; and nothing is made worse."""
    s = scene(steps=(1, 2))
    key = s.file(component)
    for raw in (s.primary, *s.backups):
        CHANGES[how](raw, key)
    damaged = [objects(raw) for raw in (s.primary, *s.backups)]
    with opened_with(s.primary, *s.backups) as store, silence() as caught:
        with pytest.raises(IntegrityError, match=s.id):
            store.load(s.id)
        assert flat(store.load("latest")) == dict(s.wanted[min(s.wanted)])
        report = store.verify(repair=True, record=False)
    assert [one for one in caught if issubclass(one.category, FallbackWarning) and s.id in str(one.message)]
    assert {damage.key for damage in report.damages} == {key}
    assert not report.repaired
    assert [objects(raw) for raw in (s.primary, *s.backups)] == damaged


def test_commit_record_damaged_everywhere() -> None:
    s = scene(steps=(1, 2))
    key = f"commits/{s.id}.json"
    for raw in (s.primary, *s.backups):
        CHANGES["half"](raw, key)
    damaged = [objects(raw) for raw in (s.primary, *s.backups)]
    with opened_with(s.primary, *s.backups) as store, silence() as caught:
        assert flat(store.load("latest")) == dict(s.wanted[min(s.wanted)])
        assert {damage.key for damage in store.verify(repair=True, record=False).damages} == {key}
    assert [one for one in caught if issubclass(one.category, FallbackWarning) and s.id in str(one.message)]
    assert [objects(raw) for raw in (s.primary, *s.backups)] == damaged


@pytest.mark.parametrize("component", ["tiny", "middle", "part-", "manifest"])
def test_only_looked_at(component: str) -> None:
    """The bytes come from the backup, and nothing is repaired; a warning says so."""
    s = scene()
    CHANGES["first bit"](s.primary, s.file(component))
    damaged = objects(s.primary)
    with opened_with(s.primary, *s.backups, read_only=True) as store, silence() as caught:
        assert flat(store.load("latest")) == dict(s.wanted[s.id])
    told = [str(one.message) for one in caught if issubclass(one.category, DamageWarning)]
    assert len(told) == 1
    assert s.file(component) in told[0]
    assert "Nothing was repaired" in told[0]
    assert objects(s.primary) == damaged


def test_a_part_of_the_state() -> None:
    """What is read is repaired, the file as a whole; what isn't read stays as it is."""
    s = scene(large=True)
    flip(s.primary, s.file("large"), BLOCK + 5)
    CHANGES["first bit"](s.primary, s.file("tiny"))
    with opened_with(s.primary, *s.backups) as store, silence() as caught:
        loaded = flat(store.load("latest", only=["large/*"]))
    assert loaded["large/x"] == s.wanted[s.id]["large/x"]
    assert [one for one in caught if "it is repaired" in str(one.message)]
    assert s.primary.get(s.file("large")) == s.before[s.file("large")]
    assert s.primary.get(s.file("tiny")) != s.before[s.file("tiny")]
    s.heals()


@pytest.mark.parametrize("change", CHANGES)
def test_a_borrowed_file(change: str) -> None:
    """Repaired by a load of who borrows it, where its owner has it."""
    primary, backup = memory(), memory()
    tensors = {**GOOD, "base/w": b"frozen" * 5000}
    wanted = {}
    with opened_with(primary, backup) as store:
        for step in (1, 2):
            made = state({**tensors, "model/b": b"%d" % step})
            for source in made.sources:
                source.frozen = source.spec.name == "base/w"
            wanted[save(store, made, step).id] = {**tensors, "model/b": b"%d" % step}
    s = Scene(primary, [backup], wanted, max(wanted))
    key = s.file("base", min(wanted))
    assert not [it for it in primary.listing() if it.startswith(f"checkpoints/{s.id}/base")]
    CHANGES[change](primary, key)
    s.heals()
    s.suffices()


def test_what_a_repairing_verify_tells() -> None:
    s = scene(large=True, steps=(1, 2))
    older = min(s.wanted)
    large, part, commit = s.file("large"), s.file("part-", older), f"commits/{s.id}.json"
    lost = s.file("middle", older)
    for offset in (5000, BLOCK + 5):
        flip(s.primary, large, offset)
    CHANGES["zeroed"](s.primary, part)
    CHANGES["half"](s.primary, "store.json")
    with opened_with(s.primary, *s.backups) as store, silence():
        before = store.verify(record=False)
        assert {(damage.key, damage.block) for damage in before.damages} == {
            (large, 0),
            (large, 1),
            (part, None),
            ("store.json", None),
        }
        report = store.verify(repair=True, record=False)
    assert report.ok
    assert not report.damages
    assert {(damage.key, damage.block) for damage in report.repaired} == {
        (damage.key, damage.block) for damage in before.damages
    }
    assert [damage.id for damage in report.repaired if damage.key == large] == [s.id, s.id]
    assert [one.checkpoint.id for one in report.checkpoints] == sorted(s.wanted)
    assert objects(s.primary) == s.before
    # What is good nowhere is told as damage, and the rest is repaired all the same.
    CHANGES["half"](s.primary, commit)
    for raw in (s.primary, *s.backups):
        CHANGES["first bit"](raw, lost)
    with opened_with(s.primary, *s.backups) as store, silence():
        report = store.verify(repair=True, record=False)
    assert [(damage.key, damage.block) for damage in report.damages] == [(lost, 0)]
    assert [damage.key for damage in report.repaired] == [commit]
    assert s.primary.get(commit) == s.before[commit]


def test_a_load_of_what_is_taken_away_meanwhile_repairs_nothing() -> None:
    """It goes on with the backup's bytes, and the files don't come back as leftovers."""
    s = scene(steps=(1, 2))
    older = min(s.wanted)
    with opened_with(s.primary, *s.backups) as store:
        known = store.resolve(older)
        with silence() as caught, store.loading(known, None) as loader:
            for key in [key for key in s.primary.listing() if older in key]:
                s.primary.remove(key)
            assert flat(loader.plain(known, None)) == dict(s.wanted[older])
    assert not caught
    assert not [key for key in s.primary.listing() if older in key and "receipts/" not in key]


def test_a_primary_that_lost_all_but_a_damaged_store_json() -> None:
    s = scene()
    put_back(s.primary, {"store.json": s.before["store.json"][:20]})
    assert s.load()[0] == dict(s.wanted[s.id])
    assert whole_alone(s.wanted, s.primary) == {s.id}
    loads(s.wanted, s.primary)
