"""Which stored element type holds which torch or NumPy type: one table each, and their inverses.

Stored types are those of safetensors. A type without a code there is stored as one of the same bytes, and the
spec's ``logical`` field says what it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch

from ckptstore.errors import FormatError

CODE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors code."""

_DIRECT = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_PAIRS = {"complex128": "F64", "complex32": "F16"}
_OPAQUE = {
    **dict.fromkeys(("float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), "U8"),
    **{f"{sign}int{bits}": "U8" for sign in ("", "u") for bits in range(1, 8)},
    "bits16": "U16",
}


class Stored(NamedTuple):
    """How elements of one type lie on storage."""

    code: str
    logical: str | None
    tail: tuple[int, ...]
    """Extra trailing dimensions of the stored shape: (2,) where one element is a pair."""


def _torch_table() -> dict[torch.dtype, Stored]:
    rows = {name: Stored(code, None, ()) for name, code in _DIRECT.items()}
    rows |= {name: Stored(code, name, (2,)) for name, code in _PAIRS.items()}
    rows |= {name: Stored(code, name, ()) for name, code in _OPAQUE.items()}
    # Older torch releases lack the newest types.
    return {getattr(torch, name): row for name, row in rows.items() if hasattr(torch, name)}


TORCH_STORED = _torch_table()
"""torch dtype → stored form. Types that are not in it hold no elements of their own (quantised ones)."""

_TORCH_DTYPES = {(row.code, row.logical): dtype for dtype, row in TORCH_STORED.items()}


def torch_name(dtype: torch.dtype) -> str:
    """The canonical name, as ``float32``."""
    return str(dtype).removeprefix("torch.")


TORCH_NAMES = {torch_name(value): value for value in vars(torch).values() if type(value) is torch.dtype}
"""Every torch dtype by its canonical name."""


def torch_dtype(code: str, logical: str | None) -> torch.dtype:
    """The torch type that ``code`` and ``logical`` stand for: the inverse of ``TORCH_STORED``.

    Raises:
        FormatError: unknown here, as a type of a newer torch.
    """
    dtype = _TORCH_DTYPES.get((code, logical))
    if dtype is None:
        raise FormatError(f"element type {logical or code!r} (stored as {code!r}) is unknown to this torch's release")
    return dtype


_NUMPY_DIRECT = {
    "f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u8": "U64", "u4": "U32",
    "u2": "U16", "u1": "U8", "b1": "BOOL", "c8": "C64",
}  # fmt: skip
_NUMPY_TEXT = re.compile(
    r"[<>|](b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d{1,9}|[mM]8(\[\d{0,9}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)",
    re.ASCII,
)
# Extended precision has another layout on other machines; only that of x86 is given a meaning.
_EXTENDED = np.finfo(np.longdouble).nmant == 63 and np.dtype(np.longdouble).itemsize == 16


def numpy_stored(dtype: np.dtype[np.generic]) -> Stored | None:
    """How a NumPy type is stored (always little-endian), or None where it can't be without pickle."""
    if _NUMPY_TEXT.fullmatch(dtype.str) is None or dtype.names is not None or dtype.subdtype is not None:
        return None
    short = dtype.str[1:]
    if short in _NUMPY_DIRECT:
        return Stored(_NUMPY_DIRECT[short], None, ())
    if short == "c16":
        return Stored("F64", "complex128", (2,))
    logical = "numpy:" + dtype.newbyteorder("<").str
    if dtype.kind in "mM":
        return Stored("I64", logical, ())
    if dtype.kind == "U":
        return Stored("U32", logical, (dtype.itemsize // 4,))
    if dtype.kind == "S" or _EXTENDED:
        return Stored("U8", logical, (dtype.itemsize,))
    return None


def numpy_dtype(text: object) -> np.dtype[np.generic]:
    """The NumPy type of a ``dtype.str``; nothing but plain element types is let through.

    Raises:
        FormatError: not on the list, or refused by NumPy.
    """
    if not isinstance(text, str) or _NUMPY_TEXT.fullmatch(text) is None:
        raise FormatError(f"{text!r} is no NumPy element type that can be loaded")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"NumPy {np.__version__} refuses the element type {text!r}: {error}") from error
    if numpy_stored(dtype) is None:
        raise FormatError(f"element type {text!r} has another layout on this machine; load it where it was saved")
    return dtype


CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Item size → a type that torch can copy, so that types without arithmetic are moved too."""
