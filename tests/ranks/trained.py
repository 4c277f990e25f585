"""The run of ``tests.trainer.program`` by several processes, with DDP or FSDP2, and what starts them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ckptstore.trainer.checkpointer import Checkpointer
from tests.trainer import program
from tests.trainer.processes import CONTEXT, finish
from tests.trainer.program import Numbers, Options


@dataclass(frozen=True)
class Shared(Options):
    """Options of all ranks.

    Attributes:
        batch_size: of all ranks together.
        wrap: "ddp" or "fsdp"; the first leaves a single rank as it is.
        exactly: nothing is random but the order of the samples, so that another number of ranks learns the same.
        breaks: which ranks are broken off; all where it is None.
        rank, size, port: of this process, how many there are, and where their store of messages listens.
    """

    samples: int = 48
    batch_size: int = 12
    wrap: str = "ddp"
    exactly: bool = False
    breaks: int | None = None
    rank: int = 0
    size: int = 1
    port: int = 0


class Ranks(program.Program):
    """One rank's run."""

    options: Shared

    def __init__(self, options: Shared) -> None:
        super().__init__(options)
        if options.exactly:
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.inner = self.model
        if options.wrap == "fsdp":
            fully_shard(self.model)
        elif options.size > 1:
            self.model = DistributedDataParallel(self.model)  # type: ignore[assignment]
        self.optimizer = program.optimizer_of(options, self.inner)
        total = options.samples // options.batch_size * options.epochs
        self.scheduler = program.scheduler_of(options, self.optimizer, total)
        data = Numbers(options.samples, noisy=not options.exactly)
        self.sampler = DistributedSampler(data, options.size, options.rank, shuffle=True, seed=5)
        self.loader = DataLoader(data, batch_size=options.batch_size // options.size, sampler=self.sampler)
        self.broken = options.breaks not in (None, options.rank)
        torch.manual_seed(100 + options.rank)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "model": self.inner}

    def epoch(self, ckpt: Checkpointer) -> None:
        self.sampler.set_epoch(ckpt.progress.epoch)
        super().epoch(ckpt)
        self.note(drawn=torch.rand(1).item(), after=ckpt.progress.step)

    def digest(self) -> str:
        """Of what lies on this rank."""
        found = hashlib.sha256()
        states = [self.optimizer.state[p] for p in self.inner.parameters()]
        for tensor in [*self.inner.state_dict().values(), *(v for state in states for v in state.values())]:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found.update(local.detach().contiguous().numpy().tobytes())
        found.update(repr(self.scheduler.state_dict()).encode())
        return found.hexdigest()


def main(fields: dict[str, Any]) -> None:
    """Run in a process of its own."""
    options = Shared(**fields)
    store = distributed.TCPStore("127.0.0.1", options.port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=options.rank, world_size=options.size)
    try:
        Ranks(options).run()
        distributed.destroy_process_group()
    except program.Broken:
        os._exit(7)
    except SystemExit as ended:
        # Nobody waits for the others here.
        os._exit(int(ended.code or 0))


@contextmanager
def started(options: Shared, size: int, main: Callable[[dict[str, Any]], None] = main) -> Iterator[list[Any]]:
    """Processes of all ranks, with the one beside them that keeps their messages, as under ``torchrun``."""
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        replace(options, rank=rank, size=size, port=server.port, out=out_of(options, rank)) for rank in range(size)
    ]
    processes = [CONTEXT.Process(target=main, args=(asdict(each),)) for each in ranks]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()


def out_of(options: Options, rank: int) -> str:
    return f"{options.out}-{rank}"


def notes(options: Options, rank: int) -> list[dict[str, Any]]:
    """What a rank noted."""
    return program.notes(Path(out_of(options, rank)))


def run(options: Shared, size: int) -> list[int]:
    """All ranks to their ends; how they ended."""
    with started(options, size) as processes:
        return [finish(process) for process in processes]


def reference(options: Shared, folder: Path, size: int) -> Shared:
    """A run that nothing interrupts, and that saves nothing on its way."""
    whole = replace(
        options, url=str(folder / "whole-store"), out=str(folder / "whole"), save="at(0)", end_by=None, more={}
    )
    assert run(whole, size) == [0] * size
    return whole


def main_of_torchrun() -> None:
    """One rank, as ``torchrun`` starts it; one that was broken off isn't again."""
    options = Shared(**json.loads(sys.argv[1]))
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    made = Ranks(replace(options, rank=rank, size=distributed.get_world_size(), out=out_of(options, rank)))
    made.broken |= os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    made.run()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main_of_torchrun()
