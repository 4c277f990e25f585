"""What saving does, as metrics for Prometheus. Needs prometheus_client: ckptstore[prometheus]."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ckptstore.errors import FormatError
from ckptstore.trainer.events import Failed, Listener, Resumed, Saved, Stats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    Metric = TypeVar("Metric", Counter, Gauge, Histogram)

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)
_STALLS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SAVES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)
"""Bounds of the histograms, in seconds."""


class Metrics(Listener):
    """What saving does, for Prometheus.

    | Metric | Kind | |
    |---|---|---|
    | ``ckptstore_step`` | gauge | optimizer steps that are done |
    | ``ckptstore_saves_total`` | counter | checkpoints saved by this process |
    | ``ckptstore_save_failures_total`` | counter | saves that failed |
    | ``ckptstore_written_bytes_total`` | counter | stored by these saves; what they borrowed doesn't count |
    | ``ckptstore_last_saved_step`` | gauge | step of the newest checkpoint; NaN before there is one |
    | ``ckptstore_last_saved_timestamp_seconds`` | gauge | when it was made, in Unix time; NaN before there is one |
    | ``ckptstore_stall_seconds`` | histogram | for how long a save kept training waiting |
    | ``ckptstore_save_seconds`` | histogram | from the decision to save until it was durable |

    They are unregistered when the run ends, so that the next one in this process can have its own.

    Args:
        registry: where to register them; without one, the client's own.
        labels: on all of them, as ``{"run": "gpt2"}``.
        port: serve the registry at http://ADDRESS:PORT/metrics until the run ends; 0 takes a free port.
        address: where to listen; "127.0.0.1" keeps it on this machine.

    Attributes:
        port: where they are served; None where they aren't.

    Raises:
        FormatError: the registry has such metrics already, a label or a port that can't be, or nobody can listen there.
        ImportError: there is no prometheus_client.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        labels: Mapping[str, str] | None = None,
        port: int | None = None,
        *,
        address: str = "0.0.0.0",  # noqa: S104 - Prometheus asks from another machine
    ) -> None:
        client = _client()
        self._registry: CollectorRegistry = client.REGISTRY if registry is None else registry
        self._labels = _checked(labels or {})
        self._registered: list[Any] = []
        self._close: Callable[[], None] | None = None
        self._step = 0
        self.port: int | None = None
        try:
            self._register(client)
            self._serve(client, port, address)
        except BaseException:
            self._end()
            raise

    def on_step(self, step: int) -> None:
        """Remembers it until somebody asks."""
        self._step = step

    def on_saved(self, event: Saved) -> None:
        """Counts it."""
        checkpoint = event.checkpoint
        self._saves.inc()
        self._written.inc(checkpoint.stored_bytes - checkpoint.borrowed_bytes)
        self._stall.observe(event.stall_s)
        self._duration.observe(event.seconds)
        self._last_step.set(checkpoint.step)
        self._last_time.set(checkpoint.created.timestamp())

    def on_failed(self, event: Failed) -> None:
        """Counts it."""
        self._failures.inc()

    def on_resumed(self, event: Resumed) -> None:
        """The checkpoint that was loaded is the newest so far."""
        if event.checkpoint is not None:
            self._step = event.checkpoint.step
            self._last_step.set(event.checkpoint.step)
            self._last_time.set(event.checkpoint.created.timestamp())

    def on_closed(self, stats: Stats) -> None:
        """Stops serving and unregisters all."""
        self._end()

    def _register(self, client: Any) -> None:
        self._saves = self._made(client.Counter, "saves", "Checkpoints saved by this process.")
        self._failures = self._made(client.Counter, "save_failures", "Saves that failed.")
        self._written = self._made(client.Counter, "written_bytes", "Bytes stored by these saves.")
        self._last_step = self._made(client.Gauge, "last_saved_step", "Step of the newest checkpoint.")
        self._last_time = self._made(client.Gauge, "last_saved_timestamp_seconds", "When it was made, in Unix time.")
        self._stall = self._made(client.Histogram, "stall_seconds", "How long a save kept training waiting.", _STALLS)
        self._duration = self._made(client.Histogram, "save_seconds", "From the decision until it was durable.", _SAVES)
        self._made(client.Gauge, "step", "Optimizer steps that are done.").set_function(lambda: self._step)
        self._last_step.set(math.nan)
        self._last_time.set(math.nan)

    def _made(self, kind: type[Metric], name: str, text: str, bounds: tuple[float, ...] = ()) -> Metric:
        more: dict[str, Any] = {"buckets": bounds} if bounds else {}
        try:
            made = kind(f"ckptstore_{name}", text, list(self._labels), registry=self._registry, **more)
        except ValueError as error:
            raise FormatError(
                f"Metrics: {error}. A registry takes the metrics of one run at a time: for another give "
                "registry=prometheus_client.CollectorRegistry()"
            ) from error
        self._registered.append(made)
        return made.labels(**self._labels) if self._labels else made

    def _serve(self, client: Any, port: int | None, address: str) -> None:
        if port is None:
            return
        if type(port) is not int or not 0 <= port <= 65535:
            raise FormatError(f"Metrics(port={port!r}) must be a whole number from 0 to 65535")
        try:
            server, thread = client.start_http_server(port, address, self._registry)
        except OSError as error:
            raise FormatError(f"Metrics: can't listen at {address}:{port} ({error}): give another port") from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close = close
        self.port = server.server_port

    def _end(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            close()
        while self._registered:
            self._registry.unregister(self._registered.pop())


def _checked(labels: Mapping[Any, object]) -> dict[str, str]:
    for name in labels:
        # "le" is the histograms' own.
        if not isinstance(name, str) or not _LABEL.fullmatch(name) or name == "le":
            raise FormatError(
                f"Metrics(labels=…): {name!r:.60} is no name of a label; write a word, as {{'run': 'gpt2'}}"
            )
    return {name: str(value) for name, value in labels.items()}


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError(
            f"Metrics needs prometheus_client, and it can't be imported ({error}): pip install 'ckptstore[prometheus]'"
        ) from error
    return prometheus_client
