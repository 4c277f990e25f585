"""A process that saves one checkpoint after the other, and says what it was told. It needs no torch."""

from __future__ import annotations

import json
import sys

import ckptstore
from ckptstore.errors import CommitUnknownError, SaveFailedError, StaleWriterError
from tests.faults.worker import save

STALE = 3
"""Exit status of a writer that was replaced."""


def main(url: str, options: str, first: int) -> int:
    with ckptstore.open(url, storage_options=json.loads(options)) as store:
        step = first
        while True:
            try:
                print("saved", save(store, step).id, flush=True)
            except StaleWriterError:
                print("stale", step, flush=True)
                return STALE
            except CommitUnknownError as error:
                print("unknown", error.id, flush=True)
            except SaveFailedError:
                print("failed", step, flush=True)
            step += 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
