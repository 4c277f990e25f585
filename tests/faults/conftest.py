"""The worker process and the stores that it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .outcome import Base, nothing, one_checkpoint, something_lent, something_to_delete, something_tuned
from .processes import Worker, missing_strace


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one test file."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def worker(scratch: Path) -> Iterator[Worker]:
    """The process whose children are broken."""
    worker = Worker(scratch)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def traced(worker: Worker, scratch: Path) -> Worker:
    """The same, where its system calls can be broken."""
    reason = missing_strace(scratch)
    if reason is not None:
        pytest.skip(reason)
    return worker


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Stores to copy and break, by the name of the operation on them."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "first save": nothing(folder / "first"),
        "save": one_checkpoint(folder / "save"),
        "tuned save": something_tuned(folder / "tuned"),
        "delete": something_to_delete(folder / "delete"),
        "delete a lender": something_lent(folder / "lender"),
    }
