"""A store behind a web server: read by whoever knows its address, written by nobody."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import ckptstore as cs
from ckptstore.errors import NotFoundError, StorageError, UnavailableError
from ckptstore.storage import open_storage
from tests.storage.generic.rig import patience

pytest.importorskip("aiohttp", reason="there is no aiohttp: pip install 'ckptstore[s3]'")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own: pages of links, and no ranges. ``ranges`` adds these, ``pages=False`` takes the pages away."""

    ranges: ClassVar[bool] = False
    pages: ClassVar[bool] = True
    failing: ClassVar[list[int]] = []
    sent: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        if not self._failed():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self._failed():
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if self.ranges and span and path.is_file():
            data = path.read_bytes()[int(span[1]) : int(span[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.sent.append(len(data))
            return
        super().do_GET()

    def list_directory(self, path: Any) -> Any:
        if self.pages:
            return super().list_directory(path)
        self.send_error(404)
        return None

    def log_message(self, *_: Any) -> None:
        pass

    def _failed(self) -> bool:
        if self.failing:
            self.send_error(self.failing.pop())
            return True
        return False


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> type[Handler]:
    class Own(Handler):
        failing: ClassVar[list[int]] = []
        sent: ClassVar[list[int]] = []

    patience(monkeypatch, 0.5)
    return Own


@pytest.fixture
def url(tmp_path: Path, kind: type[Handler]) -> Iterator[str]:
    handler = functools.partial(kind, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/runs"
        server.shutdown()
        thread.join()


@pytest.fixture
def saved(tmp_path: Path) -> torch.Tensor:
    values = torch.arange(100_000)
    cs.open(tmp_path / "runs").save({"values": values}, step=7)
    return values


@pytest.mark.parametrize("ranges", [True, False])
def test_a_store_is_read_from_the_web(url: str, kind: type[Handler], saved: torch.Tensor, ranges: bool) -> None:
    kind.ranges = ranges
    with cs.open(url, read_only=True) as store:
        assert [checkpoint.step for checkpoint in store.checkpoints()] == [7]
        assert torch.equal(store.load("latest")["values"], saved)
        assert store.verify().ok
    assert bool(kind.sent) is ranges


def test_nothing_can_be_written(url: str, saved: torch.Tensor, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    storage = open_storage(url)
    for write in (lambda: storage.create("a", b""), lambda: storage.open_writer("a"), lambda: storage.delete(["a"])):
        with pytest.raises(StorageError, match="read-only: nothing can be written to http"):
            write()
    with pytest.raises(cs.SaveFailedError, match="read-only"):
        cs.open(url).save({"values": saved}, step=8)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_server_without_listings_is_never_taken_for_empty(url: str, kind: type[Handler], saved: torch.Tensor) -> None:
    kind.pages = False

    with pytest.raises(StorageError, match="list"):
        cs.open(url, read_only=True).checkpoints()


def test_a_server_that_fails_is_asked_again(
    url: str, kind: type[Handler], saved: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 60)
    # The first is for the question by HEAD, the second for that by GET.
    kind.failing += [503, 503]

    assert open_storage(url).size("store.json") > 0
    assert kind.failing == []


def test_a_server_that_goes_on_failing_is_away(url: str, kind: type[Handler], saved: torch.Tensor) -> None:
    storage = open_storage(url)
    for ask in (lambda: storage.size("store.json"), lambda: storage.list("commits/")):
        kind.failing += [503] * 1000
        with pytest.raises(UnavailableError):
            ask()
        assert 0 < len(kind.failing) < 1000
        kind.failing.clear()
    with pytest.raises(NotFoundError):
        storage.size("no-such")


def test_nobody_there_is_away() -> None:
    """Port 9 is the one where everything is discarded, and nobody listens."""
    with pytest.MonkeyPatch.context() as patch:
        patience(patch, 0.5)
        with pytest.raises(UnavailableError):
            cs.open("http://127.0.0.1:9/runs", read_only=True).checkpoints()
