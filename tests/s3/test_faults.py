"""A fault at each request of each operation: it succeeds all the same, or fails by name with nothing lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptstore.errors import (
    CheckpointError,
    CommitUnknownError,
    NoCheckpointError,
    NotFoundError,
    SaveFailedError,
    StorageError,
)
from tests.faults.points import SEED, named
from tests.s3.bucket import MemoryBucket
from tests.s3.cases import BUCKET, OPERATIONS, Operation, World, check, requests_of
from tests.s3.kinds import KINDS, Kind
from tests.s3.wire import FaultyServer, Request

EVERY = 41
"""A sampled run takes one in so many cases, all those of the request that commits, and of ``BLINDING``."""

BLINDING = {"404", "empty 200", "flipped on the way down"}
"""Kinds that may hide a checkpoint from who looks: then ``latest`` would be another one."""

Case = tuple[int, Request, Kind]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    bucket = MemoryBucket(BUCKET)
    with FaultyServer(bucket) as server:
        yield World(server, bucket)


def commits(request: Request) -> bool:
    """Whether ``request`` decides if a checkpoint exists, or reads that back."""
    return request.operation in ("Put", "Get") and "/commits/" in request.key


def cases(requests: list[Request], operation: Operation, *, full: bool) -> list[Case]:
    """Every fault at every request, or a sample of them."""
    every = [(number, request, kind) for number, request in enumerate(requests) for kind in KINDS if kind.fits(request)]
    if full:
        return every
    decides = max((n for n, r in enumerate(requests) if r.operation == "Put" and commits(r)), default=-1)
    if not operation.saves or operation.compression != "none":
        # As in a plain save.
        decides = -1
    looked = operation.name in ("load", "list")
    return [
        case
        for place, case in enumerate(every)
        if (place + SEED) % EVERY == 0 or case[0] == decides or (looked and case[2].name in BLINDING)
    ]


def run(world: World, operation: Operation, case: Case) -> tuple[CheckpointError | None, object]:
    """The error or the result of ``operation`` with one fault, which did happen."""
    number, _, kind = case
    world.put(world.empty if operation.empty else world.filled)
    storage = world.storage(read_timeout_s=0.4) if kind.slow else world.storage()
    world.server.arm(lambda n, request: kind.act if n == number else None)
    try:
        return None, operation.run(storage)
    except CheckpointError as error:
        return error, None
    finally:
        assert len(world.server.fired) == 1, "the fault did not fire"
        world.server.disarm()


def check_error(operation: Operation, case: Case, error: CheckpointError) -> None:
    """It says what is true, and never that there is nothing."""
    _, request, _ = case
    assert not isinstance(error, NoCheckpointError)
    if isinstance(error, CommitUnknownError):
        # Who borrows looks once more after the commit.
        assert commits(request) or operation.name == "rollback"
    elif operation.saves or (operation.name == "rollback" and not isinstance(error, StorageError)):
        # Rolling back looks and reads before it saves.
        assert isinstance(error, SaveFailedError)
    else:
        assert isinstance(error, StorageError)
        assert not isinstance(error, NotFoundError)


def check_uploads(world: World, operation: Operation, case: Case) -> None:
    """Every upload was completed or aborted, but for one that the server began twice, saying so once."""
    left = set(world.bucket.uploads) - ({"dead"} if not operation.empty else set())
    _, request, kind = case
    assert len(left) <= (1 if kind.name == "twice" and request.operation == "Begin" else 0)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_one_fault_at_each_request(world: World, operation: Operation, full: bool) -> None:
    """Whatever happens to one request, nothing is lost, and what a second try can mend is mended."""
    requests = requests_of(world, operation)
    assert len(requests) >= 3
    chosen = cases(requests, operation, full=full)
    kinds = set()

    for case in chosen:
        number, request, kind = case
        with named(operation, f"request {number}", request, kind):
            error, result = run(world, operation, case)
            if kind.heals:
                assert error is None, repr(error)
            if error is None:
                assert result == operation.expected
            else:
                check_error(operation, case, error)
            steps = check(world, operation, error)
            if operation.saves:
                check_uploads(world, operation, case)
            if isinstance(error, SaveFailedError):
                assert steps == ([] if operation.empty else [2, 3]), "a save that certainly failed is there"
            kinds.add(kind.name)

    assert len(kinds) >= (14 if full else 3)
