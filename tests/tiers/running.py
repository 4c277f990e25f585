"""A run in a process of its own, which saves when it is told to. Run by ``multiprocessing``."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection
from typing import Any

from ckptstore.engine import backups
from ckptstore.engine.facts import Facts
from ckptstore.engine.saver import Job
from ckptstore.errors import CheckpointError
from ckptstore.maintenance import replicate
from ckptstore.policy.rules import last
from tests.integrity.stores import flat, opened, silence, state


def content(run: int, step: int) -> dict[str, bytes]:
    """What the save of ``step`` by the run with this number holds: every byte tells both."""
    return {"model/w": bytes([run, step % 256]) * 30_000, "optimizer/m": bytes([step % 256, run]) * 1000}


def run(url: str, backup: str, number: int, first: int, durable: Any, keep: int | None, pipe: Connection) -> None:
    """Resume and save, one step after the other, until told to end, or an error does.

    Tells ("resumed", tensors or None), then ("began", step) and ("saved", id, step) for each, at last ("error", name,
    step); "prune" makes it prune, "close" close the store.
    """
    # Outages here are stops of a process, no slow server's.
    backups.GLANCE_S, replicate._PAUSE_S = 5.0, (0.01, 0.1)
    logging.disable(logging.CRITICAL)
    with silence():
        options: dict[str, Any] = {"keep": last(keep)} if keep else {}
        store = opened(url, backup=backup, **options)
        try:
            try:
                pipe.send(("resumed", flat(store.load("latest"))))
            except FileNotFoundError:
                pipe.send(("resumed", None))
            step = first
            while not pipe.poll():
                pipe.send(("began", step))
                facts = Facts(step, None, {}, {}, [])
                saved = store._dispatcher.save(Job(state(content(number, step)), facts, durable))
                pipe.send(("saved", saved.id, step))
                step += 1
        except CheckpointError as error:
            pipe.send(("error", type(error).__name__, step))
        pipe.recv()
        store.close()
        pipe.send(("closed",))
        pipe.recv()
