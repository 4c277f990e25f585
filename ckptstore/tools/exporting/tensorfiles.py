"""Safetensors files, laid out before anything is written. https://huggingface.co/docs/safetensors#format"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import Progress
from ckptstore.errors import FormatError, StateError
from ckptstore.format.tensorfile import HEADER_LIMIT, ITEM_BYTES, TensorRow
from ckptstore.state.dtypes import TORCH_STORED
from ckptstore.storage.posix import os_errors, pwrite_all
from ckptstore.tools.exporting.copying import Span, cast_bytes, copy_tensors
from ckptstore.tools.exporting.notes import Notes

_ALIGNMENT = 8


class Weight(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: in the file.
        tensor: its name in the checkpoint.
        row: as it is stored.
        cast: the type to convert it to; None: as stored.
    """

    name: str
    tensor: str
    row: TensorRow
    cast: torch.dtype | None

    @property
    def code(self) -> str:
        """Safetensors' name of its type."""
        return self.row.dtype if self.cast is None else TORCH_STORED[self.cast].code

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return cast_bytes(self.row, self.cast)


def refusal(row: TensorRow) -> str | None:
    """Why safetensors has no room for a tensor; None where it has."""
    if row.logical is None:
        return None
    return f"safetensors has no type for {row.logical.removeprefix('numpy:')}"


def lay_out(file: Path, weights: Sequence[Weight], metadata: Mapping[str, str]) -> list[Span]:
    """Make a file of its full size, with its header, and say where the tensors go.

    Raises:
        FormatError: the header is longer than readers allow.
        StateError: a name that no reader would find.
        StorageError: the disk failed.
    """
    # As safetensors does it: no element straddles its alignment.
    ordered = sorted(weights, key=lambda weight: (-ITEM_BYTES[weight.code], weight.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, at = [], 0
    for weight in ordered:
        if weight.name in header:
            raise StateError(f"safetensors has no place for a tensor named {weight.name!r}", path=weight.tensor)
        begins.append(at)
        at += weight.nbytes
        header[weight.name] = {
            "dtype": weight.code,
            "shape": list(weight.row.shape),
            "data_offsets": [begins[-1], at],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"the header of {file.name} would take {len(text)} bytes, safetensors allows {HEADER_LIMIT}")
    head = struct.pack("<Q", len(text)) + text
    write_new(file, head, len(head) + at)
    return [
        Span(weight.tensor, file, len(head) + begin, weight.cast)
        for weight, begin in zip(ordered, begins, strict=True)
        if weight.nbytes
    ]


def write_new(file: Path, head: bytes, size: int | None = None) -> None:
    """A new file that begins with ``head``, and has ``size`` bytes in all.

    Raises:
        StorageError: the disk failed.
    """
    with os_errors("write", str(file), str(file)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            pwrite_all(descriptor, memoryview(head), 0)
            if size is not None:
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


class TensorsFile:
    """One safetensors file that is planned.

    Attributes:
        weights: what is in it.
    """

    def __init__(
        self, reader: TensorReader, weights: Sequence[Weight], metadata: Mapping[str, str], notes: Notes
    ) -> None:
        self._reader, self._metadata, self._notes = reader, metadata, notes
        self.weights = weights

    def write(self, work: Path, progress: Progress | None) -> None:
        """Write it.

        Raises:
            FormatError, StateError, StorageError: as ``lay_out``.
            IntegrityError: a block is damaged.
        """
        copy_tensors(self._reader, lay_out(work, self.weights, self._metadata), self._notes, progress)
