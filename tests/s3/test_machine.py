"""Any history of a store in a bucket, against the model of what must be there."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from botocore.config import Config
from botocore.session import get_session
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.integrity.stores import Raw
from tests.integrity.test_machine import StoreMachine
from tests.s3.bucket import MemoryBucket
from tests.s3.seaweed import Seaweed
from tests.s3.test_contract import BucketRaw
from tests.s3.wire import FaultyServer


class StoreRaw(BucketRaw):
    """The objects of one store."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        super().__init__(client, bucket, f"{prefix}/")
        self.url = f"s3://{bucket}/{prefix}"

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def listing(self) -> list[str]:
        return self.keys()


class BucketMachine(StoreMachine):
    """The same in a bucket; the server makes the copy."""

    client: Any
    bucket: str

    def place(self) -> Raw:
        return StoreRaw(self.client, self.bucket, f"machine/{uuid4().hex}")

    def copied(self) -> Raw:
        assert isinstance(self.raw, StoreRaw)
        copy = StoreRaw(self.client, self.bucket, f"machine/{uuid4().hex}")
        for key in self.raw.listing():
            source = {"Bucket": self.bucket, "Key": self.raw.prefix + key}
            self.client.copy_object(Bucket=self.bucket, Key=copy.prefix + key, CopySource=source)
        return copy

    def drop(self, raw: Raw) -> None:
        for key in raw.listing():
            raw.remove(key)


def play(client: Any, bucket: str, examples: int, steps: int) -> None:
    machine = type("Machine", (BucketMachine,), {"client": client, "bucket": bucket})
    wanted = settings(
        max_examples=examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck), deadline=None
    )
    run_state_machine_as_test(machine, settings=wanted)  # type: ignore[no-untyped-call]


@pytest.mark.timeout(1800)
def test_any_history(aws: None, server: Seaweed, bucket: str, full: bool) -> None:
    """A few short ones, each call taking milliseconds here; more and longer ones in the full run."""
    play(server.client(), bucket, *((20, 25) if full else (1, 8)))


@pytest.mark.timeout(1800)
def test_any_history_in_memory(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """On the server of the fault tests, undisturbed: what they hold it to be, it is."""
    with FaultyServer(MemoryBucket("bucket")) as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        access = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in (access | {"AWS_ENDPOINT_URL": endpoint}).items():
            monkeypatch.setenv(name, value)
        client = get_session().create_client("s3", config=Config(s3={"addressing_style": "path"}))
        play(client, "bucket", *((20, 25) if full else (1, 8)))
