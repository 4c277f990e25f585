"""What rank 0 does for many ranks: the real code, over a storage that only counts, waits, and keeps the records.

The other ranks are tasks that leave what real ones would: their tables, their parts, the sizes of their files, their
reports. No data are made or kept, so that ten terabytes fit into a laptop.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from types import SimpleNamespace
from typing import Any

from ckptstore.engine import board as boards
from ckptstore.engine.commit import claim_writer, ensure_store
from ckptstore.engine.contents import read_contents
from ckptstore.engine.crew import Crew
from ckptstore.engine.facts import Facts
from ckptstore.engine.joint import JointSaver, report_of
from ckptstore.engine.saver import Job, Saver
from ckptstore.engine.share import Share
from ckptstore.engine.sharer import Sharer
from ckptstore.engine.sharing import Layout, Table
from ckptstore.format import layout
from ckptstore.format.digest import sha256
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import (
    BlockEntry,
    FileEntry,
    PartEntry,
    PartRecord,
    ShardEntry,
    StoreRecord,
    TensorTable,
    to_json,
)
from ckptstore.format.tensorfile import TensorFile, TensorRow
from ckptstore.storage.memory import MemoryStorage
from ckptstore.tools.turns import Tell

RANKS = (8, 32, 128, 512, 1024)
BYTES_EACH = 10 * 10**9
"""Of the state, on each rank: 1,024 of them have ten terabytes."""
TENSORS = 3000
"""Spread over all ranks by rows, as parameters and two moments of a thousand layers are."""
COUNTERS = 1000
"""Whole ones, the same on all ranks: an optimizer counts the steps of each parameter."""
LATENCY_S = 0.02
BYTES_PER_S = 100e6
"""Of one request; as many as there are threads go on at once."""


class ModelStorage(MemoryStorage):
    """Keeps records, and of data files only the sizes; each request waits as it would in a bucket far away."""

    def __init__(self) -> None:
        super().__init__("")
        self.requests: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}
        self.waits = False
        self._lock = threading.Lock()

    def read(self, key: str, *, limit: int) -> bytes:
        data = super().read(key, limit=limit)
        self._wait("GET", len(data))
        return data

    def create(self, key: str, data: bytes) -> None:
        self._wait("PUT", len(data))
        super().create(key, data)

    def size(self, key: str) -> int:
        self._wait("HEAD", 0)
        return self.sizes[key] if key in self.sizes else super().size(key)

    def list(self, prefix: str) -> list[Any]:
        self._wait("LIST", 0)
        return super().list(prefix)

    def _wait(self, verb: str, count: int) -> None:
        if self.waits:
            with self._lock:
                self.requests[verb] += 1
            time.sleep(LATENCY_S + count / BYTES_PER_S)


class DictBoard:
    """All ranks' messages, seen by one."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.messages: dict[str, bytes] = {}

    def put(self, key: str, data: bytes) -> None:
        self.messages[key] = data

    def get(self, key: str) -> bytes | None:
        return self.messages.get(key)

    def drop(self, key: str) -> None:
        self.messages.pop(key, None)


class RankZero(Saver):
    """Rank 0's saver; its data files are there already."""

    entries: list[FileEntry]

    def files(self, id: CheckpointId, job: Job, stage: Any) -> list[FileEntry]:
        return self.entries


@dataclass
class Job0:
    """One size of the job."""

    ranks: int
    storage: ModelStorage = field(default_factory=ModelStorage)

    def __post_init__(self) -> None:
        self.rows = self.ranks * max(1, 256 // self.ranks)
        self.width = BYTES_EACH * self.ranks // (4 * TENSORS * self.rows)
        self.id = layout.new_id(1, 1, 1000)

    def table(self, rank: int) -> Table:
        """What this rank tells the others that it has."""
        each = self.rows // self.ranks
        shape = [self.rows, self.width]
        shard: Layout = {
            "kind": ["F32", None, shape],
            "region": [[rank * each, 0], [each, self.width]],
            "nbytes": 4 * each * self.width,
            "cuttable": False,
            "parameter": prod(shape),
        }
        count: Layout = {"kind": ["F32", None, []], "region": None, "nbytes": 4, "cuttable": False, "parameter": 0}
        return {
            "names": [self.name(n) for n in range(TENSORS)] + [f"optimizer/state/{n}/step" for n in range(COUNTERS)],
            "codes": [0] * TENSORS + [1] * COUNTERS,
            "layouts": [shard, count],
        }

    @staticmethod
    def name(number: int) -> str:
        kind = ("weight", "exp_avg", "exp_avg_sq")[number % 3]
        return f"model/layers.{number // 3}.attention.projection.{kind}"

    def part(self, rank: int, plan: str) -> PartRecord:
        """What this rank writes: one file of all its shards, and on rank 0 the counters."""
        each = self.rows // self.ranks
        names = [self.name(n).removeprefix("model/") for n in range(TENSORS)]
        rows = [TensorRow(f"{name}@{rank * each}.0", "F32", (each, self.width)) for name in sorted(names)]
        shards = {
            row.name: ShardEntry(
                tensor=row.name.partition("@")[0], shape=[self.rows, self.width], offset=[rank * each, 0]
            )
            for row in rows
        }
        files = [self._file(f"model-r{rank:05d}.safetensors", "model/", rows, shards)]
        if rank == 0:
            steps = [TensorRow(f"state/{n:04d}/step", "F32", ()) for n in range(COUNTERS)]
            files.append(self._file(f"optimizer-r{rank:05d}.safetensors", "optimizer/", steps, None))
        tree = {"model": {"$": "module", "type": "Model", "entries": {n: _node(f"model/{n}") for n in names}}}
        return PartRecord(id=str(self.id), rank=rank, world_size=self.ranks, plan=plan, files=files, tree=tree)

    def _file(
        self, name: str, prefix: str, rows: Sequence[TensorRow], shards: dict[str, ShardEntry] | None
    ) -> FileEntry:
        stream = TensorFile.of(rows)
        begins = [0, *accumulate(stream.block_lengths)]
        digest = sha256(name.encode())
        blocks = [BlockEntry(raw=b - a, digest=digest, offset=a, length=b - a) for a, b in pairwise(begins)]
        self.storage.sizes[layout.file_key(self.id, name)] = stream.raw_bytes
        return FileEntry(
            name=name,
            owner=str(self.id),
            prefix=prefix,
            stored_bytes=stream.raw_bytes,
            tensors=TensorTable.of(rows, shards),
            blocks=blocks,
        )


def _node(name: str) -> dict[str, str]:
    return {"$": "tensor", "name": name}


def _timed(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of the processor, and what ``action`` gives."""
    began, cpu = time.perf_counter(), time.process_time()
    result = action()
    return time.perf_counter() - began, time.process_time() - cpu, result


def once(ranks: int) -> dict[str, Any]:
    """One save by so many ranks, as rank 0 sees it; and what each of them reads before it reads data.

    Where there are as many of them again, and (``other_``) where there are more or fewer.
    """
    job = Job0(ranks)
    tables = [job.table(rank) for rank in range(ranks)]
    samples = ["00" * 8 * (TENSORS + COUNTERS)] * ranks
    messages = sum(len(json.dumps(table, separators=(",", ":"))) for table in tables)
    sharer = Sharer()
    first_s, _, agreed = _timed(lambda: sharer.plan(tables, samples))
    again_s, _, _ = _timed(lambda: sharer.plan([None] * ranks, samples))
    plan = sha256(b"plan")
    store = ensure_store(job.storage)
    claim_writer(job.storage, store.store_id, above=0)
    board = DictBoard(0, ranks)
    crew = Crew(board, timeout_s=600, folder="job")
    share = Share(crew, crew.name(), job.id, store, None, plan, agreed.tensors, agreed.parameters)
    part_bytes, entries, tree = _leave_parts(job, share, board)
    saver = _saver(job.storage, store, entries)
    facts = Facts(1000, None, {}, {}, [])
    state = SimpleNamespace(tree=tree, sources=[], parameters=0)
    stage = SimpleNamespace(check=lambda: None)
    job.storage.waits = True
    saving = Job(state, facts)  # type: ignore[arg-type]
    commit_s, commit_cpu_s, made = _timed(lambda: JointSaver(saver, share).save(job.id, saving, stage))  # type: ignore[arg-type]
    requests = dict(job.storage.requests)
    job.storage.requests.clear()
    load_s, load_cpu_s, _ = _timed(lambda: read_contents(job.storage, made.record, None, {0, ranks - 1}).tensors)
    load_requests = dict(job.storage.requests)
    other_s, other_cpu_s, _ = _timed(lambda: read_contents(job.storage, made.record).tensors)
    return {
        "ranks": ranks,
        "state_bytes": 4 * TENSORS * job.rows * job.width,
        "tables_bytes": messages,
        "plan_first_s": first_s,
        "plan_again_s": again_s,
        "part_bytes": part_bytes,
        "manifest_bytes": made.record.manifest.size,
        "commit_s": commit_s,
        "commit_cpu_s": commit_cpu_s,
        "commit_requests": requests,
        "load_requests": load_requests,
        "load_s": load_s,
        "load_cpu_s": load_cpu_s,
        "other_load_requests": {verb: n - load_requests.get(verb, 0) for verb, n in job.storage.requests.items()},
        "other_load_s": other_s,
        "other_load_cpu_s": other_cpu_s,
    }


def _leave_parts(job: Job0, share: Share, board: DictBoard) -> tuple[int, list[FileEntry], Any]:
    """What the other ranks leave: their parts and reports; size of a part, and what rank 0's own has."""
    own = job.part(0, share.plan)
    size = 0
    for rank in range(1, job.ranks):
        part = job.part(rank, share.plan)
        data = to_json(part)
        size = len(data)
        job.storage.create(layout.part_key(job.id, rank), data)
        entry = PartEntry(rank=rank, size=len(data), sha256=sha256(data))
        boards.put(board, f"{share.name}/done/{rank}", report_of(part, entry, None))
    return size, own.files, own.tree


def _saver(storage: ModelStorage, store: StoreRecord, entries: list[FileEntry]) -> RankZero:
    def no_other_id() -> CheckpointId:
        raise AssertionError

    saver = RankZero(SimpleNamespace(storage=storage), store, None, lambda: None, no_other_id)  # type: ignore[arg-type]
    object.__setattr__(saver, "entries", entries)
    return saver


def measure(folder: str, rounds: int, *, sizes: Sequence[int] = RANKS, tell: Tell | None = None) -> dict[str, Any]:
    """``once`` for each number of ranks; nothing is written to ``folder``."""
    found = []
    for number, ranks in enumerate(sizes):
        if tell is not None:
            tell(f"{ranks} ranks", number, len(sizes))
        found.append(once(ranks))
    return {
        "latency_s": LATENCY_S,
        "bytes_per_s": BYTES_PER_S,
        "tensors": TENSORS + COUNTERS,
        "points": found,
    }
