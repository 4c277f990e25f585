"""A few bytes of each tensor, by which processes find out whether they hold the same."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ckptstore.state.device import flat_bytes
from ckptstore.state.tensors import TensorSource, tensor_image

WHOLE_BYTES = 16 << 10
"""Up to here all of a tensor is taken: random states, counters and statistics differ in single bytes."""
SAMPLE_BYTES = 256
_PLACES = 16


def samples(sources: Sequence[TensorSource]) -> list[bytes]:
    """Of each source some bytes: all of a small one, and of a large one from 16 places."""
    on_device = [source for source in sources if not source.near and source.place]
    fetched = _fetched(on_device)
    return [fetched[id(source)] if id(source) in fetched else _sample(source) for source in sources]


def _places(nbytes: int) -> list[tuple[int, int]]:
    """Offset and length of what is taken of ``nbytes`` bytes."""
    if nbytes <= WHOLE_BYTES:
        return [(0, nbytes)] if nbytes else []
    # The last one ends with the tensor.
    step = (nbytes - SAMPLE_BYTES) // (_PLACES - 1)
    return [(number * step // 16 * 16, SAMPLE_BYTES) for number in range(_PLACES - 1)] + [
        (nbytes - SAMPLE_BYTES, SAMPLE_BYTES)
    ]


def _sample(source: TensorSource) -> bytes:
    if source.live is None or source.nbytes <= WHOLE_BYTES:
        return b"".join(bytes(source.view(*place)) for place in _places(source.nbytes))
    if source.place:
        return b"".join(ctypes.string_at(source.place + begin, length) for begin, length in _places(source.nbytes))
    # Not contiguous: its image would be a copy of all of it.
    numbers = torch.linspace(0, source.live.numel() - 1, SAMPLE_BYTES, dtype=torch.float64).long()
    picked = source.live.detach()[torch.unravel_index(numbers.to(source.live.device), source.live.shape)]
    return tensor_image(picked).tobytes()


def _fetched(sources: Sequence[TensorSource]) -> dict[int, bytes]:
    """Samples from devices, which are waited for once."""
    pieces, sizes = [], []
    for source in sources:
        assert source.live is not None
        flat = flat_bytes(source.live)
        places = _places(source.nbytes)
        pieces += [flat[begin : begin + length] for begin, length in places]
        sizes.append(sum(length for _, length in places))
    if not pieces:
        return {}
    data = torch.cat([piece.cpu() if piece.device != pieces[0].device else piece for piece in pieces]).cpu().numpy()
    found, at = {}, 0
    for source, size in zip(sources, sizes, strict=True):
        found[id(source)] = data[at : at + size].tobytes()
        at += size
    return found
