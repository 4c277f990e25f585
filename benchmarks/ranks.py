"""Four processes save a sharded state to a local disk, and two load it resharded, beside DCP's file system writer."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.rounds import settle, stored_bytes
from benchmarks.tensors import gpt2_adamw
from ckptstore.tools.subjects import drop_cache
from ckptstore.tools.turns import Tell

SAVERS, LOADERS = 4, 2
SUBJECTS = ("ckptstore", "dcp")

State = dict[str, torch.Tensor]


def sharded(state: State) -> State:
    """Each tensor cut by rows over all ranks, as ``fully_shard`` does; this rank's part of it is copied."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))

    def cut(whole: torch.Tensor) -> torch.Tensor:
        parts = list(torch.chunk(whole, size))
        mine = parts[rank].clone() if rank < len(parts) else whole[:0].clone()
        options = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
        return DTensor.from_local(mine, mesh, [Shard(0)], **options)

    return {name: cut(whole) for name, whole in state.items()}


class Ours:
    """A store, opened anew for each load."""

    def __init__(self, folder: str) -> None:
        import ckptstore

        self._open, self._folder, self._step = ckptstore.open, folder, 0
        self._store = ckptstore.open(folder)

    def save(self, state: State) -> None:
        self._step += 1
        self._store.save(state, step=self._step)

    def forget(self) -> None:
        """All but the last, so that there is room on the disk."""
        for checkpoint in self._store.checkpoints()[:-1]:
            self._store.delete(checkpoint.id, reclaim=True)

    def load(self, state: State) -> None:
        with self._open(self._folder, read_only=True) as store:
            store.load(into=state)


class Dcp:
    """DCP's own, with fsync of each file, as by default; a new folder for each save."""

    def __init__(self, folder: str) -> None:
        self._folder, self._number = Path(folder), 0

    def save(self, state: State) -> None:
        from torch.distributed import checkpoint

        self._number += 1
        writer = checkpoint.FileSystemWriter(self._folder / str(self._number), sync_files=True)
        checkpoint.save(state, storage_writer=writer)

    def forget(self) -> None:
        """All but the last."""
        for folder in self._folder.iterdir():
            if folder.name != str(self._number):
                shutil.rmtree(folder)

    def load(self, state: State) -> None:
        from torch.distributed import checkpoint

        (newest,) = self._folder.iterdir()
        checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(newest))


MAKERS: dict[str, Callable[[str], Any]] = {"ckptstore": Ours, "dcp": Dcp}


def _together(action: Callable[[], object]) -> float:
    """Seconds from when all begin until all have ended."""
    distributed.barrier()
    began = time.perf_counter()
    action()
    distributed.barrier()
    return time.perf_counter() - began


def _save(folder: str, rounds: int, width: int, seconds: dict[str, list[float]]) -> None:
    state = sharded(gpt2_adamw(width))
    subjects = {name: MAKERS[name](f"{folder}/{name}") for name in SUBJECTS}
    for number in range(-1, rounds):
        for name, subject in subjects.items():
            took = _together(lambda subject=subject: subject.save(state))  # type: ignore[misc]
            if distributed.get_rank() == 0:
                # The first time imports and allocates.
                if number >= 0:
                    seconds[name].append(took)
                subject.forget()
                settle()
            distributed.barrier()


def _load(folder: str, rounds: int, width: int, seconds: dict[str, list[float]]) -> None:
    state = sharded({name: torch.empty_like(whole) for name, whole in gpt2_adamw(width).items()})
    subjects = {name: MAKERS[name](f"{folder}/{name}") for name in SUBJECTS}
    for number in range(-1, rounds):
        for name, subject in subjects.items():
            if distributed.get_rank() == 0:
                drop_cache(f"{folder}/{name}")
            took = _together(lambda subject=subject: subject.load(state))  # type: ignore[misc]
            if number >= 0:
                seconds[name].append(took)


def _main(rank: int, size: int, port: int, job: str, folder: str, rounds: int, width: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo")
    seconds: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    (_save if job == "save" else _load)(folder, rounds, width, seconds)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))
    distributed.barrier()
    distributed.destroy_process_group()


def _run(size: int, job: str, folder: str, rounds: int, width: int) -> dict[str, list[float]]:
    from torch.multiprocessing import start_processes

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        out = f"{place}/seconds.json"
        start_processes(_main, (size, port, job, folder, rounds, width, out), nprocs=size, start_method="spawn")  # type: ignore[no-untyped-call]
        seconds: dict[str, list[float]] = json.loads(Path(out).read_text())
    return seconds


def measure(folder: str, rounds: int, *, width: int = 768, tell: Tell | None = None) -> dict[str, Any]:
    """Seconds of durable saves by four ranks, and of cold loads by two, by subject; and the bytes stored.

    ``width``: of the model, GPT-2's by default.
    """
    folder = os.path.abspath(folder)
    if tell is not None:
        tell(f"{SAVERS} ranks save", 0, 2)
    saves = _run(SAVERS, "save", folder, rounds, width)
    stored = {name: stored_bytes(Path(folder, name)) for name in SUBJECTS}
    if tell is not None:
        tell(f"{LOADERS} ranks load", 1, 2)
    loads = _run(LOADERS, "load", folder, rounds, width)
    size = sum(tensor.nbytes for tensor in gpt2_adamw(width).values())
    return {
        "bytes": size,
        "savers": SAVERS,
        "loaders": LOADERS,
        "subjects": {
            name: {"save_s": saves[name], "load_s": loads[name], "stored_bytes": stored[name]} for name in SUBJECTS
        },
    }
