"""What PyTorch's ``FileSystemWriter`` says of its files: ``.metadata``, which is a pickle, read without running it.

``pickletools`` takes the pickle apart, as it does for people who look at one; here a small stack machine puts together
what it describes. It makes lists, dicts, tuples, numbers and text, and for each object of a class a ``Described``,
which has the class's name and what it was made of. Nothing is imported or called.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.format.regions import Region, tiles
from ckptstore.state.dtypes import TORCH_NAMES
from ckptstore.tools.importing.dcpnames import Path

METADATA_LIMIT = 256 << 20
"""Bytes that ``.metadata`` may have: that of a million tensors has."""

_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 60
_MAX_CHUNKS = 1 << 22
"""Of all tensors together: a pickle can name one long list a million times."""

_DCP = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_ENUMS = (f"{_DCP}._MEM_FORMAT_ENCODING", f"{_SHARDED}.MEM_FORMAT_ENCODING")
_ALLOWED = frozenset((
    f"{_DCP}.Metadata", f"{_DCP}.TensorStorageMetadata", f"{_DCP}.BytesStorageMetadata", f"{_DCP}.ChunkStorageMetadata",
    f"{_DCP}.MetadataIndex", f"{_DCP}.TensorProperties", f"{_DCP}.StorageMeta", f"{_SHARDED}.TensorProperties", _INFO,
    *_ENUMS, "torch.Size", "torch.serialization._get_layout", "builtins.getattr", "collections.OrderedDict",
    *(f"torch.{name}" for name in TORCH_NAMES),
))  # fmt: skip
# In what ``StorageMeta`` notes of the folder's name.
_PATHS = re.compile(r"pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path", re.ASCII)

_MALFORMED = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Place(NamedTuple):
    """Bytes ``[begin, begin + length)`` of a file: what one call of ``torch.save`` wrote."""

    file: str
    begin: int
    length: int


class Chunk(NamedTuple):
    """A stored piece of a tensor."""

    region: Region
    place: Place


@dataclass(frozen=True)
class TensorEntry:
    """A tensor, and the pieces that make it up exactly."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


@dataclass(frozen=True)
class DcpContents:
    """What a folder written by DCP holds.

    Attributes:
        entries: tensors, and where objects lie, by key, flattened as DCP does it.
        paths: where in the nested state a key belongs; None where it was saved as it was.
    """

    entries: Mapping[str, TensorEntry | Place]
    paths: Mapping[str, Path] | None

    @property
    def places(self) -> list[Place]:
        """All that is to be read, in order."""
        found: list[Place] = []
        for entry in self.entries.values():
            found.extend([entry] if isinstance(entry, Place) else [chunk.place for chunk in entry.chunks])
        return sorted(found)


class Named(NamedTuple):
    """A class or function that a pickle names."""

    name: str


@dataclass(eq=False)
class Described:
    """An object as a pickle describes it: ``of`` was made or called with ``arguments``, and given ``state``."""

    of: str
    arguments: Any
    state: Any = None


def read_metadata(data: bytes, name: str) -> DcpContents:
    """What ``data``, the bytes of the file ``name``, says.

    Raises:
        StateError: a class or function is named in it that DCP's own metadata don't need, or streams were transformed.
        FormatError: it is malformed, contradicts itself, or points outside of its folder.
    """
    try:
        return _contents(_unpickled(data))
    except FormatError as error:
        raise FormatError(f"{name} is malformed: {error}", key=name) from error
    except StateError as error:
        raise StateError(f"{name} {error}", path=name) from error
    except _MALFORMED as error:
        raise FormatError(f"{name} is malformed: {error!r:.300}", key=name) from error


# -- the stack machine ---------------------------------------------------------------------------------------


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pack(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def name(self, full: str) -> None:
        if full not in _ALLOWED and _PATHS.fullmatch(full) is None:
            raise StateError(
                f"names {full[:200]}, which is not among what DCP's own metadata are made of, and nothing that is "
                "loaded may run: if you trust it, load it with torch.distributed.checkpoint, and save that"
            )
        self.stack.append(Named(full))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{_text(module)}.{_text(name)}")

    def describe(self) -> None:
        arguments, of = self.stack.pop(), self.stack.pop()
        if not isinstance(of, Named) or not isinstance(arguments, tuple):
            raise FormatError("something is called that isn't named")
        self.stack.append(Described(of.name, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Described) or target.state is not None:
            raise FormatError("a state is given to what takes none")
        target.state = state

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise FormatError("items are put into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple of tuples of tuples can take for ever to hash.
            if type(key) not in (str, int) and not isinstance(key, Described):
                raise FormatError("a dict has a key that is none")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise FormatError("items are put into what is no list")
        self.stack[-1].extend(items)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, arg: None,
    "FRAME": lambda m, arg: None,
    "MARK": lambda m, arg: m.mark(),
    "MEMOIZE": lambda m, arg: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, arg: m.memo.__setitem__(arg, m.stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, arg: m.push(m.memo[arg])),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE"),
        lambda m, arg: m.push(arg),
    ),
    "NONE": lambda m, arg: m.push(None),
    "NEWTRUE": lambda m, arg: m.push(True),
    "NEWFALSE": lambda m, arg: m.push(False),
    "EMPTY_TUPLE": lambda m, arg: m.push(()),
    "EMPTY_LIST": lambda m, arg: m.push([]),
    "EMPTY_DICT": lambda m, arg: m.push({}),
    "TUPLE": lambda m, arg: m.push(tuple(m.above_mark())),
    "TUPLE1": lambda m, arg: m.pack(1),
    "TUPLE2": lambda m, arg: m.pack(2),
    "TUPLE3": lambda m, arg: m.pack(3),
    "APPEND": lambda m, arg: m.append([m.stack.pop()]),
    "APPENDS": lambda m, arg: m.append(m.above_mark()),
    "SETITEM": lambda m, arg: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, arg: m.set_items(m.above_mark()),
    "GLOBAL": lambda m, arg: m.name(arg.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, arg: m.stack_name(),
    "NEWOBJ": lambda m, arg: m.describe(),
    "REDUCE": lambda m, arg: m.describe(),
    "BUILD": lambda m, arg: m.build(),
}


def _unpickled(data: bytes) -> Any:
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            return machine.stack.pop()
        step = _STEPS.get(opcode.name)
        if step is None:
            raise FormatError(f"it has the instruction {opcode.name}, which no metadata need")
        step(machine, argument)
    raise FormatError("it has no end")


# -- what it means -------------------------------------------------------------------------------------------


def _contents(root: Any) -> DcpContents:
    fields = _fields(root, f"{_DCP}.Metadata")
    places = _places(fields.get("storage_data"))
    entries: dict[str, TensorEntry | Place] = {}
    described = _dict(fields.get("state_dict_metadata"))
    _check_count(described.values())
    for key, entry in described.items():
        if _is(entry, f"{_DCP}.TensorStorageMetadata"):
            entries[_text(key)] = _tensor(key, entry, places)
        elif _is(entry, f"{_DCP}.BytesStorageMetadata"):
            entries[_text(key)] = _place(places, key, None)
        else:
            raise FormatError(f"{key!r:.100} is neither a tensor nor an object")
    found = DcpContents(entries, _key_paths(fields.get("planner_data")))
    for one, next in pairwise(found.places):
        if one.file == next.file and next.begin < one.begin + one.length:
            raise FormatError(f"two entries share the bytes from {next.begin} of {next.file}")
    return found


def _check_count(described: Iterable[Any]) -> None:
    tensors = [entry for entry in described if _is(entry, f"{_DCP}.TensorStorageMetadata")]
    if sum(len(_list(_dict(entry.state).get("chunks"))) for entry in tensors) > _MAX_CHUNKS:
        raise FormatError("its tensors have more chunks than any checkpoint")


def _places(value: Any) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    places = {}
    for index, info in _dict(value).items():
        key = _fields(index, f"{_DCP}.MetadataIndex")
        offset = None if key.get("offset") is None else _size(key["offset"])
        places[_text(key.get("fqn")), offset] = _storage_info(info)
    return places


def _storage_info(info: Any) -> Place:
    fields = _fields(info, _INFO)
    file, begin, length = _text(fields.get("relative_path")), fields.get("offset"), fields.get("length")
    if not file or file in (".", "..") or set(file) & {"/", "\\", "\0"}:
        raise FormatError(f"{file!r:.200} is no name of a file in the same folder")
    if fields.get("transform_descriptors"):
        raise StateError(
            f"says that {file} went through {fields['transform_descriptors']!r:.200}: load it with DCP and those "
            "extensions, and save that"
        )
    return Place(file, _integer(begin), _integer(length))


def _tensor(key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...] | None], Place]) -> TensorEntry:
    fields = _fields(entry, f"{_DCP}.TensorStorageMetadata")
    shape = _size(fields.get("size"))
    regions = []
    for chunk in _list(fields.get("chunks")):
        box = _fields(chunk, f"{_DCP}.ChunkStorageMetadata")
        regions.append(Region(_size(box.get("offsets")), _size(box.get("sizes"))))
    if not tiles(shape, regions):
        raise FormatError(
            f"the chunks of {key!r:.100} don't make it up: some are missing, overlap or lie outside of it"
        )
    chunks = [Chunk(region, _place(places, key, region.offset)) for region in regions if prod(region.shape)]
    return TensorEntry(_dtype(fields.get("properties")), shape, chunks)


def _place(
    places: Mapping[tuple[str, tuple[int, ...] | None], Place], key: str, offset: tuple[int, ...] | None
) -> Place:
    if (key, offset) not in places:
        raise FormatError(f"it doesn't say where {key!r:.100} lies")
    return places[key, offset]


def _dtype(properties: Any) -> torch.dtype:
    if not isinstance(properties, Described) or properties.of.rpartition(".")[2] != "TensorProperties":
        raise FormatError("a tensor has no properties")
    named = properties.state[0]
    dtype = TORCH_NAMES.get(named.name.removeprefix("torch.")) if isinstance(named, Named) else None
    if dtype is None:
        raise FormatError("a tensor has no element type")
    return dtype


def _key_paths(value: Any) -> Mapping[str, Path] | None:
    if type(value) is not dict:
        # A planner that flattens nothing has none, or what only it understands.
        return None
    for key, path in value.items():
        if type(key) is not str or type(path) is not tuple or not {*map(type, path)} <= {str, int}:
            raise FormatError("its planner's data don't say where in the state a key belongs")
    return value


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Described) and value.of == name


def _fields(value: Any, name: str) -> dict[Any, Any]:
    if not _is(value, name):
        raise FormatError(f"it has no {name.rpartition('.')[2]} where one belongs")
    return _dict(value.state)


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise FormatError("it has no dict where one belongs")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise FormatError("it has no list where one belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise FormatError("it has no text where one belongs")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise FormatError("it has no count where one belongs")
    return value


def _size(value: Any) -> tuple[int, ...]:
    if not _is(value, "torch.Size") or len(value.arguments) != 1 or type(value.arguments[0]) is not tuple:
        raise FormatError("it has no torch.Size where one belongs")
    size: tuple[int, ...] = value.arguments[0]
    if len(size) > _MAX_DIMENSIONS or prod(extent for extent in map(_integer, size) if extent) >= _MAX_ELEMENTS:
        raise FormatError("a size can't be")
    return size
