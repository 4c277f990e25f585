"""Messages through the real Apprise, to a web server of this machine."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ckptstore import FormatError
from ckptstore.integrations.apprise import Notifier
from ckptstore.policy.guard import Divergence
from ckptstore.trainer.events import Resumed
from tests.integrations.events import STATS, failed, resumed, saved

# Apprise imports it for a library of PGP.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
CANARY = "c4n4ry"


class Service:
    """Takes messages as JSON, when its gate is open."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.status = 200
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.arrived.release()
                service.gate.wait()
                service.messages.append(json.loads(body) | {"path": self.path, "auth": self.headers["Authorization"]})
                self.send_response(service.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def url(self) -> str:
        """With secrets wherever a URL can have them; Apprise gives up late, as machines may be slow."""
        place = f"127.0.0.1:{self.server.server_port}"
        return f"json://user:{CANARY}1@{place}/{CANARY}2?+X-Key={CANARY}3&rto=60&cto=60"

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.messages]

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All that is logged by anybody."""
    caplog.set_level(1)
    return caplog


def ours(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "ckptstore"]


def tell_all(notifier: Notifier, place: Path) -> None:
    """One event of each kind."""
    event = saved(place)
    notifier.on_resumed(resumed(event))
    notifier.on_step(1)
    notifier.on_saved(event)
    notifier.on_best(event)
    notifier.on_failed(failed())
    notifier.on_failed(failed(fatal=True))
    notifier.on_diverged(Divergence(9, "loss", float("nan"), "is nan", 8))
    notifier.on_closed(STATS)


def test_all_kinds_arrive_in_order(service: Service, tmp_path: Path) -> None:
    """With what is known of each."""
    notifier = Notifier(service.url(), on=("saved", "best", "failed", "diverged", "resumed", "closed"), wait="60s")
    tell_all(notifier, tmp_path)
    assert service.titles == [
        "ckptstore: resumed from step 3",
        "ckptstore: step 3 saved",
        "ckptstore: best so far: val_loss 2.5",
        "ckptstore: saving step 6 failed",
        "ckptstore: saving step 6 failed",
        "ckptstore: training has diverged at step 9",
        "ckptstore: the run has ended",
    ]
    bodies = [message["message"] for message in service.messages]
    assert all(text in bodies[0] for text in ("resumed from step 3", "scaler", "ema", "lr: 0.1, was 0.2"))
    assert "every 3 steps, best val_loss" in bodies[1]
    assert "no space left" in bodies[3]
    assert "goes on" in bodies[3]
    assert "Training ends" in bodies[4]
    assert "all was well until step 8" in bodies[5]
    assert "2 checkpoints saved, 1 save failed" in bodies[6]
    assert [message["type"] for message in service.messages] == [
        "info",
        "info",
        "success",
        "warning",
        "failure",
        "failure",
        "info",
    ]


@pytest.mark.parametrize(
    ("on", "count"), [("closed", 1), (["resumed", "saved"], 2), (("failed",), 2), (("failed", "best", "closed"), 4)]
)
def test_only_what_is_asked_for(service: Service, tmp_path: Path, on: Any, count: int) -> None:
    """One kind or several, and by default failures, bests and the end."""
    tell_all(Notifier(service.url(), on=on, wait=60), tmp_path)
    assert len(service.messages) == count


def test_by_default(service: Service, tmp_path: Path) -> None:
    """Failures, bests and the end."""
    tell_all(Notifier(service.url(), wait=60), tmp_path)
    assert [title.split()[1] for title in service.titles] == ["best", "saving", "saving", "training", "the"]


def test_a_fresh_start(service: Service) -> None:
    """Is told as one."""
    notifier = Notifier(service.url(), on="resumed", wait=60)
    notifier.on_resumed(Resumed(None, "runs/x"))
    notifier.on_closed(STATS)
    assert service.titles == ["ckptstore: a fresh start"]


def test_several_services(service: Service) -> None:
    """One that refuses is logged once, and the others get all; nothing is raised."""
    other = Service()
    service.status = 500
    notifier = Notifier(service.url(), other.url(), wait=60)
    for _ in range(3):
        notifier.on_failed(failed())
    notifier.on_closed(STATS)
    assert len(other.messages) == len(service.messages) == 4
    other.close()


def test_failures_are_logged_once(service: Service, log: pytest.LogCaptureFixture) -> None:
    """Whether the service answers with an error or not at all."""
    service.status = 500
    gone = Service()
    gone.close()
    notifier = Notifier(service.url(), gone.url(), wait=60)
    for _ in range(3):
        notifier.on_failed(failed())
    notifier.on_closed(STATS)
    assert len(service.messages) == 4
    assert len(ours(log)) == 2
    assert all("URL" in text and "JSON" in text for text in ours(log))


def test_what_a_service_raises_is_logged_by_its_kind(
    service: Service, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text may hold the URL."""
    raised = []

    def send(self: object, **_: object) -> bool:
        raised.append(1)
        raise RuntimeError(f"can't send to {CANARY}")

    monkeypatch.setattr("apprise.plugins.custom_json.NotifyJSON.send", send)
    notifier = Notifier(service.url(), wait=60)
    notifier.on_failed(failed())
    notifier.on_closed(STATS)
    assert len(raised) == 2
    assert len(ours(log)) == 1
    assert "RuntimeError" in ours(log)[0]
    assert CANARY not in log.text


def test_training_never_waits(service: Service, log: pytest.LogCaptureFixture) -> None:
    """A service that hangs holds back neither events nor the end; what is too much is left out, and said once."""
    service.gate.clear()
    notifier = Notifier(service.url(), on=("failed", "closed"), wait=0)
    notifier.on_failed(failed())
    service.arrived.acquire()
    for _ in range(200):
        notifier.on_failed(failed())
    notifier.on_closed(STATS)
    assert service.messages == []
    assert [("left out" in text, "may not have been sent" in text) for text in ours(log)] == [
        (True, False),
        (False, True),
    ]


def test_a_second_run(service: Service) -> None:
    """After the end the notifier can be used again."""
    notifier = Notifier(service.url(), wait=60)
    for _ in range(2):
        notifier.on_closed(STATS)
    assert len(service.messages) == 2
    Notifier(service.url(), on="failed").on_closed(STATS)
    assert len(service.messages) == 2


@pytest.mark.parametrize("status", [200, 500])
def test_urls_are_never_shown(service: Service, tmp_path: Path, log: pytest.LogCaptureFixture, status: int) -> None:
    """Not in messages, nor in any log whatever its level, nor as text; yet they were used."""
    service.status = status
    notifier = Notifier(service.url(), on=("saved", "best", "failed", "resumed", "closed"), wait=60)
    tell_all(notifier, tmp_path)
    assert f"/{CANARY}2" in service.messages[0]["path"]
    assert service.messages[0]["auth"].startswith("Basic ")
    told = [(message["title"], message["message"]) for message in service.messages]
    assert CANARY not in f"{notifier!r} {notifier} {told} {log.text}"
    assert repr(notifier) == "Notifier(1 service, on=('saved', 'best', 'failed', 'resumed', 'closed'))"
    logging.getLogger("apprise").warning("what others send")
    assert "what others send" in log.text


def test_the_canary_would_be_seen(service: Service, log: pytest.LogCaptureFixture) -> None:
    """Used by itself, Apprise tells its URLs to such a log."""
    import apprise

    target = apprise.Apprise.instantiate(service.url())
    assert target.notify(body="x", title="y")
    assert CANARY in log.text


@pytest.mark.parametrize(
    "url",
    [
        f"nope://user:{CANARY}@host/{CANARY}?{CANARY}={CANARY}",
        f"{CANARY}",
        f"json://:{CANARY}@/",
        f"slack://{CANARY}/{CANARY}/!",
        f"{CANARY * 5}://x",
        "",
        "json://",
        None,
        7,
        {"schema": "json", "host": CANARY},
    ],
    ids=range(10),
)
def test_wrong_urls_are_refused(url: Any, log: pytest.LogCaptureFixture) -> None:
    """At once, by their number and scheme, and without showing more of them anywhere."""
    with pytest.raises(FormatError, match=r"URL 2 of 2 \(") as caught:
        Notifier("json://127.0.0.1", url)
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + log.text


@pytest.mark.parametrize("on", [(), "end", ("failed", "end"), None, [3]])
def test_wrong_kinds_are_refused(on: Any) -> None:
    """Saying which there are."""
    with pytest.raises(FormatError, match="saved, best, failed, diverged, resumed, closed"):
        Notifier("json://127.0.0.1", on=on)


def test_what_else_is_refused() -> None:
    """No service, and what is no duration."""
    with pytest.raises(FormatError, match="at least one service"):
        Notifier()
    with pytest.raises(FormatError, match="wait: 'soon'"):
        Notifier("json://127.0.0.1", wait="soon")


def test_without_apprise_it_says_what_to_install(tmp_path: Path) -> None:
    """The module imports, the class doesn't work."""
    (tmp_path / "apprise.py").write_text('raise ImportError("not here")\n')
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ckptstore.integrations.apprise import Notifier\n"
        "try: Notifier('json://127.0.0.1')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'ckptstore[notify]'" in done.stdout
