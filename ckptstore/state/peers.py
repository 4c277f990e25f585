"""The other processes of a job under ``torch.distributed``, and the key-value store that brought them together.

Its default group's own store is used: it is there whatever backend the job has, and works from any thread.
"""

from __future__ import annotations

import sys

from torch import distributed

from ckptstore.errors import StorageError


class Peers:
    """A board of all ranks of the default group, see ``engine.board.Board``."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._store = distributed.distributed_c10d._get_default_store()

    def put(self, key: str, data: bytes) -> None:
        """Leave a message."""
        try:
            self._store.set(key, data)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _gone(error) from error

    def get(self, key: str) -> bytes | None:
        """A message, or None where there is none yet."""
        try:
            # Never waits for it: that would keep other threads of this process from the store.
            if not self._store.check([key]):
                return None
            data: bytes = self._store.get(key)
        except RuntimeError as error:
            raise _gone(error) from error
        return data

    def drop(self, key: str) -> None:
        """Forget a message."""
        try:
            self._store.delete_key(key)
        except RuntimeError as error:
            if "unsupported" not in str(error).lower() and "not implemented" not in str(error).lower():
                raise _gone(error) from error


def _gone(error: RuntimeError) -> StorageError:
    first = str(error).partition("\n")[0]
    return StorageError(f"rank 0, or the launcher, is gone, by whom the ranks leave each other messages: {first}")


def peers() -> Peers | None:
    """The board of this job; None for a process that works by itself."""
    # Without an import: a process that doesn't use torch.distributed shall not wait for it.
    module = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized() or module.get_world_size() == 1:
        return None
    return Peers()
