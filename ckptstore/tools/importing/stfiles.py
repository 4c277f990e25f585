"""Safetensors files: their header, checked as that of a stranger, and the bytes of their tensors."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from ckptstore.errors import FormatError, IntegrityError, StateError
from ckptstore.format.jsontext import no_constant, no_duplicates
from ckptstore.format.tensorfile import HEADER_LIMIT
from ckptstore.state.dtypes import CODE_BYTES
from ckptstore.state.tensors import MAX_DIMENSIONS

_LENGTH = struct.Struct("<Q")
_BYTES_ONLY = {"F8_E8M0": ("U8", "float8_e8m0fnu")}
"""Types that a store keeps as other ones of the same bytes."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: how it is stored, and where its bytes lie."""

    dtype: str
    logical: str | None
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One file, open for reading.

    Attributes:
        entries: the tensors, by name, in the order in which they lie there.
        metadata: what else its header says.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Raises:
        FormatError: the header is none, or contradicts itself or the file.
        IntegrityError: the file was cut off.
        StateError: a type of elements is unknown.
        """
        self._path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        (length,) = _LENGTH.unpack(head) if len(head) == _LENGTH.size else (0,)
        if not 2 <= length <= HEADER_LIMIT:
            raise FormatError(f"{path} is no safetensors file: its header would have {length} bytes", key=str(path))
        if _LENGTH.size + length > size:
            raise IntegrityError(f"{path} was cut off: it has {size} bytes, and its header {length}", key=str(path))
        begin = _LENGTH.size + length
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=no_duplicates, parse_constant=no_constant)
            self.metadata, self.entries = _checked(header, begin)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise FormatError(f"{path} has a malformed header: {error}", key=str(path)) from error
        except StateError as error:
            raise StateError(f"{path}: {error.message}", path=error.path) from error
        end = max((entry.end for entry in self.entries.values()), default=begin)
        if end > size:
            raise IntegrityError(
                f"{path} was cut off: {end} bytes belong to it, it has {size}", key=str(path), expected=end, actual=size
            )
        if end < size:
            raise FormatError(f"{path} has {size - end} bytes that belong to no tensor", key=str(path))

    def read(self, entry: Entry, offset: int, out: memoryview) -> None:
        """Fill ``out`` with bytes of a tensor; any thread.

        Raises:
            IntegrityError: the file has fewer by now.
        """
        done = 0
        while done < len(out):
            count = os.preadv(self._file.fileno(), [out[done:]], entry.begin + offset + done)
            if not count:
                raise IntegrityError(f"{self._path} was cut off while it was read", key=str(self._path))
            done += count


def _checked(header: Any, base: int) -> tuple[Mapping[str, str], dict[str, Entry]]:
    if type(header) is not dict:
        raise ValueError("it is no JSON object")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its __metadata__ are no texts")
    entries = {name: _entry(name, fields, base) for name, fields in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    at = base
    for name, entry in ordered:
        if entry.begin != at:
            raise ValueError(f"{name!r:.100} {'overlaps another tensor' if entry.begin < at else 'leaves a hole'}")
        at = entry.end
    return metadata, dict(ordered)


def _entry(name: str, fields: Any, base: int) -> Entry:
    code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype, logical = _BYTES_ONLY.get(code, (code, None))
    if dtype not in CODE_BYTES:
        raise StateError(f"the tensor {name!r:.100} is of the type {code!r:.40}, which can't be stored", path=name)
    numbers = [*shape, begin, end]
    if not all(type(one) is int and 0 <= one < 1 << 60 for one in numbers) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r:.100} has a shape or place that can't be")
    if end - begin != prod(shape) * CODE_BYTES[dtype]:
        raise ValueError(f"{name!r:.100} has {end - begin} bytes, and its shape {prod(shape) * CODE_BYTES[dtype]}")
    return Entry(dtype, logical, tuple(shape), base + begin, base + end)
