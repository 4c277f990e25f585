"""``ckptstore ls``."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import ckptstore
from tests.cli.conftest import Run, data_file, flip


def rows(stdout: str) -> list[list[str]]:
    return [line.split() for line in stdout.splitlines()[1:]]


def test_newest_last_with_all_columns(run: Run, url: str, ids: list[str]) -> None:
    """One line a checkpoint, in the order in which they were saved."""
    answer = run("ls", url)

    assert answer.exit_code == 0
    assert answer.stderr == ""
    heads = ["id", "step", "epoch", "created", "size", "metrics", "reasons"]
    assert answer.stdout.splitlines()[0].split() == heads
    assert [row[:3] for row in rows(answer.stdout)] == [
        [id[:11], str(step), str(step // 10)] for id, step in zip(ids, (10, 20, 30), strict=True)
    ]
    assert "val_loss 3" in answer.stdout
    assert "every 10 steps" in answer.stdout


def test_json_has_full_ids_and_iso_times(run: Run, url: str, ids: list[str]) -> None:
    """A script gets everything the records say."""
    answer = run("ls", url, "--json")

    assert answer.exit_code == 0
    assert set(answer.json) == {"url", "checkpoints", "deleted", "damaged", "backups", "last_verification"}
    assert answer.json["last_verification"] is None
    assert [c["id"] for c in answer.json["checkpoints"]] == ids
    first = answer.json["checkpoints"][0]
    assert first["short"] == ids[0][:11]
    assert (first["step"], first["epoch"]) == (10, 1)
    assert (first["metrics"], first["modes"]) == ({"val_loss": 3.0}, {"val_loss": "min"})
    assert datetime.fromisoformat(first["created"]).utcoffset() is not None
    assert first["stored_bytes"] > 64 * 64 * 4
    assert first["save_s"] == first["stall_s"] > 0
    assert answer.json["deleted"] == answer.json["damaged"] == []


def test_columns_that_are_empty_are_left_out(run: Run, store_path: Path) -> None:
    with ckptstore.open(store_path) as store:
        store.save({"x": 1}, step=1)

    assert run("ls", str(store_path)).stdout.splitlines()[0].split() == ["id", "step", "created", "size"]


def test_last_shows_the_newest(run: Run, url: str, ids: list[str]) -> None:
    assert [c["id"] for c in run("ls", url, "--last", "2", "--json").json["checkpoints"]] == ids[1:]
    assert len(rows(run("ls", url, "--last", "1").stdout)) == 1
    assert len(rows(run("ls", url, "--last", "99").stdout)) == 3


def test_last_must_be_a_positive_number(run: Run, url: str) -> None:
    assert run("ls", url, "--last", "0").exit_code == 2


def test_deleted_ones_are_listed_on_request_only(run: Run, url: str, ids: list[str]) -> None:
    run("delete", url, ids[1], "--yes")

    assert [c["id"] for c in run("ls", url, "--json").json["checkpoints"]] == [ids[0], ids[2]]
    assert run("ls", url, "--json").json["deleted"] == []
    assert [c["id"] for c in run("ls", url, "--deleted", "--json").json["deleted"]] == [ids[1]]
    shown = rows(run("ls", url, "--deleted").stdout)
    assert [row[1] for row in shown] == ["10", "20", "30"]
    assert "deleted" in shown[1]


def test_holds_are_marked(run: Run, url: str, ids: list[str]) -> None:
    run("hold", url, "step:20", "paper")

    assert "held: paper" in run("ls", url).stdout.splitlines()[2]
    assert [c["holds"] for c in run("ls", url, "--json").json["checkpoints"]] == [[], ["paper"], []]


def test_a_damaged_commit_record_is_a_row_and_exit_1(run: Run, url: str, ids: list[str]) -> None:
    """Damage is never silent absence."""
    flip(Path(url) / "commits" / f"{ids[1]}.json", 40)

    answer = run("ls", url)
    assert answer.exit_code == 1
    assert rows(answer.stdout)[1] == [ids[1][:11], "20", "damaged"]
    assert "ckptstore verify" in answer.stderr

    answer = run("ls", url, "--json")
    assert answer.exit_code == 1
    assert [c["id"] for c in answer.json["checkpoints"]] == [ids[0], ids[2]]
    assert [d["id"] for d in answer.json["damaged"]] == [ids[1]]


def test_a_store_without_checkpoints_is_no_error(run: Run, url: str, ids: list[str]) -> None:
    """Empty and missing are two things."""
    for id in ids:
        run("delete", url, id, "--yes")

    answer = run("ls", url, "--json")
    assert (answer.exit_code, answer.json["checkpoints"]) == (0, [])


def test_metrics_that_are_no_numbers_are_valid_json(run: Run, store_path: Path) -> None:
    with ckptstore.open(store_path) as store:
        store.save({"x": 1}, step=1, metrics={"loss": float("nan"), "acc": float("inf")})

    assert run("ls", str(store_path), "--json").json["checkpoints"][0]["metrics"] == {"loss": "nan", "acc": "inf"}


def test_a_reason_can_not_command_the_terminal(run: Run, store_path: Path) -> None:
    """Escape sequences in stored text are shown, not obeyed."""
    with ckptstore.open(store_path) as store:
        store.save({"x": 1}, step=1, reasons=["\x1b[2Jgone [bold]x"])

    shown = run("ls", str(store_path)).stdout
    assert "\x1b" not in shown
    assert "\\x1b[2Jgone [bold]x" in shown


def test_the_last_line_tells_of_the_last_verification(run: Run, url: str, ids: list[str]) -> None:
    """Of all that lies there, if that was ever verified."""

    def last() -> str:
        return re.sub(r"verified \d+ (s|min|h|d) ago", "verified", run("ls", url).stdout.splitlines()[-1])

    assert "every 10 steps" in last()
    run("verify", url, "step:20")
    assert last() == f"last verified: good (only {ids[1]}, 1 saved since)"
    run("verify", url, "--sample", "50%")
    assert last() == "last verified: good (a sample of 0.5)"
    with ckptstore.open(url) as store:
        store.save({"x": 1}, step=40)
        path = data_file(url, ids[0])
        flip(path, path.stat().st_size - 1)
        store.verify()
        store.save({"x": 1}, step=50)
    run("verify", url, "step:20")
    assert last() == "last verified: 1 damage (1 saved since)"
    told = run("ls", url, "--json").json["last_verification"]
    assert (told["ok"], told["damages"], told["checkpoints"], told["id"], told["by"]) == (False, 1, 4, None, "verify")
    assert datetime.fromisoformat(told["created"]).utcoffset() is not None


def test_a_damaged_verification_hides_nothing(run: Run, url: str) -> None:
    run("verify", url)
    (record,) = (Path(url) / "verifications").iterdir()
    flip(record, 50)

    answer = run("ls", url)
    assert answer.exit_code == 0
    assert record.name in answer.stderr
    assert len(rows(answer.stdout)) == 3
    verified = run("verify", url)
    assert verified.exit_code == 1
    assert "nothing depends on it" in verified.stdout
