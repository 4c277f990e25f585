"""Put good bytes in the place of damaged ones: written beside them, read back, and only then exchanged."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ckptstore.engine.contents import Contents, DataFile, Rescue
from ckptstore.errors import CheckpointError, IntegrityError
from ckptstore.format import layout
from ckptstore.maintenance.transfer import Carrier
from ckptstore.storage.base import Storage


@dataclass(frozen=True)
class Healer:
    """Repairs one storage. Killed in the midst it leaves a temporary object, which ``prune`` collects."""

    storage: Storage
    carrier: Carrier

    def record(self, key: str, data: bytes) -> None:
        """Have ``key`` hold ``data``, a record that was proven elsewhere.

        Raises:
            IntegrityError: it was read back with other bytes; ``key`` is as it was.
            StorageError: the storage failed.
        """
        with self._beside(key) as temporary:
            self.storage.create(temporary, data)
            # Looked at twice: a flip on the way up heals by itself.
            if all(self.storage.read(temporary, limit=len(data)) != data for _ in range(2)):
                raise IntegrityError(f"{temporary} was read back with other bytes than were written", key=temporary)

    def file(self, contents: Contents, file: DataFile, source: Storage, rescue: Rescue | None) -> None:
        """Write ``file`` anew, from its good blocks in ``source`` and what ``rescue`` has for the others.

        Raises:
            IntegrityError: a block is good nowhere, or was read back with other bytes; the file is as it was.
            StorageError: the storage failed.
        """
        with self._beside(file.key) as temporary:
            self.carrier.carry(contents, file, source, self.storage, temporary, rescue=rescue)
            self.carrier.prove(contents, file, self.storage, temporary)

    @contextmanager
    def _beside(self, key: str) -> Iterator[str]:
        """The name under which to write what takes the place of ``key`` when the block ends well."""
        folder, _, _ = key.rpartition("/")
        name = f"{layout.TEMPORARY}heal-{secrets.token_hex(8)}"
        temporary = f"{folder}/{name}" if folder else name
        try:
            yield temporary
            self.storage.replace(key, by=temporary)
        except BaseException:
            with suppress(CheckpointError):
                self.storage.delete([temporary])
            raise
