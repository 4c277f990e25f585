"""How fast checkpoints are saved and loaded on a storage, beside what else people save them with.

Every round saves and loads one state once with each subject, and the order turns from round to round, so that a
disk that slows down slows everybody. Saves end when the bytes are durable. Loads begin with a cold page cache.
"""

from __future__ import annotations

import math
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ckptstore.errors import IntegrityError, NotFoundError, StateError, StorageError, StorageFullError
from ckptstore.storage import open_storage
from ckptstore.tools.subjects import SUBJECTS, Subject, drop_cache
from ckptstore.tools.turns import Tell as Progress
from ckptstore.tools.turns import turns

if TYPE_CHECKING:
    import torch

RIVALS = ("ckptstore", "torch", "safetensors", "dcp")
"""What is measured where nothing else is asked for. ``raw`` is the machine's limit: plain parallel direct I/O."""

_MINIMUM_BYTES = 1 << 20
# One copy on storage, and room for what the file system holds back.
_SPACE_FACTOR = 2


@dataclass(frozen=True)
class Result:
    """What one subject took.

    Attributes:
        subject: its name, of ``RIVALS`` or ``raw``.
        size_bytes: bytes of all tensors.
        save_s, load_s: seconds of each round.
    """

    subject: str
    size_bytes: int
    save_s: Sequence[float]
    load_s: Sequence[float]

    @property
    def save_gb_s(self) -> list[float]:
        """Decimal gigabytes per second of each round's save."""
        return [self.size_bytes / seconds / 1e9 for seconds in self.save_s]

    @property
    def load_gb_s(self) -> list[float]:
        """Decimal gigabytes per second of each round's load."""
        return [self.size_bytes / seconds / 1e9 for seconds in self.load_s]

    @property
    def save_median_gb_s(self) -> float:
        return statistics.median(self.save_gb_s)

    @property
    def load_median_gb_s(self) -> float:
        return statistics.median(self.load_gb_s)


def measure(
    url: str,
    size_bytes: int,
    rounds: int,
    rivals: Sequence[str] = RIVALS,
    progress: Progress | None = None,
) -> list[Result]:
    """Measure durable saves and cold loads in a scratch folder at ``url``, which is removed afterwards.

    Takes about three times ``size_bytes`` of memory and up to two times of free space. What every subject loads is
    compared with what was saved, once.

    Args:
        url: an existing folder, or ``memory://name`` or ``s3://bucket/prefix``, where only "ckptstore" can be
            measured.
        size_bytes: bytes of the state, at least 1 MiB: fp32 tensors as a GPT has them, of random numbers.
        rounds: how often, at least 1.
        rivals: names of ``RIVALS``, and "raw".
        progress: see ``Progress``.

    Raises:
        NotFoundError: no such folder.
        StorageFullError: too little free space.
        StateError: an argument that can't be measured.
        IntegrityError: a subject loaded something else than it saved.
        ImportError: there is no torch.
    """
    if size_bytes < _MINIMUM_BYTES:
        raise StateError(f"size_bytes={size_bytes} must be at least {_MINIMUM_BYTES}")
    _check(url, size_bytes, rounds, rivals)
    return measure_state(url, gpt_state(size_bytes), rounds, rivals, progress)


def measure_state(
    url: str,
    state: dict[str, torch.Tensor],
    rounds: int,
    rivals: Sequence[str] = RIVALS,
    progress: Progress | None = None,
) -> list[Result]:
    """``measure`` with a state of the caller's own: contiguous CPU tensors by name.

    Raises:
        As ``measure``.
    """
    actual_bytes = sum(tensor.nbytes for tensor in state.values())
    _check(url, actual_bytes, rounds, rivals)
    target = copied(state)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    with scratch(url) as place:
        small = gpt_state(_MINIMUM_BYTES)
        for name in rivals:
            # What is imported and set up at the first use is not what is measured.
            _once(name, SUBJECTS[name](f"{place}/{name}-first", _MINIMUM_BYTES), small, copied(small), check=False)
        for name in turns(rivals, rounds, progress):
            turn = len(times[name])
            subject = SUBJECTS[name](f"{place}/{name}-{turn}", actual_bytes)
            times[name].append(_once(name, subject, state, target, check=turn == 0))
    return [Result(name, actual_bytes, *zip(*times[name], strict=True)) for name in rivals]


def _check(url: str, size_bytes: int, rounds: int, rivals: Sequence[str]) -> None:
    unknown = [name for name in rivals if name not in SUBJECTS]
    if unknown or not rivals or len(set(rivals)) != len(rivals):
        raise StateError(f"rivals={list(rivals)} must be different names out of {', '.join(SUBJECTS)}")
    if rounds < 1:
        raise StateError(f"rounds={rounds} must be at least 1")
    folder = local_folder(url)
    if folder is None:
        if list(rivals) != ["ckptstore"]:
            raise StateError(f"{url} is no folder, where only ckptstore can be measured: rivals=['ckptstore']")
        # Before a state is made and long before one is saved: who can't be reached is told at once.
        with closing(open_storage(url)) as storage:
            storage.list("bench/")
        return
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder; make it first, on the storage that shall be measured")
    free = shutil.disk_usage(folder).free
    if free < _SPACE_FACTOR * size_bytes:
        raise StorageFullError(
            f"{folder} has {free / 1e9:.2f} GB free and {_SPACE_FACTOR * size_bytes / 1e9:.2f} GB are needed, twice "
            "the size that is measured: make room or measure less"
        )


def local_folder(url: str) -> Path | None:
    """The folder behind a path or ``file://`` URL, or None where it is no folder of this machine.

    Raises:
        NotFoundError: there is none.
        StorageError: it can't be used, or no such scheme.
    """
    if "://" in url and not url.lower().startswith("file:"):
        open_storage(url).close()
        return None
    try:
        storage = open_storage(url, read_only=True)
    except NotFoundError as error:
        raise NotFoundError(f"{url} is no folder; make it first, on the storage that shall be measured") from error
    storage.close()
    return Path(url2pathname(urlsplit(storage.url).path))


@contextmanager
def scratch(url: str) -> Iterator[str]:
    """The URL of a new, empty place at ``url``, gone with all that is in it when the block ends, however it ends."""
    folder = local_folder(url)
    name = f"bench-{secrets.token_hex(4)}"
    if folder is None:
        with _removed(f"{url.rstrip('/')}/{name}") as there:
            yield there
        return
    place = folder / name
    place.mkdir()
    try:
        yield str(place)
    finally:
        shutil.rmtree(place)


@contextmanager
def _removed(url: str) -> Iterator[str]:
    """``url``, with nothing left below it when the block ends."""
    failed = True
    try:
        yield url
        failed = False
    finally:
        # What failed is what to tell: who may write nothing may remove nothing either.
        with suppress(StorageError) if failed else nullcontext(), closing(open_storage(url)) as storage:
            storage.abort_uploads(storage.uploads())
            storage.delete([entry.key for entry in storage.list("")])


def _once(
    name: str, subject: Subject, state: dict[str, torch.Tensor], target: dict[str, torch.Tensor], *, check: bool
) -> tuple[float, float]:
    for tensor in target.values():
        tensor.zero_()
    with subject:
        begin = time.perf_counter()
        subject.save(state)
        saved_s = time.perf_counter() - begin
        drop_cache(subject.place)
        begin = time.perf_counter()
        subject.load(target)
        loaded_s = time.perf_counter() - begin
    if check and subject.fills_target and not all(state[key].equal(tensor) for key, tensor in target.items()):
        raise IntegrityError(f"{name} loaded other values than it saved")
    return saved_s, loaded_s


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with memory of their own; copying touches every page of it, so that no load pays for that."""
    return {name: tensor.clone() for name, tensor in state.items()}


def gpt_state(size_bytes: int) -> dict[str, torch.Tensor]:
    """fp32 tensors of random numbers with the names and shapes of a GPT, ``size_bytes`` in all (to 4 bytes)."""
    import torch

    left = size_bytes // 4
    width = next(w for w in (1024, 256, 64) if w == 64 or 24 * w * w <= left)
    state: dict[str, torch.Tensor] = {}
    for name, shape in _gpt_shapes(width):
        count = math.prod(shape)
        if count >= left:
            # What is left of the size that was asked for, in whatever shape.
            state[name] = torch.randn(left)
            return state
        state[name] = torch.randn(*shape)
        left -= count
    raise AssertionError("the shapes never end")


def _gpt_shapes(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "transformer.wte.weight", (4 * width, width)
    yield "transformer.wpe.weight", (width, width)
    layer = 0
    while True:
        for part, shape in (
            ("ln_1.weight", (width,)),
            ("attn.c_attn.weight", (3 * width, width)),
            ("attn.c_proj.weight", (width, width)),
            ("ln_2.weight", (width,)),
            ("mlp.c_fc.weight", (4 * width, width)),
            ("mlp.c_proj.weight", (width, 4 * width)),
        ):
            yield f"transformer.h.{layer}.{part}", shape
        layer += 1
