"""What other processes do to a store at the same time. Run by ``multiprocessing``; needs no pytest."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore.errors import CommitUnknownError, ExistsError, NotFoundError, SaveFailedError, StaleWriterError
from tests.integrity.stores import State, Tensors, flat, opened, read, save, state

NAMES = ["model/w", "model/b", "optimizer/m"]


def tensors_of(number: int) -> dict[str, bytes]:
    """Every byte tells which save it is of, so that a mixture of two shows."""
    return {name: bytes([number % 256]) * (20_000 + 10 * index) for index, name in enumerate(NAMES)}


def number_of(tensors: dict[str, bytes]) -> int:
    """Which save these are, if they are of one and whole."""
    values = {byte for data in tensors.values() for byte in set(data)}
    assert len(values) == 1, f"a mixture of {values}"
    assert tensors == tensors_of(*values), "not whole"
    return values.pop()


def told(results: Any, work: Callable[[], object]) -> None:
    """Send back what ``work`` gives, or why it failed."""
    try:
        results.put(("ok", work()))
    except BaseException:
        results.put(("failed", traceback.format_exc()))


def write(url: str, results: Any, first: int, count: int, *, shared: bool) -> None:
    """Save ``count`` checkpoints or as many as a newer writer allows: (ids acknowledged, whether stopped)."""

    def work() -> tuple[dict[str, int], bool]:
        acknowledged: dict[str, int] = {}
        with opened(url, shared=shared) as store:
            for number in range(first, first + count):
                try:
                    acknowledged[save(store, state(tensors_of(number)), number).id] = number
                except StaleWriterError:
                    return acknowledged, True
        return acknowledged, False

    told(results, work)


def churn(url: str, results: Any, count: int, *, ready: Any) -> None:
    """Save, delete all but the newest two, and reclaim at once, again and again."""

    def work() -> int:
        ready.wait(60)
        with opened(url) as store:
            for number in range(1, count + 1):
                save(store, state(tensors_of(number)), number)
                for old in store.checkpoints()[:-2]:
                    store.delete(old.id)
                store.prune(grace_s=0)
        return count

    told(results, work)


def follow(url: str, results: Any, last: int, *, ready: Any) -> None:
    """Load ``latest`` until it is number ``last``: how many loads, of how many different checkpoints."""

    def work() -> tuple[int, int]:
        seen: list[int] = []
        store = opened(url, read_only=True)
        store.load("latest")
        ready.wait(60)
        while not seen or seen[-1] != last % 256:
            seen.append(number_of(flat(store.load("latest"))))
            assert seen == sorted(seen), "latest went back"
        return len(seen), len(set(seen))

    told(results, work)


def forked(url: str, results: Any, store: Any) -> None:
    """In a fork, with the parent's open store: reading works, saving is refused."""

    def work() -> tuple[int, str]:
        assert os.getpid() != store._pid
        number = number_of(read(store, store.resolve("latest")))
        try:
            store.save({}, step=1)
        except StaleWriterError as error:
            return number, str(error)
        return number, "saved"

    told(results, work)


def tuned_tensors(step: int) -> Tensors:
    """A large part that never changes, and two that do."""
    return {"model/base": b"frozen" * 5000, "model/lora": b"%d " % step * 100, "optimizer/m": b"m%d " % step * 100}


def tuned(step: int) -> State:
    """A state of these, the large one frozen."""
    made = state(tuned_tensors(step))
    for source in made.sources:
        source.frozen = source.spec.name == "model/base"
    return made


def tune(url: str, results: Any, count: int, *, ready: Any, done: Any) -> None:
    """Save ``count`` times what is mostly frozen: (the ids acknowledged, how many borrowed, how many saves failed).

    One may fail because the checkpoint from which it rewrote was deleted too, or be deleted before it is read back.
    """

    def work() -> tuple[list[str], int, int]:
        borrowed = failed = 0
        try:
            with opened(url) as store:
                acknowledged = [save(store, tuned(0), 0).id]
                ready.wait(60)
                for step in range(1, count + 1):
                    try:
                        saved = save(store, tuned(step), step)
                    except (SaveFailedError, CommitUnknownError):
                        failed += 1
                        continue
                    acknowledged.append(saved.id)
                    borrowed += bool(saved.record.lenders)
        finally:
            done.set()
        return acknowledged, borrowed, failed

    told(results, work)


def committed(url: str) -> set[str]:
    """The names of the commit records; none while their folder, empty, has been removed."""
    try:
        return set(os.listdir(Path(url, "commits")))
    except FileNotFoundError:
        return set()


def reap(url: str, results: Any, seed: int, *, ready: Any, done: Any) -> None:
    """Delete checkpoints at random, the newest too, and reclaim them at once, until the saving is done: their ids.

    About two rounds for each save, however slow that is: with more, nothing would be left that a save can borrow.
    """

    def work() -> list[str]:
        choose, deleted = random.Random(seed), []
        ready.wait(60)
        while not done.is_set():
            before, waits = committed(url), choose.random() < 0.5
            while waits and committed(url) <= before and not done.is_set():
                time.sleep(0.001)
            with opened(url) as store:
                for checkpoint in store.checkpoints():
                    if choose.random() < 0.3:
                        with suppress(NotFoundError, ExistsError):
                            deleted.append(store.delete(checkpoint.id).id)
                            # Older than the grace, which spares the save that is running.
                            os.utime(Path(url, "trash", f"{checkpoint.id}.json"), (0, 0))
                store.prune(grace_s=3600)
        return deleted

    told(results, work)
