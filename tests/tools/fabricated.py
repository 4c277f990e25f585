"""Stores whose records are written directly: as many checkpoints as wanted, saved when and by whom one likes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ckptstore.engine.catalogue import Catalogue, Checkpoint
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId
from ckptstore.format.records import (
    CommitRecord,
    HoldRecord,
    Record,
    Sealed256,
    StoreRecord,
    TimingRecord,
    TombstoneRecord,
    WriterRecord,
    metric,
    seal,
)
from ckptstore.tools.survey import Survey

STORE_ID = "5" * 32
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="hacked=1">\'\u2028&lt;{{ 7*7 }}'
MANIFEST_BYTES = 800
BEGIN = datetime(2026, 1, 31, 12, tzinfo=UTC)


@dataclass
class Fake:
    """One save: ``at_s`` seconds after the beginning, by writer number ``writer``."""

    step: int
    writer: int = 1
    at_s: float = 0.0
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    modes: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ("every 250 steps",)
    own_bytes: int = 1_500_000_000
    borrowed_bytes: int = 0
    deleted: str | None = None
    """Why, where it was."""
    lenders: tuple[str, ...] = ()
    timing: tuple[float | None, float | None] | None = None
    """Seconds of the save, and those that training waited."""


def put(root: Path, key: str, record: Record) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(seal(record))


def size_file(path: Path, size: int) -> None:
    """A file of ``size`` bytes that takes up none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def time(at_s: float) -> str:
    return (BEGIN + timedelta(seconds=at_s)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fabricate(
    root: Path,
    fakes: Iterable[Fake],
    *,
    hosts: Mapping[int, str] | None = None,
    files: bool = False,
    holds: Mapping[str, int] | None = None,
) -> list[str]:
    """A store of ``fakes``, oldest first, in ``root``; their ids.

    Args:
        files: also manifests and data files, of which only the sizes are right.
        hosts: the host of each writer.
        holds: for each hold's name the place of the checkpoint that it pins.
    """
    put(root, layout.STORE, StoreRecord(store_id=STORE_ID, digest="blake3", created=time(0), created_by="ckptstore 0"))
    random_bits = random.Random(3)
    ids: list[str] = []
    began: dict[int, float] = {}
    for seq, fake in enumerate(fakes, 1):
        id = CheckpointId(fake.writer, seq, fake.step, f"{random_bits.getrandbits(64):016x}")
        ids.append(str(id))
        began.setdefault(fake.writer, fake.at_s)
        put(root, layout.commit_key(id), _commit(id, fake))
        if files:
            size_file(root / layout.manifest_key(id), MANIFEST_BYTES)
            size_file(root / layout.file_key(id, "model.safetensors"), fake.own_bytes)
        if fake.deleted is not None:
            grave = TombstoneRecord(store_id=STORE_ID, id=str(id), created=time(fake.at_s + 5), reason=fake.deleted)
            put(root, layout.tombstone_key(id), grave)
    for number, at_s in began.items():
        host = (hosts or {}).get(number, f"node{number}")
        writer = WriterRecord(writer=number, store_id=STORE_ID, host=host, pid=1000 + number, created=time(at_s))
        put(root, layout.writer_key(number), writer)
    for name, place in (holds or {}).items():
        put(root, layout.hold_key(name), HoldRecord(store_id=STORE_ID, name=name, id=ids[place], created=time(0)))
    return ids


def _commit(id: CheckpointId, fake: Fake) -> CommitRecord:
    return CommitRecord.model_validate(
        {
            "store_id": STORE_ID,
            "id": str(id),
            "step": fake.step,
            "epoch": fake.epoch,
            "metrics": {name: metric(value) for name, value in fake.metrics.items()},
            "modes": dict(fake.modes),
            "reasons": list(fake.reasons),
            "created": time(fake.at_s),
            "parameters": 124_439_808,
            "tensors": 444,
            "files": 3,
            "raw_bytes": fake.own_bytes + fake.borrowed_bytes,
            "stored_bytes": fake.own_bytes + fake.borrowed_bytes,
            "borrowed_bytes": fake.borrowed_bytes,
            "world_size": 1,
            "timing": None if fake.timing is None else TimingRecord(save_s=fake.timing[0], stall_s=fake.timing[1]),
            "manifest": Sealed256(size=MANIFEST_BYTES, sha256="0" * 64),
            "lenders": list(fake.lenders),
        }
    )


def run(count: int, *, each: int = 250, rollbacks: int = 2, writers: int = 3) -> list[Fake]:
    """``count`` saves of a run that was restarted, and went back now and then."""
    own = random.Random(7)
    fakes: list[Fake] = []
    step, at_s, best = 0, 0.0, math.inf
    backs = {count * (n + 1) // (rollbacks + 1) for n in range(rollbacks)}
    for number in range(count):
        writer = 1 + number * writers // count
        step = max(step - each * max(count // 12, 2), 0) if number in backs else step + each
        at_s += each * (0.4 + 0.05 * own.random()) + (1800 if number in backs else 0)
        loss = 2.6 + 8 / (1 + step / 900) + own.gauss(0, 0.04)
        reasons, epoch = [f"every {each} steps"], step // (each * 10)
        if loss < best:
            best = loss
            reasons.append("best val_loss")
        if step and step % (each * 10) == 0:
            reasons.append(f"epoch {epoch}")
        if number + 1 in backs:
            reasons = ["SIGTERM"]
        metrics = {"val_loss": loss, "acc": 1 - loss / 12}
        fake = Fake(step, writer, at_s, epoch, metrics, {}, tuple(reasons), 1_500_000_000 + own.randrange(9**8))
        fake.timing = (1.2 + own.random() / 4, own.random() / 20)
        fakes.append(fake)
    return fakes


def surveyed(fakes: Iterable[Fake], url: str = "memory://fabricated") -> Survey:
    """What a look at a store of ``fakes``, oldest first, finds; without one, as writing many takes long."""
    there = [
        Checkpoint.of(_commit(CheckpointId(fake.writer, seq, fake.step, f"{seq:016x}"), fake))
        for seq, fake in enumerate(fakes, 1)
    ]
    return Survey(
        url=url,
        made=BEGIN,
        store=None,
        catalogue=Catalogue(there, [], frozenset(), [], max((c.order for c in there), default=None)),
        graves={},
        holds={},
        damaged=[],
        writers={},
        lags=[],
        verifications=[],
        unfinished=[],
        bytes_there=0,
        keep=None,
        judgement=None,
        unjudged=None,
    )
