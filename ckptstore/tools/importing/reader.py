"""The process that reads one foreign checkpoint: takes it apart, then hands out the bytes of its tensors."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ckptstore.errors import CheckpointError, FormatError
from ckptstore.state.encode import Encoder
from ckptstore.state.tensors import TensorSource, tensor_image
from ckptstore.tools.importing import channel, confine
from ckptstore.tools.importing.dcpfiles import ChunkedTensor, DcpFolder, from_fields
from ckptstore.tools.importing.facts import answer as told_by
from ckptstore.tools.importing.plain import Plainer
from ckptstore.tools.importing.torchfiles import load_file

_PIECE = 8 << 20
_PULSE_BYTES = 64 << 20
_MAX_GROWTH = 4
"""A state's tensors together may have so many times the bytes of their files: those that share memory are whole."""
_SLACK = 64 << 20


def serve(sock: socket.socket) -> None:
    """Do one job, as the other side says, until that closes the socket."""
    try:
        kind, length = channel.receive_head(sock)
        job = json.loads(channel.receive_payload(sock, kind, length))
        confine.limit(**job["limits"])
        confine.lock()
        sources = _answered(sock, job)
        while sources is not None:
            kind, length = channel.receive_head(sock)
            index, offset, count = channel.REQUEST.unpack(channel.receive_payload(sock, kind, length))
            _hand_out(sock, sources[index], offset, count)
    except channel.GoneError:
        return


def _answered(sock: socket.socket, job: dict[str, Any]) -> list[Callable[[int, int], Any]] | None:
    try:
        answer, sources = _opened(job, _pulse(sock))
        channel.send_json(sock, answer)
        return sources
    except CheckpointError as error:
        known = {name: getattr(error, name) for name in ("path", "key") if getattr(error, name, None)}
        fields = {"code": error.code, "message": str(error)[:20_000], **known}
    except MemoryError:
        fields = {"code": "memory", "message": ""}
    except RecursionError:
        fields = {"code": "format", "message": "it is nested deeper than any state"}
    except Exception as error:
        fields = {"code": "format", "message": f"it can't be read: {type(error).__name__}: {error!s:.2000}"}
    channel.send_json(sock, fields, channel.ERROR)
    return None


def _pulse(sock: socket.socket) -> Callable[[int], None]:
    told = 0

    def pulse(done: int) -> None:
        nonlocal told
        if not told <= done < told + _PULSE_BYTES:
            told = done
            channel.send(sock, channel.PULSE, done.to_bytes(8, "little"))

    return pulse


def _opened(job: dict[str, Any], pulse: Callable[[int], None]) -> tuple[Any, list[Callable[[int, int], Any]]]:
    encoder, plainer = Encoder(), Plainer()
    chunked: dict[int, ChunkedTensor] = {}
    state: dict[str, Any] = {}
    nodes = {}
    for part in job["parts"]:
        component = part["component"]
        value = plainer.walk(_value(part, job, chunked, plainer, pulse), component)
        state[component] = value
        nodes[component] = encoder.encode(value, component)
    encoder.finish()
    _check_growth(encoder.sources, job["size"])
    if job["check"]:
        done = 0
        for tensor in chunked.values():
            for length in tensor.check():
                done += length
                pulse(done)
    root = state.pop("", {})
    answer = {
        "nodes": nodes,
        "tensors": [[*source.spec, source.nbytes] for source in encoder.sources],
        "told": told_by(job["question"], {**state, **root} if isinstance(root, Mapping) else state),
        "left_out": plainer.left_out,
    }
    return answer, [_reading(source, chunked) for source in encoder.sources]


def _value(
    part: dict[str, Any],
    job: dict[str, Any],
    chunked: dict[int, ChunkedTensor],
    plainer: Plainer,
    pulse: Callable[[int], None],
) -> Any:
    if "dcp" in part:
        folder = DcpFolder(Path(part["folder"]), from_fields(part["dcp"]), stand_in=job["stand_in"])
        state = folder.state()
        chunked.update(folder.tensors)
        plainer.left_out.update(folder.left_out)
        return state
    loaded = [load_file(path, stand_in=job["stand_in"], check=job["check"], pulse=pulse) for path in part["paths"]]
    if len(loaded) == 1:
        return loaded[0]
    merged: dict[Any, Any] = {}
    for path, piece in zip(part["paths"], loaded, strict=True):
        if not isinstance(piece, dict):
            raise FormatError(f"{path} holds no dict of tensors, as a part of one state does", key=path)
        if twice := merged.keys() & piece.keys():
            raise FormatError(f"{path} has {min(map(str, twice))!r:.100}, which another part has, too", key=path)
        merged.update(piece)
    return merged


def _check_growth(sources: list[TensorSource], size: int) -> None:
    """Nothing, if the tensors have about the bytes that the files have (FormatError)."""
    total = sum(source.nbytes for source in sources)
    if total > _MAX_GROWTH * size + _SLACK:
        raise FormatError(f"its {size} bytes would make a state of {total}: its tensors repeat the same elements")


def _hand_out(sock: socket.socket, read: Callable[[int, int], Any], offset: int, count: int) -> None:
    try:
        first = read(offset, min(count, _PIECE))
    except MemoryError:
        channel.send_json(sock, {"code": "memory", "message": ""}, channel.ERROR)
        return
    except Exception as error:
        code = error.code if isinstance(error, CheckpointError) else "format"
        channel.send_json(sock, {"code": code, "message": f"{error!s:.2000}"}, channel.ERROR)
        return
    # From here on it can only be broken off.
    channel.send_begin(sock, channel.BYTES, count)
    sock.sendall(first)
    for at in range(offset + _PIECE, offset + count, _PIECE):
        sock.sendall(read(at, min(_PIECE, offset + count - at)))


def _reading(source: TensorSource, chunked: dict[int, ChunkedTensor]) -> Callable[[int, int], Any]:
    """What gives some bytes of a tensor."""
    live = source.live
    if live is not None and id(live) in chunked:
        return chunked[id(live)].read
    if live is not None and not source.place and live.dim() and live.numel():
        return lambda offset, length: _by_rows(live, offset, length)
    return source.view


def _by_rows(tensor: torch.Tensor, offset: int, length: int) -> memoryview:
    """Some bytes of a tensor that isn't contiguous, of which only the rows needed are copied; of long ones a part."""
    row_bytes = tensor.numel() // tensor.shape[0] * tensor.element_size()
    first, end = offset // row_bytes, -(-(offset + length) // row_bytes)
    if tensor.dim() > 1 and row_bytes > _PIECE:
        parts = bytearray()
        for row in range(first, end):
            begin = max(offset - row * row_bytes, 0)
            parts += _by_rows(tensor[row], begin, min(offset + length - row * row_bytes, row_bytes) - begin)
        return memoryview(parts)
    image = tensor_image(tensor[first:end])
    begin = offset - first * row_bytes
    return image[begin : begin + length].data
