"""Stored tensors as torch's, piece by piece: what is looked at or computed with need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.errors import FormatError
from ckptstore.format.tensorfile import TensorRow
from ckptstore.state.dtypes import torch_dtype

CHUNK_BYTES = 8 << 20


def element_type(row: TensorRow) -> torch.dtype:
    """The torch type of a stored tensor's elements.

    Raises:
        FormatError: it is none of torch's, as NumPy's times and texts, or unknown to this release.
    """
    if row.logical is not None and row.logical.startswith("numpy:"):
        raise FormatError(f"{row.name!r:.100} holds elements of NumPy's type {row.logical[6:]}, which aren't numbers")
    return torch_dtype(row.dtype, row.logical)


def chunks(reader: TensorReader, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's elements, flat and in their own type, and the index of the first of each chunk.

    Args:
        reader: of the checkpoint that has it.
        name: as in ``reader.tensors``.
        chunk_bytes: the most in a chunk.

    Raises:
        NotFoundError, IntegrityError, StorageError: as ``TensorReader.read_into``.
        FormatError: as ``element_type``.
    """
    row = reader.tensors[name]
    dtype = element_type(row)
    step = max(1, chunk_bytes // dtype.itemsize)
    for begin in range(0, row.nbytes // dtype.itemsize, step):
        count = min(step, row.nbytes // dtype.itemsize - begin)
        yield begin, read_elements(reader, name, begin, count)


def read_elements(reader: TensorReader, name: str, begin: int, count: int) -> torch.Tensor:
    """Some elements of a tensor, flat and in their own type.

    Raises:
        NotFoundError, IntegrityError, StorageError, FormatError: as ``chunks``.
    """
    dtype = element_type(reader.tensors[name])
    image = bytearray(count * dtype.itemsize)
    reader.read_into(name, begin * dtype.itemsize, memoryview(image))
    return torch.frombuffer(image, dtype=dtype) if image else torch.empty(0, dtype=dtype)
