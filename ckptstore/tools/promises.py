"""Whether a storage keeps what the ``Storage`` contract promises, tried with small objects in a scratch folder."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ckptstore.errors import (
    ExistsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from ckptstore.format.layout import TEMPORARY
from ckptstore.storage import Capabilities, Storage

RACERS = 16
ROUNDS = 5
CREATES = 16
RACES_S = 10.0
"""No further race begins after so many seconds: there are servers where 16 writers of one key take some for each."""

# As large as a commit record can be: what is torn would be seen.
_RACE_BYTES = 16 << 10
_SMALL_BYTES = 4 << 10
# (first byte, length) of what is read of one such object: at its beginning, within, and beyond its end.
_SPANS = ((0, 10), (1, 1), (1000, 2000), (4000, 200))


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise, and whether it holds.

    Attributes:
        name: for scripts, as ``exclusive_create``.
        holds: False: it was seen broken, or the storage itself says that it doesn't give it.
        detail: what was seen.
    """

    name: str
    holds: bool
    detail: str


class Scratch:
    """A folder of its own on a storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.prefix = f"doctor-{secrets.token_hex(4)}/"
        self._keys: set[str] = set()

    def key(self, folder: str, name: str) -> str:
        """A key in ``folder`` of the scratch folder, to be removed at the end whether it comes to exist or not.

        Named like what interrupted writes leave, so that ``prune`` collects it if nobody else can.
        """
        key = f"{self.prefix}{folder}/{TEMPORARY}{name}"
        self._keys.add(key)
        return key

    def remove(self) -> None:
        """Remove everything, also what listings lose.

        Raises:
            StorageError: something may be left.
        """
        left = self._keys.copy()
        try:
            left.update(entry.key for entry in self.storage.list(self.prefix))
        except UnavailableError:
            # Nor could anything be deleted, and each try may take minutes.
            raise
        except StorageError:
            pass
        self.storage.delete(sorted(left))
        with suppress(StorageError):
            # Those of a writer were aborted by itself, as far as that could be; not everybody may list them.
            begun = self.storage.uploads()
            self.storage.abort_uploads([upload for upload in begun if upload.key.startswith(self.prefix)])


@contextmanager
def scratch(storage: Storage) -> Iterator[Scratch]:
    """A new scratch folder, gone with all that is in it when the block ends, however it ends."""
    place = Scratch(storage)
    try:
        yield place
    except StorageError:
        # That is what to tell: who may write nothing may remove nothing either.
        with suppress(StorageError):
            place.remove()
        raise
    except BaseException:
        place.remove()
        raise
    place.remove()


def durability(capabilities: Capabilities) -> list[Promise]:
    """What an acknowledged write survives. Only believed: nothing here can cut the power."""
    kind, level = capabilities.kind, capabilities.durability
    alone = f"{kind} is part of this process, and ends with it"
    proven = "the storage says so and took every flush; only a power cut can prove it"
    volatile = f"{kind} keeps what was acknowledged until the machine stops, and no longer"
    return [
        Promise("process_end", level != "none", alone if level == "none" else "the storage is no part of this process"),
        Promise("power_cut", level == "power-cut", {"power-cut": proven, "process-crash": volatile}.get(level, alone)),
    ]


def abilities(place: Scratch) -> list[Promise]:
    """Let the storage find out what it is able to do; read a part of an object, and create what exists.

    Raises:
        StorageError: the storage failed, or can't do what nothing works without.
    """
    storage = place.storage
    key, data = place.key("abilities", "object"), secrets.token_bytes(_SMALL_BYTES)
    storage.create(key, data)
    storage.probe(key, data)
    # In this order: the second may put other bytes there.
    return [_ranges(storage, key, data), _refusal(storage, key, data)]


def _ranges(storage: Storage, key: str, data: bytes) -> Promise:
    right = 0
    reader = storage.open_reader(key)
    try:
        for first, length in _SPANS:
            buffer = bytearray(length)
            expected = data[first : first + length]
            right += reader.read_into(first, memoryview(buffer)) == len(expected) and buffer.startswith(expected)
    finally:
        reader.close()
    detail = f"{right} of {len(_SPANS)} parts of an object came back as written"
    return Promise("read_ranges", right == len(_SPANS), detail)


def _refusal(storage: Storage, key: str, data: bytes) -> Promise:
    try:
        storage.create(key, data[::-1])
        refused = False
    except ExistsError:
        refused = True
    if not refused:
        return Promise("refuse_existing", False, "an object that exists was created once more")
    if _read(storage, key) != data:
        return Promise("refuse_existing", False, "it was refused, and the bytes changed")
    if not storage.capabilities.exclusive_create:
        kind = storage.capabilities.kind
        return Promise("refuse_existing", False, f"{kind} can't refuse by itself; only looking first helps")
    return Promise("refuse_existing", True, "an object that exists can't be created, and stays as it is")


def small_objects(place: Scratch) -> tuple[list[float], list[Promise]]:
    """Create, read, list and delete small objects: (seconds of each creation, promises).

    Raises:
        StorageError: the storage failed.
    """
    storage = place.storage
    created: dict[str, bytes] = {}
    create_s: list[float] = []
    unread = unlisted = 0
    for number in range(CREATES):
        key, data = place.key("small", f"{number:02d}"), secrets.token_bytes(_SMALL_BYTES)
        begin = time.perf_counter()
        storage.create(key, data)
        create_s.append(time.perf_counter() - begin)
        created[key] = data
        unread += _read(storage, key) != data
        unlisted += _listed(place) != {key: len(data) for key, data in created.items()}
    return create_s, [
        Promise("read_after_write", not unread, f"{CREATES - unread} of {CREATES} small objects came back as written"),
        Promise("list_after_write", not unlisted, f"{CREATES - unlisted} of {CREATES} listings had all that was there"),
        _deletion(place, created),
    ]


def _deletion(place: Scratch, created: Mapping[str, bytes]) -> Promise:
    """Delete every second object, twice: these are gone, the others are not, and the second time is no error."""
    storage = place.storage
    doomed, kept = list(created)[::2], list(created)[1::2]
    storage.delete(doomed)
    storage.delete(doomed)
    listed = _listed(place)
    gone = sum(key not in listed and _read(storage, key) is None for key in doomed)
    left = sum(_read(storage, key) == created[key] for key in kept)
    detail = f"{gone} of {len(doomed)} deleted objects are gone, and {left} of {len(kept)} others are left"
    return Promise("delete", gone == len(doomed) and left == len(kept), detail)


def _listed(place: Scratch) -> dict[str, int]:
    return {entry.key: entry.size for entry in place.storage.list(f"{place.prefix}small/")}


def _read(storage: Storage, key: str) -> bytes | None:
    """The object; None where nothing, or nothing whole, is there."""
    try:
        return storage.read(key, limit=_RACE_BYTES)
    except (NotFoundError, IntegrityError, FormatError):
        return None


@dataclass(frozen=True, slots=True)
class _Racer:
    """One that wanted the key: the bytes it brought, whether it won, and what it read right after that."""

    brought: bytes
    won: bool
    read: bytes | None


def racing(place: Scratch) -> list[Promise]:
    """16 threads want one key, several times: exactly one wins, its bytes are there, and nobody sees half of them.

    Raises:
        StorageError: the storage failed.
    """
    winners, torn, lost = [], 0, 0
    begin = time.monotonic()
    for number in range(ROUNDS):
        if number and time.monotonic() - begin > RACES_S:
            break
        key = place.key("race", f"{number:02d}")
        racers = _race(place.storage, key)
        won = [racer.brought for racer in racers if racer.won]
        winners.append(len(won))
        lost += _read(place.storage, key) not in won
        brought = {racer.brought for racer in racers}
        torn += sum(racer.read not in brought for racer in racers)
    capabilities = place.storage.capabilities
    return [_exclusive(winners, lost, capabilities), _atomic(torn, len(winners) * RACERS, capabilities)]


def _race(storage: Storage, key: str) -> list[_Racer]:
    start = threading.Barrier(RACERS)

    def run(data: bytes) -> _Racer:
        start.wait()
        won = True
        try:
            storage.create(key, data)
        except ExistsError:
            won = False
        return _Racer(data, won, _read(storage, key))

    with ThreadPoolExecutor(RACERS) as pool:
        try:
            racers = [pool.submit(run, secrets.token_bytes(_RACE_BYTES)) for _ in range(RACERS)]
            return [racer.result() for racer in racers]
        finally:
            # Where not all have come to the start, because of Ctrl-C, the others would wait there for ever.
            start.abort()


def _exclusive(winners: Sequence[int], lost: int, capabilities: Capabilities) -> Promise:
    rounds = len(winners)
    wrong = sorted({count for count in winners if count != 1})
    if wrong:
        races = sum(count != 1 for count in winners)
        counts = " or ".join(map(str, wrong))
        detail = f"in {races} of {rounds} races of {RACERS} threads not one won but {counts}"
    elif lost:
        detail = f"in {lost} of {rounds} races the winner's bytes are not what is there"
    else:
        plural = "" if rounds == 1 else "s"
        detail = f"{rounds} race{plural} of {RACERS} threads: one winner each, and its bytes are there"
    if not capabilities.exclusive_create:
        return Promise("exclusive_create", False, f"{capabilities.kind} doesn't decide who wins; {detail}")
    return Promise("exclusive_create", not wrong and not lost, detail)


def _atomic(torn: int, racers: int, capabilities: Capabilities) -> Promise:
    if not capabilities.atomic_create:
        return Promise(
            "atomic_create", False, f"on {capabilities.kind} a crash may leave a torn record, seen as damage"
        )
    if torn:
        return Promise("atomic_create", False, f"{torn} of {racers} racers read nothing or half an object")
    return Promise("atomic_create", True, f"none of {racers} racers read nothing or half an object")
