"""What every backend must do. A backend's test file subclasses ``StorageContract`` and supplies the fixtures.

``raw`` reaches the objects past the code under test.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest

from ckptstore.errors import ExistsError, FormatError, NotFoundError, StorageError
from ckptstore.storage import ObjectWriter, Storage

BAD_KEYS = [
    *("", ".", "..", "/", "/etc/passwd", "a/../b", "../a", "a/..", "a//b", "a/", "a/./b", ".hidden", "-dash", "_under"),
    *("a\0b", "a\\b", "..\\a", "a b", "a\n", "é", "\N{FULLWIDTH FULL STOP}", "a:b", "c:/x", "a*", "x" * 201),
]


class Raw(Protocol):
    """The objects as they lie there."""

    def get(self, key: str) -> bytes: ...
    def put(self, key: str, data: bytes) -> None: ...
    def keys(self) -> list[str]: ...


def write_object(storage: Storage, key: str, pieces: list[bytes], *, sized: bool = False) -> int:
    """Write ``pieces`` as the slots of one object, in order."""
    writer = storage.open_writer(key, size=sum(map(len, pieces)) if sized else None)
    for piece in pieces:
        writer.write(writer.reserve(len(piece)), memoryview(piece))
    return writer.finish()


def read_object(storage: Storage, key: str) -> bytes:
    """Read an object whole through a reader."""
    reader = storage.open_reader(key)
    buffer = bytearray(reader.size)
    assert reader.read_into(0, memoryview(buffer)) == reader.size
    reader.close()
    return bytes(buffer)


class StorageContract:
    rounds = 25
    """Of the race for one key; fewer where a server takes seconds for each."""

    # --- small objects ---

    def test_created_bytes_are_there_and_come_back(self, storage: Storage, raw: Raw) -> None:
        storage.create("commits/one.json", b"first")

        assert raw.get("commits/one.json") == b"first"
        assert storage.read("commits/one.json", limit=100) == b"first"
        assert raw.keys() == ["commits/one.json"]

    @pytest.mark.parametrize("data", [b"", b"\0", bytes(range(256)) * 400])
    def test_any_bytes_come_back(self, storage: Storage, data: bytes) -> None:
        storage.create("a", data)

        assert storage.read("a", limit=len(data)) == data
        assert storage.size("a") == len(data)

    def test_create_never_overwrites(self, storage: Storage, raw: Raw) -> None:
        raw.put("a/b", b"theirs")

        with pytest.raises(ExistsError) as caught:
            storage.create("a/b", b"mine")

        assert caught.value.key == "a/b"
        assert raw.get("a/b") == b"theirs"
        assert raw.keys() == ["a/b"]

    def test_exactly_one_of_many_racers_creates(self, storage: Storage, raw: Raw) -> None:
        """16 threads want one key, again and again: one wins, its bytes are there, the others are told."""
        racers, rounds = 16, self.rounds
        barrier = threading.Barrier(racers)

        def race(racer: int, round: int) -> bool:
            barrier.wait()
            try:
                storage.create(f"commits/{round}", f"racer {racer}".encode() * 50)
            except ExistsError:
                return False
            return True

        with ThreadPoolExecutor(racers) as pool:
            for round in range(rounds):
                won = list(pool.map(race, range(racers), [round] * racers))
                assert won.count(True) == 1
                assert raw.get(f"commits/{round}") == f"racer {won.index(True)}".encode() * 50
        assert len(raw.keys()) == rounds

    def test_limit_is_the_largest_size_that_is_read(self, storage: Storage, raw: Raw) -> None:
        raw.put("a", b"12345")

        assert storage.read("a", limit=5) == b"12345"
        with pytest.raises(FormatError, match="at most 4") as caught:
            storage.read("a", limit=4)
        assert caught.value.key == "a"

    def test_missing_objects_are_not_found(self, storage: Storage) -> None:
        for ask in (
            lambda: storage.read("no/such", limit=9),
            lambda: storage.size("no/such"),
            lambda: storage.open_reader("no/such"),
        ):
            with pytest.raises(NotFoundError) as caught:
                ask()
            assert caught.value.key == "no/such"

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused_everywhere(self, storage: Storage, raw: Raw, key: str) -> None:
        for use in (
            lambda: storage.create(key, b"x"),
            lambda: storage.open_writer(key),
            lambda: storage.open_reader(key),
            lambda: storage.read(key, limit=9),
            lambda: storage.size(key),
        ):
            with pytest.raises(StorageError, match="no valid key"):
                use()
        if not key.endswith("/") or key == "/":
            with pytest.raises(StorageError):
                storage.delete([key])
        assert raw.keys() == []

    def test_longest_name_is_accepted(self, storage: Storage) -> None:
        storage.create("x" * 200, b"")

        assert storage.size("x" * 200) == 0

    # --- listing ---

    def test_list_is_sorted_and_complete(self, storage: Storage, raw: Raw) -> None:
        keys = ["a", "b/c", "b/d/e", "b/tmp-123", "b-c", "c/x"]
        for key in reversed(keys):
            raw.put(key, key.encode())
        before = time.time() - 60

        found = storage.list("")

        assert [entry.key for entry in found] == sorted(keys)
        assert [entry.size for entry in found] == [len(key) for key in sorted(keys)]
        assert all(before < entry.modified < time.time() + 60 for entry in found)

    def test_list_of_a_folder_is_that_folder(self, storage: Storage, raw: Raw) -> None:
        for key in ("a/b", "a/c/d", "ab/c", "a-b"):
            raw.put(key, b"")

        assert [entry.key for entry in storage.list("a/")] == ["a/b", "a/c/d"]
        assert [entry.key for entry in storage.list("a/c/")] == ["a/c/d"]
        assert storage.list("no/such/") == []

    @pytest.mark.parametrize("prefix", ["a", "../", "/", "a//", "a/../", "\0/"])
    def test_list_refuses_what_is_no_folder(self, storage: Storage, prefix: str) -> None:
        with pytest.raises(StorageError, match="no folder to list"):
            storage.list(prefix)

    # --- large objects ---

    @pytest.mark.parametrize("sized", [True, False])
    @pytest.mark.parametrize("lengths", [[], [0], [1], [4096], [4095, 1, 4097, 0, 12_288, 5], [100_000, 4096, 8192, 3]])
    def test_slots_follow_each_other_without_gaps(
        self, storage: Storage, raw: Raw, lengths: list[int], sized: bool
    ) -> None:
        pieces = [random.Random(i).randbytes(length) for i, length in enumerate(lengths)]

        size = write_object(storage, "d/file", pieces, sized=sized)

        assert size == sum(lengths) == storage.size("d/file")
        assert raw.get("d/file") == b"".join(pieces) == read_object(storage, "d/file")

    @pytest.mark.parametrize("sized", [True, False])
    def test_slots_may_be_written_by_threads_in_any_order(self, storage: Storage, raw: Raw, sized: bool) -> None:
        """Lengths that are no multiple of a page, so that neighbours share pages."""
        generator = random.Random(7)
        pieces = [generator.randbytes(generator.randrange(1, 20_000)) for _ in range(200)]
        writer = storage.open_writer("d/file", size=sum(map(len, pieces)) if sized else None)
        slots = [writer.reserve(len(piece)) for piece in pieces]
        order = generator.sample(range(200), 200)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: writer.write(slots[i], memoryview(pieces[i])), order))
        writer.finish()

        assert [slot.offset for slot in slots] == [sum(map(len, pieces[:i])) for i in range(200)]
        assert raw.get("d/file") == b"".join(pieces)

    def test_size_may_be_larger_or_smaller_than_what_comes(self, storage: Storage, raw: Raw) -> None:
        for key, size in (("more", 3), ("less", 1_000_000)):
            writer = storage.open_writer(key, size=size)
            writer.write(writer.reserve(9000), memoryview(b"x" * 9000))

            assert writer.finish() == 9000
            assert raw.get(key) == b"x" * 9000

    def test_writer_keeps_its_own_bytes(self, storage: Storage, raw: Raw) -> None:
        """The caller reuses its buffer after ``write``."""
        buffer, writer = bytearray(b"a" * 5000), storage.open_writer("a", size=5000)
        writer.write(writer.reserve(5000), memoryview(buffer))
        buffer[:] = b"b" * 5000
        writer.finish()

        assert raw.get("a") == b"a" * 5000

    def test_writer_refuses_a_taken_key(self, storage: Storage, raw: Raw) -> None:
        raw.put("a/b", b"theirs")

        with pytest.raises(ExistsError):
            storage.open_writer("a/b", size=10)

        assert raw.get("a/b") == b"theirs"

    @pytest.mark.parametrize("act", ["missing slot", "wrong length"])
    def test_incomplete_object_is_not_finished(self, storage: Storage, raw: Raw, act: str) -> None:
        writer = storage.open_writer("a/b", size=10)
        slot = writer.reserve(10)
        if act == "wrong length":
            with pytest.raises(StorageError, match="9 bytes for a slot of 10"):
                writer.write(slot, memoryview(b"123456789"))

        with pytest.raises(StorageError):
            writer.finish()

        self._assert_dead(writer)
        writer.abort()
        assert raw.keys() == []

    def _assert_dead(self, writer: ObjectWriter) -> None:
        with pytest.raises(StorageError, match="already"):
            writer.write(writer.reserve(1), memoryview(b"x"))

    @pytest.mark.parametrize("size", [None, 100_000])
    def test_abort_leaves_nothing(self, storage: Storage, raw: Raw, size: int | None) -> None:
        writer = storage.open_writer("a/b/c", size=size)
        writer.write(writer.reserve(10_000), memoryview(b"x" * 10_000))

        writer.abort()
        writer.abort()

        assert raw.keys() == []
        assert storage.list("") == []
        self._assert_dead(writer)
        assert write_object(storage, "a/b/c", [b"again"]) == 5

    def test_abort_after_finish_does_nothing(self, storage: Storage, raw: Raw) -> None:
        writer = storage.open_writer("a")
        writer.finish()
        writer.abort()

        assert raw.get("a") == b""
        self._assert_dead(writer)

    # --- reading ---

    def test_reads_at_any_offset_and_length(self, storage: Storage, raw: Raw) -> None:
        data = random.Random(3).randbytes(50_000)
        raw.put("a", data)
        reader = storage.open_reader("a")

        for offset, length in [(0, 50_000), (0, 4096), (4096, 8192), (1, 4096), (4095, 2), (40_960, 4096), (7, 0)]:
            buffer = bytearray(length)
            assert reader.read_into(offset, memoryview(buffer)) == length
            assert bytes(buffer) == data[offset : offset + length]

    def test_reading_beyond_the_end_is_short(self, storage: Storage, raw: Raw) -> None:
        raw.put("a", b"x" * 5000)
        reader = storage.open_reader("a")
        buffer = bytearray(8192)

        assert reader.size == 5000
        assert reader.read_into(0, memoryview(buffer)) == 5000
        assert buffer == b"x" * 5000 + bytes(3192)
        assert reader.read_into(4096, memoryview(buffer)) == 904
        assert reader.read_into(5000, memoryview(buffer)) == 0
        assert reader.read_into(90_000, memoryview(buffer)) == 0

    def test_open_reader_survives_deletion(self, storage: Storage, raw: Raw) -> None:
        raw.put("a", b"x" * 5000)
        reader = storage.open_reader("a")
        storage.delete(["a"])
        buffer = bytearray(5000)

        assert reader.read_into(0, memoryview(buffer)) == 5000
        assert buffer == b"x" * 5000

    def test_closed_reader_refuses(self, storage: Storage, raw: Raw) -> None:
        raw.put("a", b"x")
        reader = storage.open_reader("a")
        reader.close()
        reader.close()

        with pytest.raises(StorageError, match="closed"):
            reader.read_into(0, memoryview(bytearray(1)))

    # --- deletion ---

    def test_delete_removes_exactly_what_is_named(self, storage: Storage, raw: Raw) -> None:
        for key in ("a/b", "a/c", "d/e/f", "g"):
            raw.put(key, b"")

        storage.delete(["a/b", "d/e/f", "g"])

        assert raw.keys() == ["a/c"]
        assert [entry.key for entry in storage.list("")] == ["a/c"]

    def test_delete_again_is_no_error(self, storage: Storage, raw: Raw) -> None:
        raw.put("a/b", b"")

        storage.delete(["a/b", "no/such", "nothing"])
        storage.delete(["a/b", "a/", "no/such/", "no/"])
        storage.delete([])

        assert raw.keys() == []

    def test_one_bad_key_deletes_nothing(self, storage: Storage, raw: Raw) -> None:
        raw.put("a", b"")

        with pytest.raises(StorageError, match="no valid key"):
            storage.delete(["a", "../a"])

        assert raw.keys() == ["a"]

    def test_creating_while_neighbours_are_deleted(self, storage: Storage) -> None:
        """A folder that is removed as empty at the wrong moment doesn't make ``create`` fail."""
        failures: list[Exception] = []

        def churn(worker: int) -> None:
            try:
                for i in range(60):
                    storage.create(f"a/b/{worker}-{i}", b"x")
                    storage.list("")
                    storage.delete([f"a/b/{worker}-{i}"])
            except Exception as error:
                failures.append(error)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(churn, range(4)))

        assert failures == []
        assert storage.list("") == []

    # --- repairing, and finding out ---

    def test_replace_puts_the_one_in_the_place_of_the_other(self, storage: Storage, raw: Raw) -> None:
        raw.put("a/x", b"bad")
        raw.put("a/tmp-heal", b"good bytes")

        storage.replace("a/x", by="a/tmp-heal")

        assert raw.get("a/x") == b"good bytes"
        assert raw.keys() == ["a/x"]

    def test_replace_puts_back_what_is_gone(self, storage: Storage, raw: Raw) -> None:
        raw.put("a/tmp-heal", b"good")

        storage.replace("a/x", by="a/tmp-heal")

        assert raw.get("a/x") == b"good"
        assert raw.keys() == ["a/x"]

    def test_replace_by_nothing_changes_nothing(self, storage: Storage, raw: Raw) -> None:
        raw.put("a/x", b"bad")

        with pytest.raises(NotFoundError):
            storage.replace("a/x", by="a/none")
        assert raw.get("a/x") == b"bad"

    def test_probing_leaves_everything_as_it_was(self, storage: Storage, raw: Raw) -> None:
        storage.create("store.json", b"some bytes of a record" * 20)

        storage.probe("store.json", b"some bytes of a record" * 20)

        assert raw.get("store.json") == b"some bytes of a record" * 20
        assert raw.keys() == ["store.json"]
        assert storage.capabilities.exclusive_create

    def test_uploads_that_are_broken_off_can_be_dropped(self, storage: Storage, raw: Raw) -> None:
        """Where they leave something that no listing shows; where not, there is nothing to drop."""
        piece = bytes(6 << 20)
        writer = storage.open_writer("a/x")
        for _ in range(2):
            writer.write(writer.reserve(len(piece)), memoryview(piece))

        found = storage.uploads()
        storage.abort_uploads(found)

        assert {upload.key for upload in found} <= {"a/x"}
        assert storage.uploads() == []
        storage.abort_uploads(found)
        writer.abort()
        assert raw.keys() == []

    # --- opening and closing ---

    def test_read_only_reads_and_refuses_to_write(
        self, storage: Storage, raw: Raw, reopen: Callable[..., Storage]
    ) -> None:
        raw.put("a", b"x")
        reader = reopen(read_only=True)

        assert reader.read("a", limit=1) == b"x"
        for write in (lambda: reader.create("b", b""), lambda: reader.open_writer("b"), lambda: reader.delete(["a"])):
            with pytest.raises(StorageError, match="read-only"):
                write()
        assert raw.keys() == ["a"]

    def test_use_after_close_is_refused(self, storage: Storage) -> None:
        storage.close()
        storage.close()

        for use in (
            lambda: storage.list(""),
            lambda: storage.size("a"),
            lambda: storage.read("a", limit=1),
            lambda: storage.create("a", b""),
            lambda: storage.open_writer("a"),
            lambda: storage.open_reader("a"),
            lambda: storage.delete(["a"]),
        ):
            with pytest.raises(StorageError, match="closed"):
                use()

    def test_another_opening_sees_the_same_objects(self, storage: Storage, reopen: Callable[..., Storage]) -> None:
        storage.create("a", b"x")
        storage.close()

        assert reopen().read("a", limit=1) == b"x"
