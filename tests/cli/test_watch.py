"""``ckptstore watch``: what comes is told, in a terminal and without one, also while the storage is away."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

import ckptstore
from ckptstore.cli.watch import Look, Watcher, looks
from ckptstore.cli.watchview import picture, sparkline
from ckptstore.engine.catalogue import Damage
from ckptstore.errors import UnavailableError
from ckptstore.maintenance.receipts import Lag
from ckptstore.storage.memory import MemoryStorage
from tests.cli.conftest import Run, environment, interrupt
from tests.tools.fabricated import Fake, fabricate

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold]x"


def save(url: str, step: int, **more: Any) -> str:
    with ckptstore.open(url) as store:
        return store.save({"x": step}, step=step, **more).id


def watcher_of(store: ckptstore.Store, url: str = "memory://never") -> Watcher:
    return Watcher(store, lambda: ckptstore.open(url, read_only=True))


@contextmanager
def watching(*args: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "ckptstore.cli",
        "watch",
        *args,
        "--interval",
        "100ms" if "--once" in args else "0s",
    ]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **more
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


# -- without a terminal -----------------------------------------------------------------------------------------


def test_once_tells_the_newest(run: Run, url: str, ids: list[str]) -> None:
    answer = run("watch", url, "--once", "--last", "2")

    assert answer.exit_code == 0
    assert [line.split()[0] for line in answer.stdout.splitlines()] == ids[1:]
    assert "step 30" in answer.stdout.splitlines()[1]
    assert run("watch", url, "--once", "--last", "0").stdout == ""
    lines = [json.loads(line) for line in run("watch", url, "--once", "--json").stdout.splitlines()]
    assert [line["id"] for line in lines] == ids
    assert lines[0]["metrics"] == {"val_loss": 3.0}


def test_each_new_checkpoint_is_a_line_at_once(url: str, ids: list[str]) -> None:
    with watching(url, "--json", "--last", "1") as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["id"] == ids[2]
        fourth = save(url, 40)
        assert json.loads(child.stdout.readline())["id"] == fourth
        fifth = save(url, 35, metrics={"val_loss": float("nan")})
        line = json.loads(child.stdout.readline())
        assert (line["id"], line["metrics"]) == (fifth, {"val_loss": "nan"})
        assert interrupt(child) == (0, "", "")


def test_damage_is_bad_news_for_once(run: Run, url: str, ids: list[str]) -> None:
    (Path(url) / "commits" / f"{ids[1]}.json").write_text("torn")

    assert run("watch", url, "--once").exit_code == 1


def test_a_reason_can_not_command_the_terminal(run: Run, store_path: Path) -> None:
    save(str(store_path), 1, metrics={HOSTILE: 1.0}, reasons=[HOSTILE])

    shown = run("watch", str(store_path), "--once").stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown


# -- the storage away -------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[str]]:
    """Make storage in memory fail, or not; what was asked meanwhile."""
    asked: list[str] = []
    state = {"away": False}
    for name in ("list", "read"):
        real = getattr(MemoryStorage, name)

        def failing(self: MemoryStorage, key: str, _name: str = name, _real: Any = real, **more: Any) -> Any:
            asked.append(f"{_name} {key}")
            if state["away"]:
                raise UnavailableError(f"{self.url} doesn't answer")
            return _real(self, key, **more)

        monkeypatch.setattr(MemoryStorage, name, failing)

    def switch(away: bool) -> list[str]:
        state["away"] = away
        asked.clear()
        return asked

    return switch


def test_it_says_that_the_storage_is_away_and_goes_on(
    unreachable: Callable[[bool], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with ckptstore.open("memory://watched") as writer, ckptstore.open("memory://watched", read_only=True) as store:
        writer.save({"x": 1}, step=1)
        seen = looks(watcher_of(store), 0.0, once=False)
        assert next(seen).away is None
        asked = unreachable(True)
        for _ in range(2):
            look = next(seen)
            assert look.away == "memory://watched doesn't answer"
            assert [c.step for c in look.checkpoints] == [1]
        assert asked
        unreachable(False)
        writer.save({"x": 1}, step=2)
        look = next(seen)
        assert look.away is None
        assert [c.step for c in look.checkpoints] == [1, 2]
    said = capsys.readouterr().err.splitlines()
    assert said == ["warning: memory://watched doesn't answer; waiting for it", "it is there again"]


def test_a_look_reads_just_what_is_new(unreachable: Callable[[bool], list[str]]) -> None:
    """One that finds nothing new reads nothing at all."""
    with ckptstore.open("memory://cheap") as writer, ckptstore.open("memory://cheap", read_only=True) as store:
        for step in range(5):
            writer.save({"x": 1}, step=step)
        watcher = watcher_of(store)
        watcher.look()
        asked = unreachable(False)
        watcher.look()
        assert asked == ["list trash/", "list commits/"]
        new = writer.save({"x": 1}, step=5)
        asked = unreachable(False)
        watcher.look()
        assert [it for it in asked if it.startswith("read")] == [f"read commits/{new.id}.json"]


@pytest.mark.parametrize("how", ["removed while it was open", "empty now, and wasn't before"])
def test_a_disk_that_is_gone_is_no_empty_store(url: str, ids: list[str], tmp_path: Path, how: str) -> None:
    """And once it is there again, it is another folder."""
    shutil.copytree(url, tmp_path / "kept")
    with ckptstore.open(url, read_only=True) as store:
        watcher = watcher_of(store, url)
        if how.startswith("removed"):
            shutil.rmtree(url)
            Path(url).mkdir()
        else:
            for path in Path(url).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for _ in range(2):
            look = watcher.look()
            assert how in str(look.away)
            assert [c.id for c in look.checkpoints] == ids
        shutil.copytree(tmp_path / "kept", url, dirs_exist_ok=True)
        fourth = save(url, 40)
        look = watcher.look()
        assert look.away is None
        assert [c.id for c in look.checkpoints] == [*ids, fourth]
        watcher.close()


# -- in a terminal ----------------------------------------------------------------------------------------------


def drawn(
    url: str,
    *args: str,
    columns: int,
    meanwhile: Callable[[], object] = lambda: None,
    until: str = "",
    **extra: str,
) -> tuple[int, str]:
    """Watch in a pseudo terminal, do something ``meanwhile``, and end it at ``until``: exit code, all that was said."""
    leader, follower = pty.openpty()
    size = {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}
    command = [sys.executable, "-m", "ckptstore.cli", "watch", url, "--interval", "0s", *args]
    child = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=subprocess.PIPE, env=environment(**(size | extra))
    )
    os.close(follower)
    seen: list[str] = []

    def read() -> None:
        try:
            while chunk := os.read(leader, 65536):
                seen.append(chunk.decode())
        except OSError:
            # Linux reports the end of a terminal so.
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        if until:
            wait(lambda: "val_loss" in "".join(seen), child)
            meanwhile()
            wait(lambda: until in plain("".join(seen)), child)
            child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert said == b""
    finally:
        child.kill()
        reader.join()
        os.close(leader)
    return child.returncode, "".join(seen)


def wait(holds: Callable[[], bool], child: subprocess.Popen[Any]) -> None:
    while not holds():
        assert child.poll() is None
        time.sleep(0.01)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_it_is_drawn_anew_until_ctrl_c(url: str, ids: list[str]) -> None:
    """What comes meanwhile appears, and the cursor is given back."""
    code, seen = drawn(url, columns=120, meanwhile=lambda: save(url, 1234, reasons=["SIGTERM"]), until="SIGTERM")

    assert code == 0
    text = plain(seen)
    assert f"{Path(url).as_uri()}" in text
    assert "step 1,234" in text
    assert "3 checkpoints" in text
    assert "4 checkpoints" in text
    assert seen.rstrip().endswith("\x1b[?25h")


def test_a_dumb_terminal_gets_lines(url: str, ids: list[str]) -> None:
    code, seen = drawn(url, "--once", columns=80, TERM="dumb")

    assert code == 0
    assert [line.split()[0] for line in seen.splitlines()] == ids
    assert "\x1b" not in seen


def test_once_in_a_narrow_terminal_without_colours(url: str) -> None:
    code, seen = drawn(url, "--once", columns=40, NO_COLOR="1")

    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", seen)
    assert all(len(line) <= 40 for line in plain(seen).replace("\r", "").splitlines())


def picture_of(look: Look, columns: int = 100, rows: int = 30, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=file, width=columns, height=rows, highlight=False, force_terminal=True, color_system=None)
    console.print(picture("memory://x", look, console))
    file.flush()
    file.seek(0)
    return file.read()


@pytest.fixture
def look(url: str) -> Look:
    with ckptstore.open(url, read_only=True) as store:
        return watcher_of(store).look()


def test_the_picture_says_what_matters(look: Look) -> None:
    text = picture_of(look, 140)

    assert "step 30 · epoch 3 · saved" in text
    assert re.search(r"val_loss +█▁▅ 2, best 1 at step 20$", text, re.MULTILINE)
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("000")}
    assert rows.keys() == {"10", "20", "30"}
    assert "best val_loss" in rows["20"]
    assert "latest, every 10 steps" in rows["30"]


@pytest.mark.parametrize("columns", [12, 24, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(url: str, columns: int) -> None:
    """Also where letters take two columns."""
    with ckptstore.open(url) as store:
        store.save({"x": 1}, step=40, metrics={"損失": 0.5}, reasons=["評価の後に保存" * 9])
        lines = picture_of(watcher_of(store).look(), columns).splitlines()

    assert all(cell_len(line.rstrip()) <= columns for line in lines)
    rows = [line.split() for line in lines if line.startswith("000")]
    # What can't be seen whole, of ids, steps, times and sizes, isn't shown.
    assert [row[0] for row in rows] == ["0001-000001", "0001-000002", "0001-000003", "0002-000004"]
    assert all("…" not in "".join(row[:4]) for row in rows)
    assert [row[1:2] for row in rows] == ([[]] * 4 if columns == 12 else [["10"], ["20"], ["30"], ["40"]])


def test_it_is_no_higher_than_the_terminal(store_path: Path) -> None:
    fabricate(store_path, [Fake(step, metrics={"val_loss": 1.0, "acc": 0.5}) for step in range(100, 130)])
    with ckptstore.open(store_path, read_only=True) as store:
        text = picture_of(watcher_of(store).look(), rows=15)
    assert len(text.splitlines()) <= 14
    assert "129" in text.splitlines()[-1]


def test_what_is_wrong_is_said(look: Look) -> None:
    bad = replace(look.catalogue, damaged=[Damage("commits/x.json", "torn")])
    lag = Lag("s3://copy", 1, 2, 3_000_000, look.checkpoints[0].created)
    text = picture_of(replace(look, catalogue=bad, lags=[lag], away="it doesn't answer", away_s=75.0))

    assert "away for 75s: it doesn't answer" in text
    assert "backup s3://copy: lacks 2 checkpoints, 3.00 MB" in text
    assert "1 commit record damaged" in text


def test_an_empty_store_and_plain_letters(look: Look) -> None:
    empty = replace(look, catalogue=replace(look.catalogue, checkpoints=[]))
    assert "no checkpoint yet" in picture_of(empty)
    assert re.search(r"val_loss +%_=? ?", picture_of(look, encoding="ascii")) or "#" in picture_of(
        look, encoding="ascii"
    )


def test_sparklines() -> None:
    assert sparkline([1, 2, 3, 8]) == "▁▂▃█"
    assert sparkline([5.0, 5.0]) == "▄▄"
    assert sparkline([float("nan"), 1, float("inf"), 2]) == "?▁?█"
    assert sparkline([float("nan")]) == "?"
    assert sparkline([-1.7e308, 1.7e308]) == "▁█"
    assert sparkline([]) == ""
