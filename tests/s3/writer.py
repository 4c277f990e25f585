"""A process that saves one checkpoint after the other, and says what it was told. It needs no torch."""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import ckptstore
from ckptstore.errors import CommitUnknownError, SaveFailedError, StaleWriterError
from ckptstore.policy.rules import last
from ckptstore.store import Store
from tests.faults.worker import save

STALE = 3
"""Exit status of a writer that was replaced."""


def opened(url: str, options: dict[str, Any], backup: str) -> Store:
    """The store in a bucket; with ``backup``, the one in a folder that keeps its newest, the others in that bucket.

    With one thread, so that the same saves make the same requests in the same order.
    """
    if backup:
        return ckptstore.open(url, backup=backup, backup_options=options, keep=last(1), threads=1)
    return ckptstore.open(url, storage_options=options, threads=1)


def main(url: str, options: str, first: int, backup: str) -> int:
    with opened(url, json.loads(options), backup) as store:
        step = first
        while True:
            try:
                print("saved", save(store, step, durable="backup" if backup else "primary").id, flush=True)
            except StaleWriterError:
                print("stale", step, flush=True)
                return STALE
            except CommitUnknownError as error:
                print("unknown", error.id, flush=True)
            except SaveFailedError:
                print("failed", step, flush=True)
            step += 1


def tell(pipe: Connection, environment: dict[str, str], *options: Any) -> None:
    """``main`` in a process that was forked; what it prints goes to ``pipe``."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout = open(pipe.fileno(), "w", closefd=False)  # noqa: SIM115
    sys.exit(main(*options))
