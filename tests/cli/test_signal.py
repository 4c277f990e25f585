"""``ckptstore signal``: asks, waits where that is wanted, and tells whether a run took it up."""

from __future__ import annotations

import threading

import pytest

from ckptstore.engine import control
from ckptstore.storage import open_storage
from tests.cli.conftest import Run, interrupt, started


def test_asks_and_says_so(run: Run, url: str) -> None:
    answer = run("signal", url, "save")
    assert (answer.exit_code, answer.stdout) == (0, f"asked the run at {url} to save\n")
    assert run("signal", url, "stop", "--json").json == {"asked": "stop", "taken_up": None}
    assert [request.action for request in control.poll(open_storage(url))] == ["save", "stop"]


def test_a_second_one_is_bad_news(run: Run, url: str) -> None:
    run("signal", url, "save")
    answer = run("signal", url, "save", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (1, "exists")
    assert "no run has answered" in answer.stderr


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_nobody_there(run: Run, url: str, args: tuple[str, ...]) -> None:
    """The request is taken back."""
    answer = run("signal", url, "stop", "--wait", "0s", *args)
    assert answer.exit_code == 1
    assert "no run" in answer.stderr
    assert not args or answer.json["error"]["code"] == "unanswered"
    assert control.poll(open_storage(url)) == []


@pytest.mark.parametrize(("args", "says"), [((), "the run takes up"), (("--json",), '"taken_up": true')])
def test_a_run_takes_it_up(run: Run, url: str, args: tuple[str, ...], says: str) -> None:
    ended = threading.Event()

    def training() -> None:
        storage = open_storage(url)
        while not ended.wait(0.01):
            for request in control.poll(storage):
                control.answer(storage, request)

    thread = threading.Thread(target=training)
    thread.start()
    try:
        answer = run("signal", url, "save", "--wait", "10m", *args)
    finally:
        ended.set()
        thread.join()
    assert answer.exit_code == 0
    assert says in answer.stdout


def test_ctrl_c_takes_it_back(url: str) -> None:
    storage = open_storage(url)
    with started("signal", url, "stop", "--wait", "10m", until=lambda: control.poll(storage)) as child:
        code, stdout, stderr = interrupt(child)
    assert (code, stdout, stderr) == (130, "", "interrupted\n")
    assert control.poll(storage) == []


def test_no_such_action(run: Run, url: str) -> None:
    answer = run("signal", url, "pause", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "usage")
