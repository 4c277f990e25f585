"""The states of several checkpoints as their weighted mean, made piece by piece while it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ckptstore.engine.streamed import Computed, Streamed
from ckptstore.engine.tensorreader import TensorReader
from ckptstore.engine.workers import default_threads, run
from ckptstore.errors import FormatError, StateError
from ckptstore.format.tensorfile import BLOCK_BYTES, TensorRow
from ckptstore.state.dtypes import TORCH_NAMES, TORCH_STORED, torch_dtype, torch_name
from ckptstore.state.restore import restore_plain
from ckptstore.state.tensors import TensorSpec
from ckptstore.tools.elements import serial_parts
from ckptstore.tools.statetree import named, taken

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_PAIRS = ("complex128", "complex32")
_SHORT_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def result_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type of floating-point numbers, by torch's name of it or as ``bf16``.

    Raises:
        FormatError: it is none that can be stored.
    """
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = TORCH_NAMES.get(_SHORT_NAMES.get(name, name))
    else:
        found = dtype
    if dtype is not None and (found not in TORCH_STORED or TORCH_STORED[found].code not in _FLOATS):
        raise FormatError(f"dtype={dtype!r} must be a type of floating-point numbers, as 'fp32', 'bf16' or 'fp16'")
    return found


def _components(row: TensorRow) -> torch.dtype | None:
    """The real type of which the elements of a stored tensor are made, or None where no mean is taken of them."""
    if row.dtype == "C64" and row.logical is None:
        return torch.float32
    if row.dtype in _FLOATS and (row.logical is None or row.logical in _PAIRS):
        return torch_dtype(row.dtype, None)
    return None


def _kind(row: TensorRow) -> str:
    """What may be averaged with each other: numbers of any precision, complex ones, and others of one type."""
    if _components(row) is None or row.dtype == "C64" or row.logical is not None:
        return row.logical or row.dtype
    return "numbers"


class Mean:
    """The weighted mean of several states; the last one tells their structure, and all that is no weight.

    Args:
        readers: of the checkpoints, the newest last.
        shares: of each in the mean of itself and those before it: 1 for the first.
        only: patterns of names, as ``taken``.
        dtype: that floating-point tensors are rounded to; None: that of the newest checkpoint.

    Raises:
        StateError: they don't fit each other; all misfits are listed.
    """

    def __init__(
        self,
        readers: Sequence[TensorReader],
        shares: Sequence[float],
        only: Sequence[str] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._readers = list(readers)
        self._shares = shares
        self.tree = taken(self._readers[-1].tree, only)
        kinds = dict(named(self.tree))
        self._check(kinds, only)
        self._scratch = threading.local()
        self.sources = [self._source(name, dtype if kind == "tensor" else None) for name, kind in kinds.items()]

    def streamed(self, parameters: int) -> Streamed:
        """The mean, to be saved."""
        return Streamed(self.tree, self.sources, parameters)

    def plain(self) -> Any:
        """The mean in memory, as plain data."""
        specs = [TensorSpec(*source.row) for source in self.sources]
        restoration = restore_plain(self.tree, specs)
        tasks = [
            (source, offset)
            for source in self.sources
            if source.row.name in restoration.wanted
            for offset in range(0, source.nbytes, BLOCK_BYTES)
        ]

        def work(task: tuple[Computed, int]) -> None:
            source, offset = task
            host = restoration.wanted[source.row.name].host()
            source.read_into(offset, host[offset : offset + BLOCK_BYTES])

        run(tasks, work, threads=default_threads())
        return restoration.finish()

    def _check(self, kinds: dict[str, str], only: Sequence[str] | None) -> None:
        newest, misfits = self._readers[-1], []
        for name in kinds:
            if name not in newest.tensors:
                raise FormatError(f"the tree of {newest.contents.commit.id} names the tensor {name!r:.99}: it has none")
        for reader in self._readers[:-1]:
            id = reader.contents.commit.id
            for name in kinds:
                problem = _misfit(newest.tensors[name], reader.tensors.get(name))
                misfits += [f"{name}: {problem} in {id}"] if problem else []
            more = dict.fromkeys(name for name, _ in named(taken(reader.tree, only)) if name not in kinds)
            misfits += [f"{name}: only in {id}" for name in more]
        if misfits:
            raise StateError(
                f"these checkpoints don't fit {newest.contents.commit.id}, with which they should be averaged: "
                f"{'; '.join(misfits)}. Leave out some checkpoints, or these tensors with only=",
                path=misfits[0].partition(": ")[0],
            )

    def _source(self, name: str, dtype: torch.dtype | None) -> Computed:
        newest = self._readers[-1]
        row = newest.tensors[name]._replace(name=name)
        types = [_components(reader.tensors[name]) for reader in self._readers]
        own = types[-1]
        if own is None:
            return Computed(row, partial(newest.read_into, name))
        if dtype is not None and _kind(row) == "numbers":
            own, row = dtype, row._replace(dtype=TORCH_STORED[dtype].code)
        stored = [kind for kind in types if kind is not None]
        wide = torch.float64 if torch.float64 in stored else torch.float32
        return Computed(row, partial(self._fill, name, stored, wide, own))

    def _fill(
        self, name: str, stored: list[torch.dtype], wide: torch.dtype, own: torch.dtype, offset: int, out: memoryview
    ) -> None:
        """Bytes of the mean of one tensor, from all states one after the other: no more than one block of each."""
        made = torch.frombuffer(out, dtype=own)
        begin, count = offset // own.itemsize, len(made)
        total = made if own is wide else self._wide(count, wide)
        for reader, dtype, share in zip(self._readers, stored, self._shares, strict=True):
            size = dtype.itemsize
            for at, view in reader.views(name, begin * size, count * size):
                piece = torch.frombuffer(view, dtype=dtype)
                first = at // size - begin
                _blend(total[first : first + len(piece)], piece, share)
        if total is not made:
            _each(torch._foreach_copy_, made, total)

    def _wide(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for so many elements, the same in each call of a thread."""
        kept: torch.Tensor | None = getattr(self._scratch, torch_name(dtype), None)
        if kept is None or len(kept) < count:
            kept = torch.empty(count, dtype=dtype, device="cpu")
            setattr(self._scratch, torch_name(dtype), kept)
        return kept[:count]


def _misfit(own: TensorRow, other: TensorRow | None) -> str:
    if other is None:
        return "missing"
    if own.shape != other.shape:
        return f"{list(other.shape)} instead of {list(own.shape)}"
    return "" if _kind(own) == _kind(other) else f"{_kind(other)} instead of {_kind(own)}"


def _blend(total: torch.Tensor, piece: torch.Tensor, share: float) -> None:
    """``total`` becomes the mean of itself and ``piece``, which has this share."""
    if share == 1:
        _each(torch._foreach_copy_, total, piece)
        return
    if piece.dtype is total.dtype:
        _each(torch._foreach_lerp_, total, piece, share)
        return
    for part, narrow in zip(serial_parts(total), serial_parts(piece), strict=True):
        part.lerp_(narrow.to(total.dtype), share)


def _each(action: Callable[..., object], target: torch.Tensor, source: torch.Tensor, *more: float) -> None:
    """One call for many small pieces, during which other threads run."""
    action(serial_parts(target), serial_parts(source), *more)
