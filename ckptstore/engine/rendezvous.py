"""What the ranks of one job agree upon before each save: the id, and who writes what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptstore.engine.crew import Crew, Each, RanksError, ranks_text
from ckptstore.engine.facts import Facts
from ckptstore.engine.share import Share
from ckptstore.engine.sharer import Sharer
from ckptstore.engine.sharing import Plan, Table, Task
from ckptstore.errors import CheckpointError, FormatError, IntegrityError, NotFoundError, SaveFailedError
from ckptstore.format import layout
from ckptstore.format.digest import sha256
from ckptstore.format.jsontext import compact
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import SMALL_LIMIT, StoreRecord, validate
from ckptstore.storage.base import Storage

_WHAT = "a save"


class Begun(NamedTuple):
    """What rank 0 knows of a save that it begins."""

    store: StoreRecord
    id: CheckpointId
    latest: str | None
    """The checkpoint from which something may be borrowed; only at the first save of a run."""


@dataclass
class Bid:
    """What a rank wants to save: its tensors, and digests of a few bytes of each."""

    facts: Facts
    table: Table
    samples: Sequence[str]


class Rendezvous:
    """The meetings of one store's ranks."""

    def __init__(self, crew: Crew, storage: Storage) -> None:
        self._crew, self._storage = crew, storage
        self._sent: Table | None = None
        self._sent_digest = ""
        self._task: Task | None = None
        # On rank 0.
        self._sharer = Sharer()
        self._digest = ""
        self._seen = False

    def agree(self, ask: Callable[[], Bid], begin: Callable[[int], Begun]) -> tuple[Share, Task]:
        """Come together for a save. Every rank must call it, in the thread that trains.

        Args:
            ask: gives what this rank wants to save; its errors reach all.
            begin: called on rank 0 with the step.

        Raises:
            StateError: one of the ranks has something that can't be saved.
            SaveFailedError: they don't agree, or one is missing. Nothing was written.
        """
        message, own = self._message(ask)
        try:
            answer = self._crew.exchange(_WHAT, message, lambda messages: self._decide(messages, begin), error=own)
            name = self._crew.name()
            store = validate(StoreRecord, answer["store"], layout.STORE)
            id = parse_id(answer["id"])
            self._look(answer["writer"], id)
        except RanksError as error:
            # The next one is to be sent, and answered, in full: nobody knows what has arrived.
            self._sent = self._task = None
            if own is not None:
                raise own from error
            text = f"step {message['step']} was not saved by any rank: {error}. Older checkpoints are untouched"
            raise error.as_error(SaveFailedError, text) from error
        self._sent = message["table"] or self._sent
        self._task = answer["task"] or self._task
        assert self._task is not None
        plan, tensors, parameters = answer["plan"], answer["tensors"], answer["parameters"]
        return Share(self._crew, name, id, store, answer["latest"], plan, tensors, parameters), self._task

    def _message(self, ask: Callable[[], Bid]) -> tuple[dict[str, Any], CheckpointError | None]:
        try:
            bid = ask()
        except CheckpointError as error:
            return {}, error
        facts = bid.facts
        table = None if self._sent == bid.table else bid.table
        if table is not None:
            self._sent_digest = sha256(compact(table))
        return {
            "url": self._storage.url,
            "step": facts.step,
            "epoch": facts.epoch,
            "table": table,
            "digest": self._sent_digest,
            "knows": self._task is not None,
            "samples": "".join(bid.samples),
        }, None

    # -- rank 0 ------------------------------------------------------------------------------------------

    def _decide(self, messages: list[dict[str, Any]], begin: Callable[[int], Begun]) -> Each:
        for what in ("url", "step", "epoch"):
            _check_same(messages, what)
        plan = self._sharer.plan([message["table"] for message in messages], [m["samples"] for m in messages])
        if self._sharer.changed:
            self._digest = sha256(compact([[message["digest"] for message in messages], plan.tasks]))
        known = [message["knows"] and not self._sharer.changed for message in messages]
        return self._answers(plan, known, begin(messages[0]["step"]))

    def _answers(self, plan: Plan, known: Sequence[bool], begun: Begun) -> Each:
        writer = layout.writer_key(begun.id.writer)
        common = {
            "store": begun.store.model_dump(),
            "id": str(begun.id),
            "latest": begun.latest,
            "plan": self._digest,
            "tensors": plan.tensors,
            "parameters": plan.parameters,
            "writer": sha256(self._storage.read(writer, limit=SMALL_LIMIT)) if not self._seen else None,
        }
        return Each({**common, "task": None if knows else task} for task, knows in zip(plan.tasks, known, strict=True))

    # -- all ---------------------------------------------------------------------------------------------

    def _look(self, digest: str | None, id: CheckpointId) -> None:
        """At the first save: whether all look at the same storage, before anything is written to it."""
        if digest is None:
            return
        try:
            seen = sha256(self._storage.read(layout.writer_key(id.writer), limit=SMALL_LIMIT)) == digest
        except (NotFoundError, FormatError, IntegrityError):
            seen = False

        def decide(answers: list[bool]) -> bool:
            if blind := [rank for rank, sees in enumerate(answers) if not sees]:
                raise RanksError(
                    f"{ranks_text(blind)} doesn't see what rank 0 has written to {self._storage.url}: it must be one "
                    "storage for all ranks, as a shared folder or a bucket, not each machine's own disk",
                    blind,
                )
            return True

        self._crew.exchange("the first look at the storage", seen, decide)
        self._seen = True


def _check_same(messages: Sequence[dict[str, Any]], what: str) -> None:
    values = [message[what] for message in messages]
    if other := [rank for rank, value in enumerate(values) if value != values[0]]:
        each = ", ".join(f"rank {rank}: {values[rank]!r}" for rank in [0, *other][:5])
        raise RanksError(f"the ranks save with another {what} each ({each}): it must be the same on all", other)
