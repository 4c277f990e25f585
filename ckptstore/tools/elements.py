"""What the elements of a stored tensor are, and how torch computes with many of them in one thread."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from ckptstore.errors import FormatError
from ckptstore.format.tensorfile import ITEM_BYTES, TensorRow
from ckptstore.state.dtypes import numpy_dtype, numpy_stored, torch_dtype
from ckptstore.state.tensors import TensorSpec, tensor_shape

_SERIAL = 3 << 13
"""From 32,768 elements on torch computes with a team of threads."""


def serial_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A flat tensor in parts with which torch computes in the calling thread alone: for who has several already.

    Not so its dot product, which is BLAS's, and has threads for any number of elements.
    """
    return list(tensor.split(_SERIAL))  # type: ignore[no-untyped-call]


def element_type(row: TensorRow) -> torch.dtype:
    """The torch type of a stored tensor's elements.

    Raises:
        FormatError: it is none of torch's, as NumPy's times and texts, or unknown to this release.
    """
    if row.logical is not None and row.logical.startswith("numpy:"):
        raise FormatError(f"{row.name!r:.100} holds elements of NumPy's type {row.logical[6:]}, which aren't numbers")
    return torch_dtype(row.dtype, row.logical)


class Elements(NamedTuple):
    """What a stored tensor's elements are.

    Attributes:
        size: bytes of one.
        shape: of the tensor, in elements.
        parts: the torch type that numbers are made of, two in a complex one; None where no arithmetic is known.
        pairs: they are complex.
    """

    size: int
    shape: tuple[int, ...]
    parts: torch.dtype | None
    pairs: bool

    @property
    def total(self) -> int:
        """How many there are."""
        return prod(self.shape)


def elements(row: TensorRow) -> Elements:
    """What the elements of a stored tensor are, NumPy's times and texts included.

    Raises:
        FormatError: they are of a type that is unknown here, or stored otherwise than it is.
    """
    size = ITEM_BYTES[row.dtype]
    if row.logical is None:
        pairs = row.dtype == "C64"
        return Elements(size, row.shape, torch.float32 if pairs else torch_dtype(row.dtype, None), pairs)
    if not row.logical.startswith("numpy:"):
        dtype = torch_dtype(row.dtype, row.logical)
        shape = tensor_shape(TensorSpec(*row), dtype)
        pairs = dtype.is_complex
        # Two numbers in a byte, as of float4_e2m1fn_x2, are none that torch computes with.
        known = dtype if dtype.is_floating_point and not row.logical.endswith("_x2") else None
        return Elements(dtype.itemsize, shape, torch_dtype(row.dtype, None) if pairs else known, pairs)
    stored = numpy_stored(numpy_dtype(row.logical[6:]))
    cut = len(row.shape) - len(stored.tail) if stored is not None else -1
    if stored is None or cut < 0 or row.shape[cut:] != stored.tail:
        raise FormatError(f"{row.name!r:.100} isn't stored as its type {row.logical} is")
    return Elements(size * prod(stored.tail), row.shape[:cut], None, False)
