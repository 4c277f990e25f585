"""The trainer, killed between two saves and started again, goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

TRAINER = Path(__file__).parents[2] / "examples/train_gpt.py"
TINY = ["--layers", "1", "--width", "32", "--context", "16", "--batch", "2", "--steps", "60", "--save-every", "5"]


def start(folder: Path, name: str, store: str) -> subprocess.Popen[str]:
    where = ["--store", str(folder / store), "--log", str(folder / f"{name}.jsonl")]
    return subprocess.Popen(
        [sys.executable, str(TRAINER), *where, *TINY], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(folder: Path, name: str) -> dict[int, str]:
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return {record["step"]: record["hex"] for record in map(json.loads, lines)}


@pytest.mark.full  # the demo's own test kills and resumes it, too
def test_killed_and_resumed_training_has_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    """Every loss before the kill and after it, in hex, is that of the uninterrupted run."""
    whole = start(tmp_path, "whole", "other")
    killed = start(tmp_path, "killed", "store")
    while killed.poll() is None and not list(tmp_path.glob("store/commits/*.json")):
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    resumed = start(tmp_path, "resumed", "store")
    printed, _ = resumed.communicate()
    whole.communicate()

    assert killed.returncode == -signal.SIGKILL
    assert (whole.returncode, resumed.returncode) == (0, 0)
    assert "resumed from step" in printed
    expected = losses(tmp_path, "whole")
    assert list(expected) == list(range(1, 61))
    before, after = losses(tmp_path, "killed"), losses(tmp_path, "resumed")
    assert 1 < min(after) <= max(before) + 1 < 60
    assert max(after) == 60
    assert before == {step: expected[step] for step in before}
    assert after == {step: expected[step] for step in after}


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    """The factor is below 1 at the start, 1 after a tenth of the steps, a tenth at the end."""
    import train_gpt

    assert train_gpt.warm_up_then_cosine(0, 100) < train_gpt.warm_up_then_cosine(9, 100) == 1.0
    assert train_gpt.warm_up_then_cosine(100, 100) == pytest.approx(0.1)
