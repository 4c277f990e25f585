"""Single values that JSON has no word for: each type's way out and in, side by side.

A node that JSON can't express is an object with the key ``"$"``, which names its kind.
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ckptstore.errors import FormatError
from ckptstore.state.dtypes import TORCH_NAMES, numpy_dtype, numpy_stored, torch_name

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

TAG = "$"
"""The key that marks a tagged node; a dict that has it itself is stored as a list of items."""

DICT_KINDS = ("dict", "ordered_dict", "default_dict", "counter")
"""Kinds of nodes that hold pairs of key and value."""

EXACT_INT = 2**53
"""Smaller integers mean the same to every JSON reader; others are stored as hexadecimal text."""

_HEX = re.compile(r"-?0x[0-9a-f]+", re.ASCII)
_DEVICE = re.compile(r"[a-z]{2,20}(:\d{1,3})?", re.ASCII)


class ValueKind(NamedTuple):
    """A type of values, the fields of its nodes, and back. ``decode`` may raise any ordinary error."""

    cls: type
    kind: str
    encode: Callable[[Any], dict[str, Json]]
    decode: Callable[[dict[str, Any]], object]


def int_node(value: int | None) -> Json:
    """An integer as a JSON number where every reader takes it exactly."""
    if value is None or -EXACT_INT < value < EXACT_INT:
        return value
    return {TAG: "int", "hex": hex(value)}


def int_value(node: object) -> int | None:
    """The inverse of ``int_node``."""
    if node is None or type(node) is int:
        return node
    if type(node) is not dict or node.get(TAG) != "int":
        raise FormatError(f"{node!r} is no integer")
    return _hex_int(node)


def _hex_int(fields: dict[str, Any]) -> int:
    if _HEX.fullmatch(fields["hex"]) is None:
        raise FormatError("not a hexadecimal integer")
    return int(fields["hex"], 16)


def float_node(value: float) -> Json:
    """A float as a JSON number; infinities and NaNs (with their payload) by their bits."""
    return value if math.isfinite(value) else {TAG: "float", "bits": struct.pack(">d", value).hex()}


def _float_value(fields: dict[str, Any]) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(fields["bits"]))
    return float(value)


def text_node(value: str) -> Json:
    """Text as itself, unless it has lone surrogates: two of them in a row would come back as one character."""
    return value if is_plain_text(value) else {TAG: "str", "utf8": value.encode("utf-8", "surrogatepass").hex()}


def is_plain_text(value: str) -> bool:
    """Whether JSON gives exactly this text back."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_value(fields: dict[str, Any]) -> str:
    return bytes.fromhex(fields["utf8"]).decode("utf-8", "surrogatepass")


def _integers(*values: object) -> list[Json]:
    if not all(value is None or type(value) is int for value in values):
        raise TypeError("its parts must be integers")
    return [int_node(value) for value in values]  # type: ignore[arg-type]


def _integer_values(fields: dict[str, Any], count: int | None = None) -> list[Any]:
    items = fields["items"]
    if type(items) is not list or (count is not None and len(items) != count):
        raise FormatError("wrong number of integers")
    return [int_value(item) for item in items]


def _size_value(fields: dict[str, Any]) -> torch.Size:
    return torch.Size(_integer_values(fields))


def _complex_value(fields: dict[str, Any]) -> complex:
    return complex(*struct.unpack(">dd", bytes.fromhex(fields["bits"])))


def _device_value(fields: dict[str, Any]) -> torch.device:
    if _DEVICE.fullmatch(fields["name"]) is None:
        raise FormatError("not the name of a device")
    return torch.device(fields["name"])


def _base64(value: bytes | bytearray) -> dict[str, Json]:
    return {"base64": base64.b64encode(value).decode()}


def _base64_value(fields: dict[str, Any]) -> bytes:
    return base64.b64decode(fields["base64"], validate=True)


VALUES = (
    ValueKind(complex, "complex", lambda v: {"bits": struct.pack(">dd", v.real, v.imag).hex()}, _complex_value),
    ValueKind(bytes, "bytes", _base64, _base64_value),
    ValueKind(bytearray, "bytearray", _base64, lambda f: bytearray(_base64_value(f))),
    ValueKind(
        slice,
        "slice",
        lambda v: {"items": _integers(v.start, v.stop, v.step)},
        lambda f: slice(*_integer_values(f, 3)),
    ),
    ValueKind(
        range,
        "range",
        lambda v: {"items": _integers(v.start, v.stop, v.step)},
        lambda f: range(*_integer_values(f, 3)),
    ),
    ValueKind(torch.Size, "size", lambda v: {"items": _integers(*v)}, _size_value),
    ValueKind(torch.dtype, "dtype", lambda v: {"name": torch_name(v)}, lambda f: TORCH_NAMES[f["name"]]),
    ValueKind(torch.device, "device", lambda v: {"name": str(v)}, _device_value),
    ValueKind(np.str_, "numpy_str", lambda v: {"text": text_node(str(v))}, lambda f: np.str_(_any_text(f["text"]))),
    ValueKind(np.bytes_, "numpy_bytes", lambda v: _base64(bytes(v)), lambda f: np.bytes_(_base64_value(f))),
)


def _any_text(node: object) -> str:
    if type(node) is str:
        return node
    if type(node) is not dict or node.get(TAG) != "str":
        raise FormatError("not a text")
    return _text_value(node)


def scalar_fields(value: np.generic) -> dict[str, Json] | None:
    """The fields of a NumPy scalar's node, or None where its type can't be stored."""
    dtype = value.dtype
    if type(value) is not dtype.type or numpy_stored(dtype) is None:
        return None
    return {"dtype": dtype.str, "bits": np.asarray(value).tobytes().hex()}


def _scalar_value(fields: dict[str, Any]) -> object:
    dtype = numpy_dtype(fields["dtype"])
    data = bytes.fromhex(fields["bits"])
    if dtype.kind in "SU" or len(data) != dtype.itemsize:
        raise FormatError("wrong size of a NumPy scalar")
    return np.frombuffer(data, dtype)[0]


VALUE_DECODERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "int": _hex_int,
    "float": _float_value,
    "str": _text_value,
    "scalar": _scalar_value,
    **{row.kind: row.decode for row in VALUES},
}
"""Kind of node → what makes the value of its fields."""

VALUE_ENCODERS = {row.cls: row for row in VALUES}
