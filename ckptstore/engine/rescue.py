"""Bytes from elsewhere: the backups are asked for what is damaged, and what they gave is remembered for the repair."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from ckptstore.engine.catalogue import Damage
from ckptstore.engine.contents import Contents, DataFile, read_sealed
from ckptstore.errors import IntegrityError, NotFoundError, StorageError
from ckptstore.format.records import Sealed256
from ckptstore.storage.base import ObjectReader, Storage


class Patient(NamedTuple):
    """A data file with blocks that had to come from elsewhere, and a checkpoint that needs it."""

    contents: Contents
    file: DataFile


class Rescuer:
    """Asks ``others``, in order. All that it gives is checked by whoever asked.

    Attributes:
        others: the places.
        met: the damage for which there was something good elsewhere.
        records: by key, the good bytes of damaged manifests and parts.
        files: by key, the damaged data files.
    """

    def __init__(self, others: Sequence[Storage]) -> None:
        self.met: list[Damage] = []
        self.records: dict[str, bytes] = {}
        self.files: dict[str, Patient] = {}
        self.others = others
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], ObjectReader | None] = {}

    def record(self, key: str, wanted: Sealed256, id: str, *, limit: int, error: IntegrityError) -> bytes | None:
        """The manifest or part that ``key`` should be; None where nobody has it."""
        for other in self.others:
            with suppress(IntegrityError, StorageError):
                data = read_sealed(other, key, wanted, id, limit=limit)
                with self._lock:
                    self.records[key] = data
                    self.met.append(Damage(key, str(error), id))
                return data
        return None

    def readers(self, file: DataFile, id: str) -> Iterator[ObjectReader]:
        """The same file elsewhere, one place after the other. Each is opened once, for all blocks."""
        for number, other in enumerate(self.others):
            with self._lock:
                if (file.key, number) not in self._open:
                    self._open[file.key, number] = _opened(other, file)
                reader = self._open[file.key, number]
            if reader is not None:
                yield reader

    def rescued(self, contents: Contents, file: DataFile, block: int, error: IntegrityError) -> None:
        """Remember that ``block`` is damaged, and good elsewhere."""
        with self._lock:
            self.files[file.key] = Patient(contents, file)
            self.met.append(Damage(file.key, str(error), contents.commit.id, block, tuple(file.names_in(block))))

    def close(self) -> None:
        """Release what is open."""
        with self._lock:
            for reader in self._open.values():
                if reader is not None:
                    reader.close()
            self._open.clear()


def _opened(storage: Storage, file: DataFile) -> ObjectReader | None:
    # Of whatever size: each block is checked by itself.
    with suppress(IntegrityError, NotFoundError, StorageError):
        return storage.open_reader(file.key)
    return None
