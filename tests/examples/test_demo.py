"""The demo shows what it says, and says so when something is not as it should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


def run_demo(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> int:
    import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", str(folder), *flags])
    return demo.main()


def test_the_quick_demo_proves_all_its_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill, resume, flipped bit, resume, verify: from another working directory, into a folder it cleared."""
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs/demo/earlier"
    earlier.mkdir(parents=True)
    (earlier.parent / ".ckptstore-demo").touch()

    status = run_demo(monkeypatch, Path("runs/demo"), "--quick")

    output = capsys.readouterr().out
    assert status == 0, output
    assert "Killed with SIGKILL" in output
    assert "FallbackWarning" in output
    assert output.count("equal those of the uninterrupted run, bit for bit") == 2
    assert "What this demo showed" in output
    assert not earlier.exists()


def test_the_demo_clears_no_folder_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds something else is refused and stays as it was."""
    (tmp_path / "thesis.txt").write_text("years of work")

    status = run_demo(monkeypatch, tmp_path)

    assert status == 1
    assert "nothing was deleted" in capsys.readouterr().out
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_claim_that_fails_ends_the_demo_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the trainer fails at once; what it printed and what is not so are both shown."""
    import demo

    broken = tmp_path / "broken.py"
    broken.write_text("print('out of luck'); raise SystemExit(3)")
    monkeypatch.setattr(demo, "TRAINER", broken)

    status = run_demo(monkeypatch, tmp_path / "demo")

    output = capsys.readouterr().out
    assert status == 1
    assert "out of luck" in output
    assert "NOT so: the trainer ends well (it exited with 3)" in output


def test_states_are_compared_bit_for_bit() -> None:
    """0.0 and -0.0 are equal as numbers, and differ in a bit."""
    import demo

    state = {"w": torch.tensor([0.0]), "n": [1, None, "a"], "g": torch.Generator()}

    assert demo.same(state, {"w": torch.tensor([0.0]), "n": [1, None, "a"], "g": torch.Generator()})
    assert not demo.same(state, state | {"w": torch.tensor([-0.0])})
    assert not demo.same(state, state | {"n": [1, None]})
    assert not demo.same(state, state | {"g": torch.Generator().manual_seed(5)})


def test_a_process_is_killed_inside_a_save_and_not_before(tmp_path: Path) -> None:
    """It must have written data without a commit record, after as many new commits as were asked for."""
    from faults import LARGE_BYTES, KillInsideSave

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    kill = KillInsideSave(process, tmp_path, after=1)

    def begin(id: str, size: int) -> None:
        (tmp_path / "checkpoints" / id).mkdir(parents=True)
        (tmp_path / "checkpoints" / id / "model.safetensors").write_bytes(bytes(size))

    begin("first", LARGE_BYTES + 1)
    assert kill() is None
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits/first.json").touch()
    begin("second", 0)
    assert kill() is None
    assert process.poll() is None
    begin("third", LARGE_BYTES + 1)

    assert kill() == "third"
    assert process.returncode == -9


def test_one_bit_of_the_named_tensor_is_flipped(tmp_path: Path) -> None:
    """Twice is as it was."""
    from faults import flip_bit
    from safetensors.torch import load_file, save_file

    path = tmp_path / "t.safetensors"
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.uint8)}, path)

    flip_bit(path, "b")
    assert {name: t.tolist() for name, t in load_file(path).items()} == {"a": [0, 0, 0], "b": [1, 0, 0]}

    flip_bit(path, "b")
    assert load_file(path)["b"].tolist() == [0, 0, 0]
