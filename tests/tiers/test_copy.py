"""``Store.copy`` and ``ckptstore copy``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import ckptstore as cs
from ckptstore.cli.main import cli
from tests.tiers.places import data_file, flip, holds, objects, state, steps


def saved_at(place: Path, count: int = 3) -> list[cs.Checkpoint]:
    with cs.open(place) as store:
        return [store.save(state(step), step=step, metrics={"val_loss": 9 - step}) for step in range(count)]


def test_all_or_some_in_order(primary: Path, tmp_path: Path) -> None:
    saved = saved_at(primary)
    with cs.open(primary, read_only=True) as store:
        report = store.copy(tmp_path / "all")
        some = store.copy(tmp_path / "some", ["latest", "step:0", "best:val_loss"])

    assert [c.id for c in report.checkpoints] == [c.id for c in saved]
    assert report.written_bytes == sum(c.stored_bytes for c in saved)
    assert objects(tmp_path / "all", "commits") == objects(primary, "commits")
    assert [c.step for c in some.checkpoints] == steps(tmp_path / "some") == [0, 2]


def test_what_is_there_is_not_copied_again(primary: Path, tmp_path: Path) -> None:
    saved = saved_at(primary)
    with cs.open(primary, read_only=True) as store:
        store.copy(tmp_path / "copy", ["step:1"])
        report = store.copy(tmp_path / "copy")

    assert report.found == [saved[1].id]
    assert report.written_bytes == saved[0].stored_bytes + saved[2].stored_bytes


def test_and_back(primary: Path, tmp_path: Path) -> None:
    saved_at(primary)
    with cs.open(primary) as store:
        store.copy(tmp_path / "copy")
    with cs.open(tmp_path / "copy") as copy:
        copy.copy(tmp_path / "back")
    with cs.open(tmp_path / "back") as back:
        assert back.verify().ok
        assert holds(back, "latest", 2)


def test_a_broken_off_copy_is_taken_up(primary: Path, tmp_path: Path) -> None:
    """Whole files stay, torn ones are written anew, and no byte of them is believed for its name alone."""
    saved = saved_at(primary, 1)
    target = tmp_path / "copy"
    whole = data_file(primary, saved[0].id)
    for junk in (whole.read_bytes(), b"torn", bytes(whole.stat().st_size)):
        folder = target / "checkpoints" / saved[0].id
        folder.mkdir(parents=True)
        (folder / whole.name).write_bytes(junk)
        with cs.open(primary, read_only=True) as store:
            report = store.copy(target)
        assert report.written_bytes == (0 if junk == whole.read_bytes() else whole.stat().st_size)
        assert objects(target, "checkpoints") == objects(primary, "checkpoints")
        for path in sorted(target.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


def test_damage_at_the_source_is_never_handed_on(primary: Path, tmp_path: Path) -> None:
    saved = saved_at(primary)
    flip(data_file(primary, saved[1].id), 9000)

    with cs.open(primary, read_only=True) as store:
        report = store.copy(tmp_path / "copy")

    assert not report.ok
    assert [damage.id for damage in report.damages] == [saved[1].id]
    assert steps(tmp_path / "copy") == [0, 2]


def test_another_store_is_no_target(primary: Path, tmp_path: Path) -> None:
    saved_at(primary)
    saved_at(tmp_path / "other")
    with cs.open(primary, read_only=True) as store, pytest.raises(cs.StorageError, match="holds another store"):
        store.copy(tmp_path / "other")


def test_an_empty_store_has_nothing_to_copy(primary: Path, tmp_path: Path) -> None:
    with cs.open(primary) as store, pytest.raises(cs.NoCheckpointError, match="no checkpoints to copy"):
        store.copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_on_the_command_line(primary: Path, tmp_path: Path) -> None:
    saved = saved_at(primary)
    target = tmp_path / "copy"

    answer = CliRunner().invoke(cli, ["copy", str(primary), str(target), "--select", "latest"])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.splitlines()[0].startswith(f"copied {saved[2].id} (")
    flip(data_file(primary, saved[0].id), 9000)
    answer = CliRunner().invoke(cli, ["copy", str(primary), str(target)])
    assert answer.exit_code == 1
    assert f"was there {saved[2].id}" in answer.stdout
    assert f"NOT COPIED {saved[0].id}: block 0 of" in answer.stdout
    assert steps(target) == [1, 2]


def test_repair_on_the_command_line(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        saved = store.save(state(0), step=0)
    flip(data_file(primary, saved.id), 9000)

    answer = CliRunner().invoke(cli, ["verify", str(primary), "--repair"])
    assert (answer.exit_code, "--backup" in answer.stderr) == (2, True)
    assert CliRunner().invoke(cli, ["verify", str(primary), "--backup", str(backup)]).exit_code == 1
    answer = CliRunner().invoke(cli, ["verify", str(primary), "--repair", "--backup", str(backup)])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("REPAIRED block 0 of ")
    answer = CliRunner().invoke(cli, ["verify", str(primary)])
    assert answer.exit_code == 0


def test_ls_tells_the_lag_and_what_is_only_in_the_backup(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup, keep=cs.last(1)) as store:
        for step in range(2):
            store.save(state(step), step=step)
    answer = CliRunner().invoke(cli, ["ls", str(primary)])
    assert answer.stdout.splitlines()[-1] == f"backup {backup.as_uri()}: has all 1"
    answer = CliRunner().invoke(cli, ["ls", str(primary), "--backup", str(backup)])
    assert answer.stdout.count(f"only in {backup.as_uri()}") == 1
    with cs.open(primary) as store:
        store.save(state(2), step=2)
    answer = CliRunner().invoke(cli, ["ls", str(primary)])
    assert f"backup {backup.as_uri()}: lacks 1 checkpoint, " in answer.stdout.splitlines()[-1]


def test_doctor_tells_the_lag(primary: Path, backup: Path) -> None:
    with cs.open(primary, backup=backup) as store:
        store.save(state(0), step=0)
    with cs.open(primary) as store:
        late = store.save(state(1), step=1)
    answer = CliRunner().invoke(cli, ["doctor", str(primary), "--size", "2MB"])
    assert answer.stdout.splitlines()[-1].startswith(f"backup {backup.as_uri()}: lacks 1 checkpoint, ")
    answer = CliRunner().invoke(cli, ["doctor", str(primary), "--size", "2MB", "--json"])
    (lag,) = json.loads(answer.stdout)["backups"]
    assert (lag["behind"], lag["behind_bytes"]) == (1, late.stored_bytes)
