"""Every request of one kind fails for good: the operation ends, says why, and nothing is lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from ckptstore.engine.damage import DamageWarning
from ckptstore.errors import (
    CheckpointError,
    CommitUnknownError,
    IntegrityError,
    NoCheckpointError,
    NotFoundError,
    SaveFailedError,
    StorageError,
    UnavailableError,
)
from tests.faults.points import SEED, named
from tests.s3.bucket import MemoryBucket
from tests.s3.cases import BUCKET, LATEST, OLD, OPERATIONS, Operation, World, check, requests_of
from tests.s3.kinds import KINDS, Kind
from tests.s3.wire import FaultyServer, Request

EVERY = 37
LASTING = {
    *("500", "503", "403", "404", "404 bucket", "429", "reset", "applied and reset", "applied and 500", "no answer"),
    *("error in a 200", "empty 200", "half an answer", "flipped on the way up", "twice", "late"),
}

Case = tuple[str, Kind]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    bucket = MemoryBucket(BUCKET)
    with FaultyServer(bucket) as server:
        yield World(server, bucket)


def hits(case: Case, request: Request) -> bool:
    """Whether ``case`` is about ``request``."""
    which, kind = case
    return which in ("all", request.operation) and kind.fits(request)


def cases(requests: list[Request], *, full: bool) -> list[Case]:
    """Every kind for every sort of request that is made, and for all at once; or a sample."""
    sorts = ["all", *dict.fromkeys(request.operation for request in requests)]
    every = [(which, kind) for which in sorts for kind in KINDS if kind.name in LASTING]
    every = [case for case in every if any(hits(case, request) for request in requests)]
    return every if full else every[SEED % EVERY :: EVERY]


def run(world: World, operation: Operation, case: Case) -> tuple[CheckpointError | None, object]:
    """The error or the result of ``operation`` under a fault that stays until it has ended."""
    world.put(world.empty if operation.empty else world.filled)
    storage = world.storage(read_timeout_s=0.15 if case[1].slow else 20.0, deadline_s=0.1)
    world.server.arm(lambda n, request: case[1].act if hits(case, request) else None)
    try:
        return None, operation.run(storage)
    except CheckpointError as error:
        return error, None
    finally:
        assert world.server.fired, "no fault fired"
        world.server.disarm()


def check_error(operation: Operation, case: Case, error: CheckpointError) -> None:
    which, kind = case
    assert not isinstance(error, NoCheckpointError)
    if isinstance(error, CommitUnknownError):
        assert which in ("all", "Put", "Get", "List")
    elif operation.saves or (operation.name == "rollback" and not isinstance(error, StorageError)):
        # Rolling back looks and reads before it saves.
        assert isinstance(error, SaveFailedError)
    else:
        assert isinstance(error, StorageError), repr(error)
        assert not isinstance(error, NotFoundError)
        if kind.name not in ("404 bucket",):
            assert isinstance(error, UnavailableError), repr(error)
            assert error.transient == (kind.name != "403")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_requests_that_always_fail(world: World, operation: Operation, full: bool) -> None:
    """The operation ends with its deadline, by name; what was acknowledged is there when the fault is over."""
    requests = requests_of(world, operation)
    failed = 0
    for case in cases(requests, full=full):
        with named(operation, *case):
            error, result = run(world, operation, case)
            if error is None:
                assert result == operation.expected
            else:
                check_error(operation, case, error)
            if operation.saves:
                world.store().prune(grace_s=0)
                assert world.bucket.uploads == {}
            steps = check(world, operation, error)
            if isinstance(error, SaveFailedError):
                assert steps == ([] if operation.empty else [OLD, LATEST]), "a save that certainly failed is there"
            failed += error is not None
    assert failed


def test_a_commit_none_of_whose_answers_arrives(world: World) -> None:
    """It is read back: what may have been committed is never taken for failed, and nothing of it is removed."""
    lost = next(kind for kind in KINDS if kind.name == "applied and reset")
    operation = OPERATIONS[0]
    world.put(world.filled)
    storage = world.storage(deadline_s=0.1)
    world.server.arm(lambda n, r: lost.act if r.operation == "Put" and "/commits/" in r.key else None)

    assert operation.run(storage) == operation.expected

    assert len(world.server.fired) >= 2
    world.server.disarm()
    check(world, operation, None)


def test_bytes_that_are_always_wrong_reach_nobody(world: World) -> None:
    """They are called damage."""
    world.put(world.filled)
    flips = next(kind for kind in KINDS if kind.name == "flipped on the way down")
    about_data = lambda n, request: flips.act if request.key.endswith(".safetensors") and flips.fits(request) else None  # noqa: E731
    world.server.arm(about_data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        with pytest.raises(IntegrityError, match="damaged"):
            world.store().load()

    assert len(world.server.fired) >= 4
    world.server.disarm()


def test_the_deadline_is_an_option() -> None:
    """Of the storage, beside those of s3fs."""
    import ckptstore

    for wrong in (0, -1, True, "long", float("inf"), float("nan")):
        with pytest.raises(StorageError, match="deadline_s"):
            ckptstore.open("s3://bucket/x", storage_options={"deadline_s": wrong})
