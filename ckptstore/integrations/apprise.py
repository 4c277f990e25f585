"""Messages about a run by e-mail, Slack and whatever else Apprise reaches. Needs apprise: ckptstore[notify]."""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

from ckptstore.errors import FormatError
from ckptstore.policy.guard import Divergence
from ckptstore.trainer.events import Failed, Listener, Resumed, Saved, Stats
from ckptstore.units import count_text, duration_s

if TYPE_CHECKING:
    import apprise

Kind: TypeAlias = Literal["saved", "best", "failed", "diverged", "resumed", "closed"]

_KINDS = ("saved", "best", "failed", "diverged", "resumed", "closed")
_WAITING = 100
"""More messages than this nobody reads, once the service answers again."""
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,15})://")
_TALKATIVE = (
    "apprise",
    "requests_oauthlib.oauth1_session",
    "urllib3.connection",
    "urllib3.connectionpool",
    "urllib3.poolmanager",
    "urllib3.util.retry",
)
"""The loggers to which Apprise and what it sends with tell URLs, or parts of them."""
_Queue: TypeAlias = "queue.SimpleQueue[tuple[str, str, str] | None]"
_log = logging.getLogger("ckptstore")


class Notifier(Listener):
    """Sends messages about a run through Apprise, so that training neither waits for them nor fails by them.

    They are sent by a thread, in order. What can't be sent is left out: the log has one warning for each service that
    fails. The URLs hold passwords and tokens: no message, log or error shows them, whatever the level of logging.

    Args:
        urls: of the services, as Apprise writes them: "mailto://…", "slack://…"; see
            https://github.com/caronc/apprise/wiki.
        on: of what to tell: any of saved, best, failed, resumed and closed.
        wait: for how long the end of a run may wait for what isn't sent yet, in seconds or as text.

    Raises:
        FormatError: there is no URL, or one that Apprise doesn't understand; another kind, or no duration.
        ImportError: there is no apprise.
    """

    def __init__(
        self, *urls: str, on: Kind | Iterable[Kind] = ("failed", "best", "diverged", "closed"), wait: float | str = 5.0
    ) -> None:
        self._on = _kinds(on)
        self._wait_s = min(duration_s(wait, "wait"), threading.TIMEOUT_MAX)
        if not urls:
            raise FormatError("Notifier: give the URL of at least one service, as mailto://… or slack://…")
        self._services = [_service(url, f"URL {number} of {len(urls)}") for number, url in enumerate(urls, 1)]
        self._waiting: _Queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dropped = False

    def __repr__(self) -> str:
        return f"Notifier({count_text(len(self._services), 'service')}, on={self._on!r})"

    def on_saved(self, event: Saved) -> None:
        """Says so."""
        self._tell("saved", "info", f"step {event.checkpoint.step} saved", str(event))

    def on_best(self, event: Saved) -> None:
        """Says by which metrics."""
        best = ", ".join(f"{name} {value:.6g}" for name, value in event.best.items())
        self._tell("best", "success", f"best so far: {best}", str(event))

    def on_failed(self, event: Failed) -> None:
        """Says why, and whether training ends."""
        then = "Training ends." if event.fatal else "Training goes on; older checkpoints are untouched."
        title = f"saving step {event.step} failed"
        self._tell("failed", "failure" if event.fatal else "warning", title, f"{event}\n{then}")

    def on_diverged(self, event: Divergence) -> None:
        """Says why the run ends."""
        self._tell("diverged", "failure", f"training has diverged at step {event.step}", str(event))

    def on_resumed(self, event: Resumed) -> None:
        """Says from where, and what differs."""
        title = f"resumed from step {event.checkpoint.step}" if event.checkpoint else "a fresh start"
        kept = [f"not in the checkpoint: {name}" for name in event.kept]
        unused = [f"left in the checkpoint: {name}" for name in event.unused]
        self._tell("resumed", "info", title, "\n".join([str(event), *kept, *unused, *event.differences]))

    def on_closed(self, stats: Stats) -> None:
        """Says what saving has cost, and waits for what isn't sent yet, at most ``wait``."""
        self._tell("closed", "info", "the run has ended", str(stats))
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._waiting.put(None)
        thread.join(self._wait_s)
        if thread.is_alive():
            left = count_text(self._waiting.qsize(), "message")
            _log.warning("notifications: the services are slow; up to %s may not have been sent", left)

    def _tell(self, kind: Kind, level: str, title: str, body: str) -> None:
        if kind not in self._on:
            return
        if self._thread is None:
            # A new queue too: the thread of a run before may still be at its own.
            self._waiting = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=self._send_all, args=(self._waiting,), name="ckptstore-notify", daemon=True
            )
            self._thread.start()
        if self._waiting.qsize() < _WAITING:
            self._waiting.put((level, f"ckptstore: {title}", body))
        elif not self._dropped:
            self._dropped = True
            _log.warning("notifications: %d wait to be sent already; further ones are left out", _WAITING)

    def _send_all(self, waiting: _Queue) -> None:
        while (message := waiting.get()) is not None:
            for service in self._services:
                service.send(*message)


class _Silence(logging.Filter):
    """Keeps out of the log what is said in this thread, as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self._here, "entered", False)

    def __enter__(self) -> None:
        self._here.entered = True

    def __exit__(self, *_: object) -> None:
        self._here.entered = False


_silence = _Silence()


class _Service:
    """One of them. Only Apprise knows the URL."""

    def __init__(self, target: apprise.NotifyBase, place: str) -> None:
        self._target = target
        self._name = f"{target.service_name} ({place})"
        self._failed = False

    def send(self, level: str, title: str, body: str) -> None:
        why = "it can't be reached, or refuses"
        with _silence:
            try:
                # By the service itself: more than one would be told by threads of Apprise, which nothing silences.
                sent = self._target.notify(body=body, title=title, notify_type=level, body_format="text")
            except Exception as error:
                # Only its kind: the text may have the URL in it.
                sent, why = False, type(error).__name__
        if not sent and not self._failed:
            self._failed = True
            _log.warning("notifications: %s was not told: %s. Further failures are not logged", self._name, why)


def _service(url: object, place: str) -> _Service:
    try:
        import apprise
    except ImportError as error:
        raise ImportError(
            f"Notifier needs apprise, and it can't be imported ({error}): pip install 'ckptstore[notify]'"
        ) from error
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_silence)
    target = None
    if isinstance(url, str):
        # What it raises has the URL in it.
        with _silence, contextlib.suppress(Exception):
            target = apprise.Apprise.instantiate(url)
    if target is None:
        scheme = _SCHEME.match(url) if isinstance(url, str) else None
        shown = f"{scheme[0]}…" if scheme else "no scheme://"
        raise FormatError(
            f"Notifier: {place} ({shown}) is none that Apprise understands, or it lacks something; it isn't shown, as "
            "it may hold a password. See https://github.com/caronc/apprise/wiki for how it is written"
        )
    return _Service(target, place)


def _kinds(on: object) -> tuple[str, ...]:
    given = (on,) if isinstance(on, str) else tuple(on) if isinstance(on, Iterable) else (on,)
    if not given or (wrong := [kind for kind in given if kind not in _KINDS]):
        what = f"{wrong[0]!r:.40} is none" if given else "there is none"
        raise FormatError(f"Notifier(on=…): tell of {', '.join(_KINDS)}, or some of them; {what}")
    return given
