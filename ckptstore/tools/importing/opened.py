"""A foreign checkpoint, open: its tree and tensors, as a store takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ckptstore.engine.streamed import Computed, Streamed
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, StateError
from ckptstore.format.tensorfile import TensorRow
from ckptstore.state.dtypes import torch_dtype
from ckptstore.state.encode import Encoder
from ckptstore.state.restore import restore_plain
from ckptstore.state.select import ABSENT, Selection
from ckptstore.state.tensors import TensorSpec, stored_bytes
from ckptstore.state.values import TAG, VALUE_DECODERS, is_plain_text
from ckptstore.tools.importing import dcpfolder
from ckptstore.tools.importing.dcpfiles import to_fields
from ckptstore.tools.importing.facts import facts_of, question, told_by_values
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.sandbox import Reader, Sandbox
from ckptstore.tools.importing.stfiles import Entry, SafetensorsFile
from ckptstore.tools.importing.told import Told
from ckptstore.tools.importing.torchfiles import open_file

_INDEX_SUFFIX = ".index.json"
_INDEX_LIMIT = 64 << 20
_KINDS = frozenset(VALUE_DECODERS) | {
    "tensor", "ndarray", "bytes", "bytearray", "tuple", "dict", "ordered_dict", "default_dict", "counter", "set",
    "frozenset", "deque", "namespace",
}  # fmt: skip
"""What a reader's tree may have in it: nothing that would make an object of a registered class."""


Fill: TypeAlias = Callable[[int, memoryview], None]


@dataclass
class _Part:
    """What one component became: its node, and the tensors in it."""

    node: Any
    sources: list[tuple[TensorSpec, Fill]]


class Opened:
    """One checkpoint, open; use as a context manager.

    Attributes:
        state: its tree, and what reads its tensors.
        told: what its content says of it.
        left_out: path or file → why it isn't imported.
        failure: what went wrong while a tensor was read.
    """

    state: Streamed
    told: Told
    left_out: dict[str, str]

    def __init__(
        self,
        found: Found,
        sandbox: Sandbox,
        *,
        only: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        without_refused: bool = False,
        check: bool = True,
        pulse: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Open ``found``.

        Args:
            found: what it is.
            sandbox: makes the process that reads what may be hostile.
            only: patterns of what is wanted.
            skip: flat keys of a DCP that are left out.
            without_refused: leave out what only running code could make.
            check: prove all that has checksums of its own.
            pulse: called with the number of bytes proven so far.

        Raises:
            StateError: something in it would need code to run; or ``only`` matches nothing.
            FormatError, IntegrityError, StorageError: it is none, or damaged, or hostile, or can't be read.
        """
        self.left_out = dict(found.left_out)
        self._found, self._skip = found, skip
        self._without_refused, self._check = without_refused, check
        self.told = told_by_values(found)
        self.failure: CheckpointError | None = None
        self._stack = ExitStack()
        try:
            parts = self._by_hand()
            if jobs := self._jobs():
                parts |= self._by_reader(sandbox, jobs, pulse)
            parts |= {name: _encoded(value, name) for name, value in found.values.items()}
            self.state = _assembled(parts, only, self._noted)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def close(self) -> None:
        """End its reader, and close its files."""
        self._stack.close()

    def _noted(self, fill: Fill) -> Fill:
        """``fill``, whose errors are told from those of the store."""

        def noting(offset: int, out: memoryview) -> None:
            try:
                fill(offset, out)
            except CheckpointError as error:
                self.failure = self.failure or error
                raise

        return noting

    # -- safetensors --------------------------------------------------------------------------------------------

    def _by_hand(self) -> dict[str, _Part]:
        """The components that are safetensors, which hold nothing that could run."""
        parts: dict[str, _Part] = {}
        for component, path in self._found.files.items():
            if path.name.endswith((".safetensors", ".safetensors" + _INDEX_SUFFIX)):
                parts[component] = self._safetensors(component, _pieces(path))
        return parts

    def _safetensors(self, component: str, paths: Sequence[Path]) -> _Part:
        state: dict[str, torch.Tensor] = {}
        fills: dict[int, Fill] = {}
        for path in paths:
            file = SafetensorsFile(path, self._stack.enter_context(open_file(str(path))))
            for name, entry in file.entries.items():
                if name in state:
                    raise FormatError(f"{path} has {name!r:.100}, which another part has, too", key=str(path))
                row = TensorSpec(name, entry.dtype, entry.shape, entry.logical)
                stands = torch.empty((), dtype=torch_dtype(row.dtype, row.logical))
                state[name] = stands.expand(row.shape) if 0 not in row.shape else stands.new_empty(row.shape)
                fills[id(state[name])] = _reading(file, entry)
        encoder = Encoder()
        node = encoder.encode(state, component)
        return _Part(node, [(source.spec, fills[id(source.live)]) for source in encoder.sources])

    # -- all else -----------------------------------------------------------------------------------------------

    def _jobs(self) -> list[dict[str, Any]]:
        jobs = []
        for component, path in self._found.files.items():
            if path.is_dir():
                folder = dcpfolder.open_folder(path, self._skip)
                jobs.append({"component": component, "folder": str(folder.path), "dcp": to_fields(folder.contents)})
            elif not path.name.endswith((".safetensors", ".safetensors" + _INDEX_SUFFIX)):
                jobs.append({"component": component, "paths": [str(piece) for piece in _pieces(path)]})
        return jobs

    def _by_reader(
        self, sandbox: Sandbox, jobs: list[dict[str, Any]], pulse: Callable[[int], None]
    ) -> dict[str, _Part]:
        sizes = [size for job in jobs for size in _sizes(job)]
        job = {
            "parts": jobs,
            "question": question(self._found),
            "stand_in": self._without_refused,
            "check": self._check,
        }
        reader = self._stack.enter_context(sandbox.reader(str(self._found.path)))
        answer = reader.open(job, size=sum(sizes), files=len(sizes), pulse=pulse)
        try:
            sources = _sources(reader, answer["tensors"])
            nodes = {str(name): node for name, node in answer["nodes"].items()}
            if nodes.keys() != {one["component"] for one in jobs}:
                raise ValueError("other components than asked for")
            _check_kinds(list(nodes.values()))
            self.left_out |= {str(path): f"{why!s:.500}" for path, why in answer["left_out"].items()}
            self.told = facts_of(answer["told"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"the reader of {self._found.path} answers nonsense: {error}") from error
        # The sources of one process are told apart by the tree.
        first, *others = nodes.items()
        return {first[0]: _Part(first[1], sources), **{name: _Part(node, []) for name, node in others}}


def _reading(file: SafetensorsFile, entry: Entry) -> Fill:
    return lambda offset, out: file.read(entry, offset, out)


def _encoded(value: Any, component: str) -> _Part:
    encoder = Encoder()
    node = encoder.encode(value, component)
    encoder.finish()
    if encoder.sources:
        raise StateError(f"{component!r} is no plain value", path=component)
    return _Part(node, [])


def _pieces(path: Path) -> list[Path]:
    """The files that make up a component: one, or those that an index names.

    Raises:
        FormatError: the index is malformed, or names something outside of its folder.
        IntegrityError: a file is missing.
    """
    if not path.name.endswith(_INDEX_SUFFIX):
        return [path]
    with open_file(str(path)) as file:
        data = file.read(_INDEX_LIMIT + 1)
    try:
        names = sorted(set(json.loads(data.decode())["weight_map"].values())) if len(data) <= _INDEX_LIMIT else []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is no index of files: {error}", key=str(path)) from error
    for name in names:
        if type(name) is not str or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
            raise FormatError(f"{path} names {name!r:.200}, which is no file in the same folder", key=str(path))
        if not (path.parent / name).exists():
            raise IntegrityError(f"{path.parent / name} is missing, which {path.name} names", key=name)
    if not names:
        raise FormatError(f"{path} names no files", key=str(path))
    return [path.parent / name for name in names]


def _sizes(job: Mapping[str, Any]) -> list[int]:
    """The bytes of a job's files."""
    if "dcp" in job:
        folder = job["folder"]
        places = [row[-1] if len(row) == 2 else None for row in job["dcp"]["entries"]]
        chunks = [chunk[2] for row in job["dcp"]["entries"] if len(row) > 2 for chunk in row[3]]
        names = {place[0] for place in [*filter(None, places), *chunks]}
        paths = [os.path.join(folder, name) for name in names]
    else:
        paths = job["paths"]
    sizes = []
    for path in paths:
        with open_file(path) as file:
            sizes.append(os.fstat(file.fileno()).st_size)
    return sizes


def _sources(reader: Reader, rows: Any) -> list[tuple[TensorSpec, Fill]]:
    """The tensors that a reader says it has, checked."""
    sources = []
    for index, (name, dtype, shape, logical, nbytes) in enumerate(rows):
        if type(name) is not str or not name or not (logical is None or type(logical) is str):
            raise ValueError("a tensor has no name")
        spec = TensorSpec(name, dtype, tuple(shape), logical)
        if type(dtype) is not str or stored_bytes(spec) != nbytes:
            raise ValueError(f"{name!r:.100} has another size than its shape")
        sources.append((spec, _asking(reader, index)))
    return sources


def _asking(reader: Reader, index: int) -> Fill:
    return lambda offset, out: reader.read(index, offset, out)


def _check_kinds(nodes: list[Any]) -> None:
    """Nothing, if all tagged nodes are plain data (ValueError)."""
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if TAG in node and node[TAG] not in _KINDS:
                raise ValueError(f"a value of the kind {node[TAG]!r:.40}")
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)


def _assembled(parts: Mapping[str, _Part], only: Sequence[str] | None, noted: Callable[[Fill], Fill]) -> Streamed:
    """The whole state, checked as one that is loaded from a store.

    Raises:
        FormatError: the tree and the tensors don't fit together.
        StateError: ``only`` matches nothing.
    """
    tree = _tree({name: part.node for name, part in parts.items()})
    sources = [source for part in parts.values() for source in part.sources]
    specs = {spec.name: spec for spec, _ in sources}
    if len(specs) != len(sources):
        raise FormatError("two tensors of it have one name")
    if only is not None:
        tree = _without_holes(Selection(only, whole_statefuls=True).prune(tree))
    wanted = restore_plain(tree, list(specs.values())).wanted
    if only is None and wanted.keys() != specs.keys():
        raise FormatError("it has tensors that its tree doesn't name")
    rows = [(TensorRow(*spec), fill) for spec, fill in sources if spec.name in wanted]
    return Streamed(tree, [Computed(row, noted(fill)) for row, fill in rows], 0)


def _tree(nodes: dict[str, Any]) -> Any:
    for name in nodes:
        if "/" in name or name == TAG or not is_plain_text(name):
            raise FormatError(f"{name!r:.100} can't be a component's name")
    if list(nodes) == [""]:
        return nodes[""]
    root = nodes.pop("", None)
    if root is None:
        return nodes
    # A file's whole content, and what lies beside it.
    return {**nodes, **root} if isinstance(root, dict) and TAG not in root else {"state": root, **nodes}


def _without_holes(node: Any) -> Any:
    """A pruned tree that JSON can hold: lists close up."""
    if isinstance(node, list):
        return [_without_holes(item) for item in node if item is not ABSENT]
    if isinstance(node, dict):
        return {key: _without_holes(item) for key, item in node.items()}
    return node
