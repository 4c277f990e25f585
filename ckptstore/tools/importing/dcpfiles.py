"""Tensors and objects in the files of ``torch.distributed.checkpoint``, read as data, in a process of their own."""

from __future__ import annotations

import io
import mmap
import os
import stat
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptstore.errors import FormatError, IntegrityError, StateError, StorageError
from ckptstore.format.regions import Region, runs
from ckptstore.state.tensors import tensor_image
from ckptstore.tools.importing.dcpmetadata import Chunk, DcpContents, Place, TensorEntry
from ckptstore.tools.importing.dcpnames import nest
from ckptstore.tools.importing.dcpstream import STREAM_BEGIN, from_stream
from ckptstore.tools.importing.torchfiles import check_zip, load

_LOCAL_HEADER = struct.Struct("<26xHH")
_KEPT = 4
"""Pieces that are kept in memory, of those that don't lie in a file as they are."""


@contextmanager
def opened(folder: Path, name: str) -> Iterator[io.BufferedReader]:
    """A regular file that lies in ``folder`` itself: no link that leads out, nothing that could be waited for.

    Raises:
        FormatError: it is something else.
        IntegrityError: it is missing.
        StorageError: it can't be read.
    """
    try:
        file = folder / name
        if file.resolve().parent != folder:
            raise FormatError(f"{file} is a link that leads out of its folder", key=name)
        if not stat.S_ISREG(file.stat().st_mode):
            raise FormatError(f"{file} is no file", key=name)
        with file.open("rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise IntegrityError(f"{folder / name} is missing", key=name) from error
    except OSError as error:
        raise StorageError(f"{folder / name} can't be read: {error}", key=name) from error


class DcpFolder:
    """A folder's state, of which the tensors are read in pieces when they are asked for."""

    def __init__(self, folder: Path, contents: DcpContents, *, stand_in: bool) -> None:
        self._folder, self._contents, self._stand_in = folder, contents, stand_in
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()
        self.tensors: dict[int, ChunkedTensor] = {}
        """id of what stands for a tensor in the state → what reads it."""
        self.left_out: dict[str, str] = {}
        self.kept: dict[tuple[str, int], np.ndarray] = {}
        """Pieces in memory, the newest last."""

    def keep(self, which: tuple[str, int], piece: np.ndarray) -> None:
        """Remember a piece that doesn't lie in its file as it is, and forget an older one."""
        if len(self.kept) == _KEPT:
            del self.kept[next(iter(self.kept))]
        self.kept[which] = piece

    def state(self) -> Any:
        """The nested state; a tensor in it has one element of memory, and stands for what ``tensors`` reads.

        Raises:
            StateError: an object can't be read without running code.
            FormatError, IntegrityError: it is malformed or damaged.
        """
        values: dict[str, Any] = {}
        for key, entry in self._contents.entries.items():
            if isinstance(entry, TensorEntry):
                values[key] = self._placeholder(key, entry)
                continue
            try:
                values[key] = self._object(key, entry)
            except StateError as error:
                if not self._stand_in:
                    raise
                self.left_out[key] = str(error)
        return nest(values, self._contents.paths)

    def _placeholder(self, key: str, entry: TensorEntry) -> torch.Tensor:
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype)
        for region, place in entry.chunks:
            if torch.Size(region.shape).numel() * entry.dtype.itemsize > place.length:
                raise FormatError(f"{place.file} has fewer bytes of {key!r:.100} than .metadata says", key=place.file)
        if torch.Size(entry.shape).numel() == 1:
            # A step may be one, which is asked for before anything else.
            return self._single(key, entry)
        stands = torch.empty((), dtype=entry.dtype).expand(entry.shape)
        self.tensors[id(stands)] = ChunkedTensor(self, key, entry)
        return stands

    def _single(self, key: str, entry: TensorEntry) -> torch.Tensor:
        image = torch.from_numpy(self.piece(key, entry, entry.chunks[0]).copy())
        return image.view(entry.dtype).reshape(entry.shape)

    def _object(self, key: str, place: Place) -> Any:
        with opened(self._folder, place.file) as file:
            stream = io.BufferedReader(Slice(file, place))
            if stream.peek(len(STREAM_BEGIN)).startswith(STREAM_BEGIN):
                # DCP's writer has saved it, and CkptStoreSavePlanner made it.
                return from_stream(stream, key)
        return self._loaded(key, place)

    def _loaded(self, key: str, place: Place) -> Any:
        with opened(self._folder, place.file) as file:
            name = f"{key!r:.100} in {self._folder / place.file}"
            try:
                check_zip(io.BufferedReader(Slice(file, place)), name)
                source, look = (io.BufferedReader(Slice(file, place)) for _ in range(2))
                return load(source, look, name, stand_in=self._stand_in)
            except StateError as error:
                raise StateError(error.message, path=key) from error

    def piece(self, key: str, entry: TensorEntry, chunk: Chunk) -> np.ndarray:
        """The bytes of a stored piece: where they lie in the file, if they lie there as they are.

        Raises:
            FormatError: it is another piece than the metadata say.
            IntegrityError: it is damaged.
        """
        region, place = chunk
        loaded = self._loaded(key, place)
        if not isinstance(loaded, torch.Tensor) or loaded.layout is not torch.strided or loaded.is_meta:
            raise FormatError(f"what stands for the tensor {key!r:.100} in {place.file} is none", key=place.file)
        if loaded.dtype != entry.dtype or tuple(loaded.shape) != region.shape or loaded.nbytes > place.length:
            raise FormatError(
                f"the tensor {key!r:.100} in {place.file} is another than .metadata says: {tuple(loaded.shape)} of "
                f"{loaded.dtype}, not {region.shape} of {entry.dtype}",
                key=place.file,
            )
        image = tensor_image(loaded)
        begin = self._begin(place) + loaded.storage_offset() * loaded.element_size()
        there = np.frombuffer(self._map(place.file), np.uint8)[begin : begin + len(image)]
        return there if np.array_equal(there, image) else image

    def _begin(self, place: Place) -> int:
        """Where the bytes of the only tensor begin in an archive."""
        with opened(self._folder, place.file) as file, zipfile.ZipFile(Slice(file, place)) as archive:
            record = next((one for one in archive.infolist() if one.filename.endswith("data/0")), None)
            if record is None:
                return 0
            file.seek(place.begin + record.header_offset)
            name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            return place.begin + record.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)

    def _map(self, name: str) -> mmap.mmap:
        with self._lock:
            if name not in self._maps:
                with opened(self._folder, name) as file:
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[name]


class ChunkedTensor:
    """A tensor that lies in pieces."""

    def __init__(self, folder: DcpFolder, key: str, entry: TensorEntry) -> None:
        self._folder, self._key, self._entry = folder, key, entry
        self._mapped: dict[int, np.ndarray] = {}

    def check(self) -> Iterator[int]:
        """Read every piece once; the bytes of each.

        Raises:
            FormatError, IntegrityError: one is another than the metadata say, or damaged.
        """
        for number, (_, place) in enumerate(self._entry.chunks):
            self._piece(number)
            yield place.length

    def read(self, offset: int, length: int) -> memoryview:
        """Some bytes of the tensor."""
        whole, item = Region.whole(self._entry.shape), self._entry.dtype.itemsize
        out = np.empty(length, np.uint8)
        for number, (region, _) in enumerate(self._entry.chunks):
            piece = None
            for run in runs(whole, region, item, offset, offset + length):
                piece = self._piece(number) if piece is None else piece
                at = run.source - offset
                out[at : at + run.length] = piece[run.target : run.target + run.length]
        return out.data

    def _piece(self, number: int) -> np.ndarray:
        found = self._mapped.get(number)
        if found is None:
            found = self._folder.kept.get((self._key, number))
        if found is None:
            found = self._folder.piece(self._key, self._entry, self._entry.chunks[number])
            if _is_mapped(found):
                self._mapped[number] = found
            else:
                self._folder.keep((self._key, number), found)
        return found


def _is_mapped(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(getattr(base, "obj", base), mmap.mmap)


class Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: io.BufferedReader, place: Place) -> None:
        self._file, self._place = file, place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.length}[whence]
        if begin + offset < 0:
            raise ValueError("before the beginning")
        self._at = begin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as view:
            count = max(min(len(view), self._place.length - self._at), 0)
            self._file.seek(self._place.begin + self._at)
            read = self._file.readinto(view[:count])
        self._at += read
        return read


def to_fields(contents: DcpContents) -> dict[str, Any]:
    """A folder's contents as JSON; the inverse of ``from_fields``."""
    entries: list[Any] = []
    for key, entry in contents.entries.items():
        if isinstance(entry, Place):
            entries.append([key, list(entry)])
        else:
            chunks = [[*map(list, region), list(place)] for region, place in entry.chunks]
            entries.append([key, str(entry.dtype).removeprefix("torch."), list(entry.shape), chunks])
    paths = None if contents.paths is None else {key: list(path) for key, path in contents.paths.items()}
    return {"entries": entries, "paths": paths}


def from_fields(fields: Mapping[str, Any]) -> DcpContents:
    """The contents that the fields describe."""
    entries: dict[str, TensorEntry | Place] = {}
    for key, *rest in fields["entries"]:
        if len(rest) == 1:
            entries[key] = Place(*rest[0])
            continue
        dtype, shape, rows = rest
        chunks = [Chunk(Region(tuple(a), tuple(n)), Place(*place)) for a, n, place in rows]
        entries[key] = TensorEntry(getattr(torch, dtype), tuple(shape), chunks)
    paths = fields["paths"]
    return DcpContents(entries, None if paths is None else {key: tuple(path) for key, path in paths.items()})
