"""Checkpoints that PyTorch's own ``FileSystemWriter`` wrote, taken into a store."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.facts import Facts
from ckptstore.errors import FormatError, IntegrityError, NotFoundError, StateError, StorageError
from ckptstore.integrations.dcp_metadata import METADATA_LIMIT, DcpContents, Place, TensorEntry, read_metadata
from ckptstore.integrations.dcp_names import nest
from ckptstore.integrations.dcp_planners import STREAM_BEGIN, from_stream
from ckptstore.store import Store

_METADATA = ".metadata"


def import_dcp(
    path: str | os.PathLike[str],
    store: Store,
    *,
    step: int,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    modes: Mapping[str, Literal["min", "max"]] | None = None,
    reasons: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Checkpoint:
    """Save in ``store`` what ``torch.distributed.checkpoint`` saved in a folder with its own ``FileSystemWriter``.

    Of however many ranks it is: the tensors are put together, and the state is nested again as it was. Nothing in the
    folder runs: ``.metadata``, which is a pickle, is taken apart, tensors and objects are read by
    ``torch.load(weights_only=True)``. The state is held in memory once.

    Args:
        path: the folder, on a local file system.
        store: where to save.
        step: the number of completed optimizer steps, which the folder doesn't tell.
        epoch, metrics, modes, reasons: as ``Store.save``.
        skip: flat keys, as ``optim.state.exp_avg``, that are left out, with all in them.

    Raises:
        NotFoundError: there is no such checkpoint.
        StateError: an object in it, which the error names, can't be read or stored without running pickled code.
        FormatError: its metadata are malformed, contradict themselves, or point outside of the folder.
        IntegrityError: a file is missing, too short or damaged.
        SaveFailedError, CommitUnknownError, StaleWriterError: as ``Store.save``.
    """
    if "://" in os.fspath(path):
        raise FormatError(f"{path} can't be imported from there: copy the folder to a local file system")
    folder = Path(os.path.realpath(path))
    facts = Facts.of(step, epoch, metrics or {}, modes or {}, [f"imported from {folder}"[:1000], *reasons])
    contents = _without(read_metadata(_metadata(folder), _METADATA), list(skip))
    _check_places(folder, contents.places)
    values = {key: _value(folder, key, entry) for key, entry in contents.entries.items()}
    state = nest(values, contents.paths)
    return store.save(
        state, step=facts.step, epoch=facts.epoch, metrics=facts.metrics, modes=modes, reasons=facts.reasons
    )


def _without(contents: DcpContents, skip: list[str]) -> DcpContents:
    for name in skip:
        if not any(_is_in(key, name) for key in contents.entries):
            raise NotFoundError(f"skip: there is no {name!r} in it")
    kept = {k: entry for k, entry in contents.entries.items() if not any(_is_in(k, name) for name in skip)}
    return DcpContents(kept, contents.paths)


def _is_in(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _metadata(folder: Path) -> bytes:
    file = folder / _METADATA
    if not file.exists():
        ranks = sorted(folder.glob("__*.metadata"))
        if ranks:
            raise StateError(
                f"{folder} was saved with use_collectives=False: each rank has metadata of its own ({ranks[0].name}), "
                "and nothing says that they belong together",
                path=ranks[0].name,
            )
        raise NotFoundError(f"{folder} holds no checkpoint of torch.distributed.checkpoint: it has no {_METADATA}")
    with _opened(folder, _METADATA) as stream:
        data = stream.read(METADATA_LIMIT + 1)
    if len(data) > METADATA_LIMIT:
        raise FormatError(f"{file} has more than {METADATA_LIMIT} bytes", key=_METADATA)
    return data


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[io.BufferedReader]:
    """A regular file that lies in ``folder`` itself: no link that leads out, nothing that could be waited for."""
    try:
        file = folder / name
        if file.resolve().parent != folder:
            raise FormatError(f"{file} is a link that leads out of its folder", key=name)
        if not stat.S_ISREG(file.stat().st_mode):
            raise FormatError(f"{file} is no file", key=name)
        with file.open("rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise IntegrityError(f"{folder / name} is missing", key=name) from error
    except OSError as error:
        raise StorageError(f"{folder / name} can't be read: {error}", key=name) from error


def _check_places(folder: Path, places: list[Place]) -> None:
    """Nothing, if all bytes are there. Each belongs to one entry, so all that is read is no more than the files."""
    sizes: dict[str, int] = {}
    for place in places:
        if place.file not in sizes:
            with _opened(folder, place.file) as stream:
                sizes[place.file] = os.fstat(stream.fileno()).st_size
        end = place.begin + place.length
        if end > sizes[place.file]:
            raise IntegrityError(
                f"{folder / place.file} has {sizes[place.file]} bytes, and {end} are needed: it was cut off, or an "
                "older checkpoint in the same folder was overwritten",
                key=place.file,
                expected=end,
                actual=sizes[place.file],
            )


def _value(folder: Path, key: str, entry: TensorEntry | Place) -> Any:
    if not isinstance(entry, Place):
        return _tensor(folder, key, entry)
    with _opened(folder, entry.file) as file:
        stream = io.BufferedReader(_Slice(file, entry))
        if stream.peek(len(STREAM_BEGIN)).startswith(STREAM_BEGIN):
            # DCP's writer has saved it, and CkptStoreSavePlanner made it.
            return from_stream(stream, key)
    return _loaded(folder, key, entry)


def _tensor(folder: Path, key: str, entry: TensorEntry) -> torch.Tensor:
    if not entry.chunks:
        return torch.empty(entry.shape, dtype=entry.dtype)
    whole: torch.Tensor | None = None
    for region, place in entry.chunks:
        chunk = _loaded(folder, key, place)
        if not isinstance(chunk, torch.Tensor) or chunk.layout is not torch.strided or chunk.is_meta:
            raise FormatError(f"what stands for the tensor {key!r:.100} in {place.file} is none", key=place.file)
        if chunk.dtype != entry.dtype or tuple(chunk.shape) != region.shape or chunk.nbytes > place.length:
            raise FormatError(
                f"the tensor {key!r:.100} in {place.file} is another than {_METADATA} says: {tuple(chunk.shape)} of "
                f"{chunk.dtype}, not {region.shape} of {entry.dtype}",
                key=place.file,
            )
        if region.shape == entry.shape:
            return chunk.detach()
        if whole is None:
            _check_bytes(key, entry, chunk.element_size())
            whole = torch.empty(entry.shape, dtype=entry.dtype)
        whole[tuple(slice(b, b + n) for b, n in zip(region.offset, region.shape, strict=True))].copy_(chunk)
    assert whole is not None
    return whole


def _check_bytes(key: str, entry: TensorEntry, item: int) -> None:
    """Nothing, if the files have as many bytes as the tensor (FormatError): no memory is taken for what isn't there."""
    for region, place in entry.chunks:
        if torch.Size(region.shape).numel() * item > place.length:
            raise FormatError(f"{place.file} has fewer bytes of {key!r:.100} than {_METADATA} says", key=place.file)


def _loaded(folder: Path, key: str, place: Place) -> Any:
    _check_plain(folder, key, place)
    with _opened(folder, place.file) as file:
        try:
            return torch.load(io.BufferedReader(_Slice(file, place)), map_location="cpu", weights_only=True)
        except Exception as error:
            raise _refusal(folder, key, place, error) from error


def _check_plain(folder: Path, key: str, place: Place) -> None:
    """Nothing, if the archive is as ``torch.save`` writes them: what is compressed may be of any size (FormatError)."""
    with _opened(folder, place.file) as file:
        try:
            members = zipfile.ZipFile(_Slice(file, place)).infolist()
        except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
            raise IntegrityError(
                f"{key!r:.100} in {folder / place.file} is damaged: {error}", key=place.file
            ) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError(f"{key!r:.100} in {place.file} is compressed, as torch.save never does", key=place.file)


def _refusal(folder: Path, key: str, place: Place, error: Exception) -> Exception:
    """What to raise for an error of ``torch.load``."""
    if type(error).__name__ != "UnpicklingError":
        return IntegrityError(f"{key!r:.100} in {folder / place.file} is damaged: {error!r:.300}", key=place.file)
    with _opened(folder, place.file) as file:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BufferedReader(_Slice(file, place)))
    return StateError(
        f"the value of {key!r:.100} can't be read without running pickled code: it needs {', '.join(named) or error}. "
        f"Leave it out with skip=[{key!r:.100}], or, if you trust it, name these in torch.serialization.safe_globals",
        path=key,
    )


class _Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: io.BufferedReader, place: Place) -> None:
        self._file, self._place = file, place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.length}[whence]
        if begin + offset < 0:
            raise ValueError("before the beginning")
        self._at = begin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as view:
            count = max(min(len(view), self._place.length - self._at), 0)
            self._file.seek(self._place.begin + self._at)
            read = self._file.readinto(view[:count])
        self._at += read
        return read
