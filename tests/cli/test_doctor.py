"""``ckptstore doctor``: the answer for people and scripts, and how it ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ckptstore
from ckptstore.errors import NotFoundError
from ckptstore.storage import LocalStorage, MemoryStorage
from ckptstore.tools import doctor
from tests.cli.conftest import Run, environment, interrupt, process, started

PROMISES = {
    *("process_end", "power_cut", "exclusive_create", "atomic_create", "read_after_write", "list_after_write"),
    *("delete", "read_ranges", "refuse_existing"),
}


def test_json_has_all_that_was_found(run: Run, tmp_path: Path) -> None:
    answer = run("doctor", str(tmp_path), "--size", "2MB", "--json")

    capabilities = LocalStorage(tmp_path).capabilities
    document = answer.json
    assert answer.exit_code == (0 if document["ok"] else 1)
    assert document["ok"] == (capabilities.durability == "power-cut")
    assert (document["url"], document["place"]) == (str(tmp_path), tmp_path.as_uri())
    assert (document["kind"], document["durability"]) == (capabilities.kind, capabilities.durability)
    assert {promise["name"] for promise in document["promises"]} == PROMISES
    assert all(set(promise) == {"name", "holds", "detail"} for promise in document["promises"])
    assert (document["consequences"], document["checks_writes"]) == ([], False)
    assert document["direct_io"] in ("used", "refused", "not asked")
    assert document["free_bytes"] > 0
    assert 0 < document["create"]["min_s"] <= document["create"]["median_s"] <= document["create"]["max_s"]
    assert document["size_bytes"] == 2_000_000
    assert [speed["in_flight"] for speed in document["blocks"]] == [1, 2, 4]
    for speed in document["blocks"]:
        assert speed["write_gb_s"] == pytest.approx(2e-3 / speed["write_s"])
        assert speed["read_gb_s"] == pytest.approx(2e-3 / speed["read_s"])
    assert list(tmp_path.iterdir()) == []


def test_table(run: Run, tmp_path: Path) -> None:
    """A folder that isn't there yet is neither an error nor made."""
    shown = run("doctor", str(tmp_path / "not-yet"), "--size", "2MB").stdout

    assert shown.startswith(f"tried in {tmp_path.as_uri()}\n")
    for title in (
        "promise ",
        "survives a power cut",
        "of many racers for a name one wins ",
        "free space ",
        "in flight ",
    ):
        assert title in shown
    assert "2.00 MB in blocks of 16 MiB; written until durable, read cold" in shown
    assert list(tmp_path.iterdir()) == []


def test_good_is_exit_0(run: Run, tmp_path: Path) -> None:
    if LocalStorage(tmp_path).capabilities.durability != "power-cut":
        pytest.skip("the tests' folder is in memory")
    answer = run("doctor", str(tmp_path), "--size", "2MB")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert answer.stdout.endswith("\ngood: all 9 promises hold\n")
    assert "doesn't hold" not in answer.stdout


def test_bad_news_is_exit_1(run: Run) -> None:
    answer = run("doctor", "memory://doctor-cli", "--size", "2MB")

    assert (answer.exit_code, answer.stderr) == (1, "")
    assert (
        "BAD NEWS: 2 of 9 promises don't hold: survives the end of the process; survives a power cut" in answer.stdout
    )
    assert "none: what was acknowledged is gone when the process ends" in answer.stdout
    assert "buffered: memory isn't asked for direct I/O" in answer.stdout
    assert "not known" in answer.stdout


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here")
def test_shared_memory_is_one_remark_and_exit_1() -> None:
    answer = process("doctor", "/dev/shm", "--size", "2MB")
    assert answer.exit_code == 1
    assert "1 of 9 promises doesn't hold: survives a power cut" in answer.stdout
    assert "buffered: tmpfs isn't asked for direct I/O" in answer.stdout
    assert answer.stderr.count("\n") == 1


def test_a_store_is_left_as_it_was(run: Run, url: str, ids: list[str]) -> None:
    before = sorted(path.relative_to(url) for path in Path(url).rglob("*"))
    run("doctor", url, "--size", "2MB")
    assert sorted(path.relative_to(url) for path in Path(url).rglob("*")) == before
    assert run("verify", url).exit_code == 0


def test_a_block_that_does_not_come_back_has_no_speed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(MemoryStorage):
        def size(self, key: str) -> int:
            raise NotFoundError(f"{key} isn't there", key=key)

    monkeypatch.setattr(doctor, "open_storage", lambda url: Losing())
    answer = run("doctor", str(tmp_path), "--size", "2MB", "--json")
    assert answer.exit_code == 1
    assert [speed["read_gb_s"] for speed in answer.json["blocks"]] == [None] * 3
    answer = run("doctor", str(tmp_path), "--size", "2MB")
    assert "what was written is read" in answer.stdout.partition("BAD NEWS")[2]


def test_what_follows_from_a_broken_promise_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unconditional(MemoryStorage):
        def probe(self, key: str, data: bytes) -> None:
            self.capabilities = replace(self.capabilities, exclusive_create=False, in_flight=2)

    monkeypatch.setattr(doctor, "open_storage", lambda url: Unconditional())
    answer = run("doctor", str(tmp_path), "--size", "2MB")
    assert answer.exit_code == 1
    after = answer.stdout.partition("BAD NEWS")[2].splitlines()
    assert "of many racers for a name one wins" in after[0]
    assert "may notice late" in after[1]
    assert "for 7 days" in after[2]
    assert "requests over the network: memory is no file system" in answer.stdout
    assert "noticed when it is read back" in answer.stdout


@pytest.mark.parametrize("option", [["--size", "2"], ["--size", "1B"], ["--size", "9000TB"]])
def test_options_are_checked(run: Run, tmp_path: Path, option: list[str]) -> None:
    assert run("doctor", str(tmp_path), *option).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_hold_nothing_is_exit_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/store", "link", "link/store"):
        answer = run("doctor", str(tmp_path / name), "--json")
        assert (answer.exit_code, answer.json["error"]["code"]) == (2, "storage")
        assert "is no folder" in answer.stderr
        assert answer.stderr.count("\n") == 1


def test_a_folder_that_vanishes_is_exit_2(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(*_: object) -> None:
        raise NotFoundError(f"{tmp_path} doesn't exist")

    monkeypatch.setattr(doctor, "examine", vanish)
    answer = run("doctor", str(tmp_path), "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "not_found")


def test_a_read_only_file_system_is_exit_2(tmp_path: Path) -> None:
    bind = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} {tmp_path}"
    program = f'{bind} && exec "$0" -m ckptstore.cli doctor {tmp_path}/store'
    unshare = shutil.which("unshare")
    command = [str(unshare), "--mount", "sh", "-c", program, sys.executable]
    if unshare is None or subprocess.run([*command[:4], bind], capture_output=True).returncode:
        pytest.skip("read-only bind mounts need root")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} is on a read-only file system.")


def test_ctrl_c_ends_it_and_removes_its_files(tmp_path: Path) -> None:
    """One line, exit code 130, nothing left."""
    blocks = lambda: list(tmp_path.glob("doctor-*/blocks/*"))  # noqa: E731
    with started("doctor", tmp_path, "--size", "500MB", until=blocks) as child:
        assert interrupt(child) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_leaves_is_collected_by_prune(url: str, run: Run) -> None:
    blocks = lambda: list(Path(url).glob("doctor-*/blocks/*"))  # noqa: E731
    with started("doctor", url, "--size", "500MB", until=blocks) as child:
        child.kill()
        child.communicate()
    with ckptstore.open(url) as store:
        store.prune(grace_s=0)
    assert list(Path(url).glob("doctor-*")) == []
    assert run("verify", url).stdout.startswith("good: 3 checkpoints")
