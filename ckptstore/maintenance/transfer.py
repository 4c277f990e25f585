"""One data file from one place to another, block by block, each checked before it is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from ckptstore.engine.buffers import BufferPool
from ckptstore.engine.contents import Contents, DataFile, Rescue
from ckptstore.engine.reader import BlockTask, open_file, read_stored
from ckptstore.engine.workers import give_way, run
from ckptstore.errors import IntegrityError
from ckptstore.storage.base import ObjectReader, Storage


@dataclass(frozen=True)
class Carrier:
    """Moves blocks through a pool of its own: saving and loading never wait for it."""

    pool: BufferPool
    threads: int

    def carry(
        self,
        contents: Contents,
        file: DataFile,
        source: Storage,
        target: Storage,
        key: str,
        *,
        rescue: Rescue | None = None,
        done: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Write ``file`` of ``contents`` to ``key`` of ``target``; ``done`` is told the bytes of each block.

        Raises:
            IntegrityError: a block is damaged in ``source``, and ``rescue`` has none; nothing is left.
            ExistsError: the key is taken.
            StorageError: either failed.
        """
        blocks = file.entry.blocks
        with closing(open_file(source, file, contents.commit.id, rescue)) as reader:
            writer = target.open_writer(key, size=file.entry.stored_bytes)
            try:
                slots = [writer.reserve(block.length) for block in blocks]

                def move(task: BlockTask) -> None:
                    give_way()
                    with self.pool.lease() as buffers:
                        stored = read_stored(contents, task, buffers[0], rescue)
                        writer.write(slots[task.number], stored)
                        stored.release()
                    done(blocks[task.number].length)

                self._each(file, reader, move)
                writer.finish()
            except BaseException:
                writer.abort()
                raise

    def prove(self, contents: Contents, file: DataFile, storage: Storage, key: str) -> None:
        """Read every block of ``file`` back from ``key``.

        Raises:
            IntegrityError: one has other bytes, or there are more or fewer.
            NotFoundError: nothing is there.
        """

        def look(task: BlockTask) -> None:
            give_way()
            with self.pool.lease() as buffers:
                read_stored(contents, task, buffers[0]).release()

        with closing(storage.open_reader(key)) as reader:
            if reader.size != file.entry.stored_bytes:
                message = f"{storage.url}/{key} has {reader.size} bytes, {file.entry.stored_bytes} were saved"
                raise IntegrityError(message, id=contents.commit.id, key=key)
            self._each(file, reader, look)

    def _each(self, file: DataFile, reader: ObjectReader, work: Callable[[BlockTask], None]) -> None:
        tasks = (BlockTask(file, reader, number, []) for number in range(len(file.entry.blocks)))
        run(tasks, work, threads=min(self.threads, self.pool.buffers))
