"""One tensor on its way out (``TensorSource``) and in (``Destination``): flat little-endian C-order bytes."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state.device import DeviceReader
from ckptstore.state.dtypes import CARRIERS, CODE_BYTES, torch_dtype
from ckptstore.state.sharding import Box, Shard

Bytes = npt.NDArray[np.uint8]

MAX_DIMENSIONS = 64
"""The most that NumPy handles."""

# One lock for all: it is held while a view or a host copy is made, and copies don't gain from running at once.
_LOCK = threading.RLock()
# A forked child has no thread that could let go of it.
os.register_at_fork(after_in_child=_LOCK._at_fork_reinit)  # type: ignore[attr-defined]


# memmove with the interpreter lock held: letting go of it costs more than copying a small tensor.
_memmove_locked = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
_SMALL_BYTES = 1 << 16


def copy_memory(target: int, source: int, count: int) -> None:
    """Copy ``count`` bytes between addresses; a view of a small tensor would take ten times as long to make."""
    if count < _SMALL_BYTES:
        _memmove_locked(target, source, count)
    else:
        ctypes.memmove(target, source, count)


def address_of(buffer: memoryview) -> int:
    """Where a writable, not empty buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class TensorSpec(NamedTuple):
    """What is known of a stored tensor, when saving and when loading."""

    name: str
    """The path in the state, joined by "/", as ``model/layers.0.weight``."""
    dtype: str
    """Safetensors code of the stored elements."""
    shape: tuple[int, ...]
    """Of the stored elements."""
    logical: str | None = None
    """What one element is, where the stored elements are not the tensor's own: ``complex128`` is pairs of F64."""


class TensorSource:
    """A live tensor to be stored. It keeps the tensor alive, and its memory in place.

    Attributes:
        spec: name, stored type and stored shape.
        nbytes: of the contiguous image.
        live: the torch tensor itself, or None where the source is an array or bytes.
        place: where the image lies, for a contiguous tensor whose own memory it is, on the CPU or with a ``reader``; 0
            for all others.
        frozen: it is a parameter that isn't trained.
        fickle: nobody knows when it changes.
        shard: what it is a part of, where other processes have the other parts.
        base: where the tensor begins that it is some rows of; as ``place`` where it is all of one.
    """

    __slots__ = (
        "_array",
        "_image",
        "_kept",
        "_reader",
        "_storage",
        "_version",
        "base",
        "fickle",
        "frozen",
        "live",
        "nbytes",
        "place",
        "shard",
        "spec",
    )

    def __init__(
        self,
        spec: TensorSpec,
        nbytes: int,
        live: torch.Tensor | None,
        array: np.ndarray | None = None,
        *,
        place: int = 0,
        reader: DeviceReader | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.place = self.base = place
        self.shard = shard
        self._reader = reader
        # Held itself, because a tensor may be given other memory while its old one is still read.
        self._storage = live.untyped_storage() if live is not None and place else None
        self.spec = spec
        self.nbytes = nbytes
        self.live = live
        self.frozen = self.fickle = False
        self._array = array
        self._image: Bytes | None = None
        self._kept: Bytes | None = None
        self._version: int | None = None

    @property
    def whole(self) -> TensorSpec:
        """The tensor that it is, or is a part of."""
        if self.shard is None:
            return self.spec
        return self.spec._replace(name=self.shard.tensor, shape=self.shard.shape)

    @property
    def region(self) -> Box | None:
        """Where it lies in that; None where it is all of it."""
        return None if self.shard is None else self.shard.region

    @property
    def cuttable(self) -> bool:
        """Whether ``rows`` can be taken of it."""
        return bool(self.place and self.shard is None and self.live is not None and self.live.dim())

    def rows(self, begin: int, count: int) -> TensorSource:
        """Some rows of a whole tensor, as a source of their own: a shard of it."""
        assert self.live is not None
        spec = self.spec._replace(name=f"{self.spec.name}@{begin}", shape=(count, *self.spec.shape[1:]))
        row_bytes = self.nbytes // self.spec.shape[0]
        region = (begin, *(0,) * (len(spec.shape) - 1)), spec.shape
        part = TensorSource(
            spec,
            count * row_bytes,
            self.live[begin : begin + count],
            place=self.place + begin * row_bytes,
            reader=self._reader,
            shard=Shard(self.spec.name, self.spec.shape, region),
        )
        part.base, part.frozen = self.base, self.frozen
        return part

    def read_into(self, offset: int, out: memoryview) -> None:
        """Copy bytes ``[offset, offset + len(out))`` of the image into ``out``; any thread.

        The first call makes a host copy of a tensor that is not contiguous; others are read in place.
        """
        if not 0 <= offset <= offset + out.nbytes <= self.nbytes:
            raise ValueError(f"{self.spec.name}: {out.nbytes} bytes at {offset} are outside of {self.nbytes}")
        if not out.nbytes:
            return
        if self._is_in_place():
            if self._reader is None or self.live is None:
                copy_memory(address_of(out), self.place + offset, out.nbytes)
            else:
                self._reader.read_into(self.live, offset, out)
            return
        part = self._bytes()[offset : offset + out.nbytes]
        # NumPy lets go of the interpreter lock while it copies; a slice assignment of memoryviews doesn't.
        np.copyto(np.frombuffer(out, np.uint8), part)

    @property
    def near(self) -> bool:
        """Whether the image lies in this machine's memory, so that small pieces cost nothing."""
        return self._reader is None

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes ``[offset, offset + length)`` of the image, where they lie if that is here; any thread."""
        if not self._is_in_place():
            return self._bytes()[offset : offset + length].data
        if self.near:
            return memoryview((ctypes.c_ubyte * length).from_address(self.place + offset)).cast("B")
        copy = memoryview(bytearray(length))
        self.read_into(offset, copy)
        return copy

    def keep(self, out: Bytes, address: int, *, for_good: bool) -> None:
        """Copy the image into ``out``, which has its size, and read it from there, ``for_good`` or until ``rebase``.

        Args:
            address: of ``out``; asking each piece of one array for its own takes longer than the copy.
        """
        if self._is_in_place() and self.near:
            copy_memory(address, self.place, self.nbytes)
        elif self.nbytes:
            self.read_into(0, out.data)
        self._kept, self._image = out, None
        if for_good:
            self.place, self._storage, self._reader, self._version = 0, None, None, None

    def watch(self) -> None:
        """Note what the tensor is now, so that ``moved`` tells whether torch has written to it since."""
        self._version = None if self.live is None else self.live._version

    def rebase(self) -> None:
        """Read it from live memory from now on, and watch it, unless it was copied for good."""
        if self.live is not None and (self._kept is None or self.place):
            self._kept = None
            self.watch()

    def moved(self) -> bool:
        """Whether torch has written to the watched tensor. Writes through ``.data`` and NumPy can't be seen."""
        return self._version is not None and self.live is not None and self.live._version != self._version

    def release(self) -> None:
        """Drop the host copy that reading has made, if there is one."""
        self._image = None

    def _is_in_place(self) -> bool:
        return self.place != 0 and self._kept is None

    def _bytes(self) -> Bytes:
        if self._kept is not None:
            return self._kept
        image = self._image
        return self._make_image() if image is None else image

    def _make_image(self) -> Bytes:
        with _LOCK:
            if self._image is None:
                with self._reader.queue() if self._reader is not None else nullcontext():
                    self._image = array_image(self._array) if self.live is None else tensor_image(self.live)
            return self._image


def tensor_image(tensor: torch.Tensor) -> Bytes:
    """The tensor's bytes, as a view of its own memory where that is contiguous and on the CPU."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor.view(CARRIERS[tensor.element_size()]).cpu().contiguous()
    # Not reshaped: a single element is contiguous whatever its stride is, and keeps it.
    image: Bytes = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return image


def array_image(array: np.ndarray | None) -> Bytes:
    """The array's bytes, little-endian, as a view of its own memory where possible."""
    assert array is not None
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)


class Destination:
    """Where the bytes of one stored tensor go: the target's own memory, or a tensor allocated on first use.

    Attributes:
        copied: ``tensor`` will be called, and gives what was read only as long as nothing else changes the target.
    """

    __slots__ = ("_live", "_own", "copied", "nbytes", "region", "spec")

    def __init__(
        self, spec: TensorSpec, live: torch.Tensor | np.ndarray | None = None, region: Box | None = None
    ) -> None:
        """``live`` is contiguous, on the CPU, writable, and of the spec's type and shape.

        ``region``: what ``spec`` is of the stored tensor; None: all of it.
        """
        self.spec = spec
        self.region = region
        self.nbytes = stored_bytes(spec)
        self._live = live
        self._own: torch.Tensor | None = None
        self.copied = False

    def host(self) -> memoryview:
        """The writable bytes of the contiguous image; any thread."""
        if not self.nbytes:
            return memoryview(bytearray())
        if isinstance(self._live, np.ndarray):
            return self._live.reshape(-1).view(np.uint8).data
        tensor = self._allocated() if self._live is None else self._live
        return memoryview((ctypes.c_ubyte * self.nbytes).from_address(tensor.data_ptr())).cast("B")

    def tensor(self) -> torch.Tensor:
        """A tensor of its own with the bytes read: always the same object, never the target's memory."""
        fresh = self._own is None
        own = self._allocated()
        if fresh and self._live is not None and self.nbytes:
            image = own.reshape(-1).view(torch.uint8).numpy()
            np.copyto(image, np.frombuffer(self.host(), np.uint8))
        return own

    def image(self) -> Bytes:
        """The bytes read, in memory of their own."""
        if not self.nbytes:
            return np.empty(0, np.uint8)
        image: Bytes = self.tensor().reshape(-1).view(torch.uint8).numpy()
        return image

    def _allocated(self) -> torch.Tensor:
        with _LOCK:
            if self._own is None:
                self._own = _allocate(self.spec, self.nbytes)
            return self._own


def _allocate(spec: TensorSpec, nbytes: int) -> torch.Tensor:
    try:
        if spec.logical is not None and spec.logical.startswith("numpy:"):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        dtype = torch_dtype(spec.dtype, spec.logical)
        # The device is named so that a default device of the caller's doesn't take the tensor away from the host.
        return torch.empty(tensor_shape(spec, dtype), dtype=dtype, device="cpu")
    except RuntimeError as error:
        if "allocate memory" in str(error):
            # No damage: "latest" must not go back to an older checkpoint because of it.
            raise StateError(
                f"there is no memory for the {nbytes} bytes of {spec.name!r}: free some, load a part with only=, or "
                "into= tensors that exist",
                path=spec.name,
            ) from error
        raise FormatError(f"no tensor of shape {list(spec.shape)} can be made for {spec.name!r}: {error}") from error


def tensor_shape(spec: TensorSpec, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the torch tensor, in elements of ``dtype``.

    Raises:
        FormatError: pairs are stored, and the last dimension is not 2.
    """
    if dtype not in (torch.complex128, torch.complex32):
        return spec.shape
    if spec.shape[-1:] != (2,):
        raise FormatError(f"{spec.name!r} holds {spec.logical} and must end in a dimension of 2: {list(spec.shape)}")
    return spec.shape[:-1]


def stored_bytes(spec: TensorSpec) -> int:
    """Size of the image in bytes.

    Raises:
        FormatError: unknown element type, or a shape that no tensor has.
    """
    size = CODE_BYTES.get(spec.dtype)
    if size is None:
        raise FormatError(f"element type {spec.dtype!r} of {spec.name!r} is unknown")
    fits = len(spec.shape) <= MAX_DIMENSIONS
    for length in spec.shape:
        fits = fits and type(length) is int and 0 <= length < 2**63
    if not fits:
        raise FormatError(f"{list(spec.shape)!r} is no shape of a tensor ({spec.name!r})")
    return size * math.prod(spec.shape)
