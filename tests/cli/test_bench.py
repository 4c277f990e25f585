"""``ckptstore bench`` and the measuring behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptstore.errors import IntegrityError, NotFoundError, StateError, StorageFullError
from ckptstore.tools import subjects, throughput
from ckptstore.tools.throughput import RIVALS, gpt_state, measure
from tests.cli.conftest import Run

SIZE = 2_000_000


def test_json_has_every_subject_and_round(run: Run, tmp_path: Path) -> None:
    answer = run("bench", str(tmp_path), "--size", "2MB", "--rounds", "2", "--json")

    assert (answer.exit_code, answer.stderr) == (0, "")
    document = answer.json
    assert (document["size_bytes"], document["rounds"]) == (SIZE, 2)
    assert [result["subject"] for result in document["results"]] == [*RIVALS, "raw"]
    for result in document["results"]:
        for way in ("save", "load"):
            speed = result[way]
            assert len(speed["seconds"]) == len(speed["gb_s"]) == 2
            assert 0 < speed["min_gb_s"] <= speed["median_gb_s"] <= speed["max_gb_s"]
    assert list(tmp_path.iterdir()) == [], "the scratch folder is gone"


def test_table(run: Run, tmp_path: Path) -> None:
    shown = run("bench", str(tmp_path), "--size", "2MB", "--rounds", "1").stdout

    for title in ("ckptstore", "torch.save + fsync", "safetensors + fsync", "DCP", "machine limit"):
        assert f"\n{title} " in shown
    assert "2.00 MB, medians of 1 round" in shown


def test_memory_measures_ckptstore_alone(run: Run) -> None:
    answer = run("bench", "memory://bench-cli", "--size", "2MB", "--rounds", "1", "--json")

    assert [result["subject"] for result in answer.json["results"]] == ["ckptstore"]
    assert "only ckptstore is measured" in answer.stderr


@pytest.mark.parametrize("option", [["--size", "2"], ["--size", "1B"], ["--rounds", "0"]])
def test_options_are_checked(run: Run, tmp_path: Path, option: list[str]) -> None:
    assert run("bench", str(tmp_path), *option).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert run("bench", str(tmp_path / "file"), "--json").json["error"]["code"] in ("not_found", "storage")


def test_too_little_space_is_said_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    answer = run("bench", str(tmp_path), "--size", "9000TB", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "storage_full")
    assert "GB free" in answer.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageFullError, match="are needed"):
        measure(str(tmp_path), 10**18, 1)


def test_the_order_turns_from_round_to_round(tmp_path: Path) -> None:
    """So that nobody always runs on the disk that another one has warmed up or worn out."""
    seen: list[tuple[str, int, int]] = []
    measure(str(tmp_path), SIZE, 2, ("torch", "raw"), lambda *report: seen.append(report))
    assert seen == [("torch", 0, 4), ("raw", 1, 4), ("raw", 2, 4), ("torch", 3, 4)]


def test_results(tmp_path: Path) -> None:
    (result,) = measure(f"file://{tmp_path}", SIZE, 3, ["ckptstore"])
    assert (result.subject, result.size_bytes, len(result.save_s), len(result.load_s)) == ("ckptstore", SIZE, 3, 3)
    assert result.save_median_gb_s == sorted(result.save_gb_s)[1]
    assert result.load_median_gb_s == sorted(result.load_gb_s)[1]
    assert result.load_gb_s[0] == pytest.approx(SIZE / result.load_s[0] / 1e9)


def test_who_loads_something_else_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: subjects.TorchSave, target: object) -> None:
        calls.append(self.place)

    calls: list[str] = []
    monkeypatch.setattr(subjects.TorchSave, "load", nothing)
    with pytest.raises(IntegrityError, match="torch loaded other values"):
        measure(str(tmp_path), SIZE, 1, ["torch"])
    assert calls
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_dropped_from_the_cache_before_each_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Observed where the loads would begin: what was asked of the kernel, for which files."""
    dropped: list[str] = []
    load = subjects.Safetensors.load

    def drop(place: str) -> None:
        dropped.extend(path.name for path in Path(place).iterdir())
        subjects.drop_cache(place)

    def loaded(self: subjects.Safetensors, target: dict[str, object]) -> None:
        assert dropped.pop() == "state"
        load(self, target)  # type: ignore[arg-type]

    monkeypatch.setattr(throughput, "drop_cache", drop)
    monkeypatch.setattr(subjects.Safetensors, "load", loaded)
    (result,) = measure(str(tmp_path), SIZE, 2, ["safetensors"])
    assert len(result.load_s) == 2
    assert dropped == []


@pytest.mark.parametrize("rivals", [[], ["nobody"], ["torch", "torch"]])
def test_subjects_are_checked(tmp_path: Path, rivals: list[str]) -> None:
    with pytest.raises(StateError, match="rivals"):
        measure(str(tmp_path), SIZE, 1, rivals)


def test_places_are_checked(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="only ckptstore"):
        measure("memory://x", SIZE, 1, ["torch"])
    with pytest.raises(NotFoundError, match="make it first"):
        measure(str(tmp_path / "nothing"), SIZE, 1)


@pytest.mark.parametrize("size", [1 << 20, 2_000_000, 30_000_001])
def test_the_state_has_the_size_and_shapes_asked_for(size: int) -> None:
    state = gpt_state(size)
    assert sum(tensor.nbytes for tensor in state.values()) == size // 4 * 4
    assert any(tensor.dim() == 2 for tensor in state.values())
    assert "transformer.wte.weight" in state
