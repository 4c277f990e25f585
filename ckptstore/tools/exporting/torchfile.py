"""A file of ``torch.save``, of which torch makes all but the tensors' bytes, which are filled in afterwards."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import StateError, StorageError
from ckptstore.state.tensors import TensorSpec
from ckptstore.state.values import Json
from ckptstore.storage.posix import os_errors, pwrite_all
from ckptstore.tools.exporting.copying import Span, Sum, cast_bytes, cast_of, copy_tensors
from ckptstore.tools.exporting.notes import Notes
from ckptstore.tools.exporting.plain import LEFT_OUT, Values, is_loadable_type
from ckptstore.tools.exporting.zipsums import combined

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_DESCRIPTOR = b"PK\7\x08"
_CRC_IN_LOCAL, _CRC_IN_CENTRAL, _CRC_IN_DESCRIPTOR = 14, 16, 4
_HAS_DESCRIPTOR = 8


class Record(NamedTuple):
    """A file in the archive that holds a tensor's bytes.

    Attributes:
        data: where they begin.
        size: how many there are.
        sums: where its CRC-32 stands.
    """

    data: int
    size: int
    sums: tuple[int, ...]


class _Stand:
    """Makes tensors without memory, and remembers of which they are."""

    def __init__(self, reader: TensorReader, dtype: torch.dtype | None, notes: Notes) -> None:
        self.tensors: list[tuple[str, torch.dtype | None]] = []
        self.numbers: dict[int, int] = {}
        """The number of each tensor by its storage."""
        self._reader, self._mode, self._dtype, self._notes = reader, FakeTensorMode(), dtype, notes

    def __call__(self, spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...], model: bool) -> torch.Tensor:
        cast = cast_of(self._reader.tensors[spec.name], self._dtype) if model else None
        if cast is not None:
            self._notes.cast[spec.name] = str(dtype).removeprefix("torch.")
        with self._mode:
            made = torch.empty(shape, dtype=cast or dtype)
        self.numbers[made.untyped_storage()._cdata] = len(self.tensors)
        self.tensors.append((spec.name, cast))
        return made


class TorchFile:
    """An archive that is planned.

    Attributes:
        value: what it shall hold, with tensors that have no memory.
        nbytes: of its tensors.
    """

    def __init__(self, reader: TensorReader, tree: Json, dtype: torch.dtype | None, notes: Notes) -> None:
        """Nothing is written yet.

        Raises:
            StateError: plain torch can hold nothing of it.
        """
        self._reader, self._notes = reader, notes
        self._stand = _Stand(reader, dtype, notes)
        self.value: Any = Values(reader, self._stand, notes, takes=is_loadable_type).make(tree)
        if self.value is LEFT_OUT:
            raise StateError(f"there is nothing to export: {notes.left_out['']}", path="")
        self.nbytes = sum(self._sizes())

    @property
    def tensors(self) -> int:
        """How many it has."""
        return len(self._stand.tensors)

    def write(self, file: Path, progress: Progress | None) -> None:
        """Write it.

        Raises:
            IntegrityError: a block is damaged.
            StorageError: the storage failed, or the disk.
        """
        with os_errors("write", str(file), str(file)):
            self._write_frame(file)
            records = _records(file)
        self._check(file, records)
        filled = [
            (Span(name, file, record.data, cast), record)
            for (name, cast), record in zip(self._stand.tensors, records, strict=True)
            if record.size
        ]
        sums = copy_tensors(self._reader, [span for span, _ in filled], self._notes, progress, sums=True)
        _put_sums(file, [(sums[span], record) for span, record in filled])

    def _write_frame(self, file: Path) -> None:
        """All but the tensors' bytes, with room for them."""
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(self.value, file)
        except RuntimeError as error:
            # So torch reports what the system refuses, without its reason.
            raise StorageError(f"torch can't write {file}: {error}", key=str(file)) from error

    def _check(self, file: Path, records: Sequence[Record]) -> None:
        """Have torch say where it reads each tensor, before anything is put there."""
        good = [record.size for record in records] == self._sizes()
        bases = set()
        if good:
            loaded = torch.load(file, weights_only=True, mmap=True)
            for mine, theirs in zip(_tensors(self.value), _tensors(loaded), strict=True):
                if mine.numel():
                    number = self._stand.numbers[mine.untyped_storage()._cdata]
                    bases.add(theirs.untyped_storage().data_ptr() - records[number].data)
        if not good or len(bases) > 1:
            raise StorageError(f"torch {torch.__version__} made another archive than was asked for", key=str(file))

    def _sizes(self) -> list[int]:
        return [cast_bytes(self._reader.tensors[name], cast) for name, cast in self._stand.tensors]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _records(file: Path) -> list[Record]:
    """The tensors of an archive in the order in which torch has met them."""
    with file.open("rb") as stream:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            at = archive.start_dir
        found: dict[int, Record] = {}
        for entry in entries:
            folder, _, number = entry.filename.rpartition("/")
            if folder.endswith("/data") and number.isdigit():
                found[int(number)] = _record(stream, entry, at)
            stream.seek(at)
            fields = _CENTRAL.unpack(stream.read(_CENTRAL.size))
            at += _CENTRAL.size + fields[10] + fields[11] + fields[12]
    return [found[number] for number in sorted(found)]


def _record(stream: Any, entry: zipfile.ZipInfo, central: int) -> Record:
    stream.seek(entry.header_offset)
    fields = _LOCAL.unpack(stream.read(_LOCAL.size))
    data = entry.header_offset + _LOCAL.size + fields[9] + fields[10]
    sums = [central + _CRC_IN_CENTRAL]
    if entry.flag_bits & _HAS_DESCRIPTOR:
        stream.seek(data + entry.file_size)
        if stream.read(len(_DESCRIPTOR)) == _DESCRIPTOR:
            sums.append(data + entry.file_size + _CRC_IN_DESCRIPTOR)
    else:
        sums.append(entry.header_offset + _CRC_IN_LOCAL)
    return Record(data, entry.file_size, tuple(sums))


def _put_sums(file: Path, records: Sequence[tuple[Sequence[Sum], Record]]) -> None:
    """Tell the archive the CRC-32 of what was filled in, which zip readers check."""
    with os_errors("write", str(file), str(file)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for sums, record in records:
                crc = struct.pack("<I", combined(sums))
                for place in record.sums:
                    pwrite_all(descriptor, memoryview(crc), place)
        finally:
            os.close(descriptor)
