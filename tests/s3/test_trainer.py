"""A training run whose checkpoints lie in a bucket, or on a disk that is lost with a bucket behind it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.s3.seaweed import Seaweed
from tests.trainer.processes import check_same, reference, run
from tests.trainer.program import Options, notes

EXITS = {"kill": -9, "term": 143}


@pytest.mark.parametrize("way", ["kill", pytest.param("term", marks=pytest.mark.full)])
def test_saves_and_resumes_in_a_bucket(way: str, server: Seaweed, bucket: str, prefix: str, tmp_path: Path) -> None:
    """Broken off, and gone on bit for bit."""
    url, more = f"s3://{bucket}/{prefix}", {"storage_options": server.options}
    made = Options(url, str(tmp_path / "notes"), save="every(steps=6)", more=more)
    expected = reference(replace(made, more={}), tmp_path)
    assert run(made, end_by=way, end_at=13) == EXITS[way]
    assert run(made, check=True) == 0
    found = notes(made.out)
    assert [note["resumed"] for note in found if "resumed" in note][1] > 0
    check_same(found, expected)


def test_the_disk_is_lost(server: Seaweed, bucket: str, prefix: str, tmp_path: Path) -> None:
    """The run goes on from the bucket that its checkpoints were copied to."""
    more = {"backup": f"s3://{bucket}/{prefix}", "backup_options": server.options, "durable": "backup"}
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), save="every(steps=6)", more=more)
    expected = reference(replace(made, more={}), tmp_path)
    assert run(made, end_by="term", end_at=13) == 143
    shutil.rmtree(made.url)
    assert run(made, check=True) == 0
    found = notes(made.out)
    assert [note["resumed"] for note in found if "resumed" in note] == [0, 13]
    check_same(found, expected)
