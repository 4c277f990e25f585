"""What a save writes: its data files, their blocks, and how a block is filled from live tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple, Protocol

from ckptstore.format import layout
from ckptstore.format.digest import Hasher
from ckptstore.format.records import ShardEntry
from ckptstore.format.tensorfile import TensorFile, TensorRow, storage_order

PIECE_BYTES = 128 << 10
"""Copied and hashed at a time. Bytes that are still in the core's cache hash a third faster than from memory."""


class Spec(Protocol):
    """What a tensor is called and how it is stored."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def logical(self) -> str | None: ...


class Source(Protocol):
    """A tensor whose bytes can be taken."""

    frozen: bool
    """It is a parameter that isn't trained, so that the next checkpoint will very likely hold the same bytes."""
    fickle: bool
    """Nobody knows when it changes."""

    @property
    def nbytes(self) -> int: ...
    @property
    def spec(self) -> Spec: ...
    @property
    def whole(self) -> Spec: ...
    @property
    def region(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None: ...
    @property
    def cuttable(self) -> bool: ...
    @property
    def near(self) -> bool: ...
    def read_into(self, offset: int, out: memoryview) -> None: ...
    def view(self, offset: int, length: int) -> memoryview: ...
    def moved(self) -> bool: ...
    def rebase(self) -> None: ...
    def release(self) -> None: ...


class PlannedFile:
    """One data file to be written: tensors of one component, in the order in which they are stored."""

    def __init__(self, name: str, prefix: str, sources: Sequence[Source], *, frozen: bool) -> None:
        self.name, self.prefix, self.frozen = name, prefix, frozen
        by_name = {source.spec.name.removeprefix(prefix): source for source in sources}
        rows = storage_order(
            TensorRow(n, s.spec.dtype, tuple(s.spec.shape), s.spec.logical) for n, s in by_name.items()
        )
        self.sources = [by_name[row.name] for row in rows]
        self.shards = {name: _shard(source, prefix) for name, source in by_name.items() if source.region is not None}
        self.stream = TensorFile.of(rows)
        self.block_lengths = self.stream.block_lengths
        self._fickle = any(source.fickle for source in self.sources)
        self._sizes = [end - begin for begin, end in pairwise(self.stream.begins)]
        self._bytes_left = list(self._sizes)
        self._lock = threading.Lock()

    @property
    def blocks(self) -> list[Block]:
        return [Block(self, number, self._changes_with(number)) for number in range(len(self.block_lengths))]

    def _changes_with(self, number: int) -> Change:
        if self._fickle and any(self.sources[index].fickle for index, *_ in self.stream.pieces(number)):
            return Change.FICKLE
        return Change.ALL if self.frozen else Change.TRAINED

    def fill(self, number: int, raw: memoryview, hasher: Hasher | None = None) -> None:
        """Copy block ``number`` from the live tensors into ``raw``, hashing each piece while it is in the cache."""
        head = self.stream.header_part(number)
        raw[: len(head)] = head
        hashed = 0
        pieces = self.stream.pieces(number)
        for index, begin, length, offset in pieces:
            source = self.sources[index]
            step = PIECE_BYTES if hasher is not None and source.near else length
            for at in range(0, length, step):
                stop = min(at + step, length)
                source.read_into(begin + at, raw[offset + at : offset + stop])
                if hasher is not None and offset + stop - hashed >= PIECE_BYTES:
                    hasher.update(raw[hashed : offset + stop])
                    hashed = offset + stop
        if hasher is not None:
            hasher.update(raw[hashed:])
        self._count(pieces)

    def hash_in_place(self, number: int, hasher: Hasher) -> None:
        """Hash block ``number`` where its tensors lie, without copying it."""
        hasher.update(self.stream.header_part(number))
        pieces = self.stream.pieces(number)
        for index, begin, length, _ in pieces:
            source = self.sources[index]
            hasher.update(source.view(begin, length))
        self._count(pieces)

    def moved(self, number: int) -> str | None:
        """The name of a tensor in block ``number`` that was written to since the save was asked for, or None."""
        for index, *_ in self.stream.pieces(number):
            if self.sources[index].moved():
                return self.sources[index].spec.name
        return None

    def _count(self, pieces: Iterable[tuple[int, int, int, int]]) -> None:
        """A tensor all of whose bytes were read needs its host copy no longer."""
        done = []
        with self._lock:
            for index, _, length, _ in pieces:
                self._bytes_left[index] -= length
                if not self._bytes_left[index]:
                    done.append(index)
                    # It may be read a second time: hashed first, then written.
                    self._bytes_left[index] = self._sizes[index]
        for index in done:
            self.sources[index].release()


def _shard(source: Source, prefix: str) -> ShardEntry:
    assert source.region is not None
    whole, offset = source.whole, source.region[0]
    return ShardEntry(tensor=whole.name.removeprefix(prefix), shape=list(whole.shape), offset=list(offset))


class Change(IntEnum):
    """What is about to change in the state; each includes those before it."""

    NOTHING = 0
    FICKLE = 1
    """What nothing is known about: it may change as soon as the caller goes on."""
    TRAINED = 2
    """What an optimizer's step changes."""
    ALL = 3
    """Frozen parameters, too."""


class Block(NamedTuple):
    """One block to be written."""

    file: PlannedFile
    number: int
    changes_with: Change

    @property
    def length(self) -> int:
        """Raw bytes."""
        return self.file.block_lengths[self.number]


class Plan:
    """All data files of one save: one for each top-level component of the state, and one for what is frozen in it."""

    def __init__(self, sources: Sequence[Source], *, encoded: bool, label: str = "") -> None:
        """``encoded``: the files get the name of files whose blocks may be encoded; ``label`` is part of their names.

        Raises:
            FormatError: so many tensors in a component that no reader takes the header.
        """
        self.sources = sources
        self.files = list(_files(sources, label + (".blocks" if encoded else ".safetensors")))
        self.raw_bytes = sum(file.stream.raw_bytes for file in self.files)

    def only(self, files: Sequence[PlannedFile]) -> Plan:
        """The part of this plan that makes ``files``."""
        part = copy(self)
        part.files = list(files)
        part.sources = [source for file in files for source in file.sources]
        part.raw_bytes = sum(file.stream.raw_bytes for file in files)
        return part

    def blocks(self) -> list[Block]:
        """The blocks of all files in the order in which they are written."""
        return [block for file in self.files for block in file.blocks]

    def moved(self, *, frozen_only: bool) -> str | None:
        """The name of a (frozen) tensor that was written to since the save was asked for, or None."""
        sources = (source for source in self.sources if source.frozen or not frozen_only)
        return next((source.spec.name for source in sources if source.moved()), None)

    def rebase(self) -> None:
        """What the tensors are now is what shall be saved."""
        for source in self.sources:
            source.rebase()

    def release(self) -> None:
        """Drop the host copies."""
        for source in self.sources:
            source.release()


def _files(sources: Sequence[Source], suffix: str) -> Iterator[PlannedFile]:
    groups: dict[tuple[str, bool], list[Source]] = {}
    for source in sources:
        component, slash, _ = source.spec.name.partition("/")
        groups.setdefault((component + slash if slash else "", source.frozen), []).append(source)
    taken: set[str] = set()
    for (prefix, frozen), members in groups.items():
        name = (prefix.rstrip("/") or "state") + ("-frozen" if frozen else "")
        yield PlannedFile(layout.file_name(name, taken, suffix=suffix), prefix, members, frozen=frozen)
