"""Metrics for Prometheus, as a real scrape of the real endpoint sees them."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from ckptstore import FormatError
from ckptstore.integrations.prometheus import Metrics
from ckptstore.trainer.events import Resumed
from tests.integrations.events import STATS, failed, resumed, saved

Scraped = dict[str, float]


def scrape(metrics: Metrics) -> Scraped:
    """What is served, by name with its labels in order."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics") as answer:
        return parse(answer.read())


def parse(text: bytes) -> Scraped:
    """The samples in what was served."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    """Served on a free port of this machine."""
    made = Metrics(CollectorRegistry(), port=0, address="127.0.0.1")
    yield made
    made.on_closed(STATS)


def test_before_anything_was_saved(metrics: Metrics) -> None:
    """Nothing is counted, and no checkpoint has a time in 1970."""
    seen = scrape(metrics)
    assert (seen["ckptstore_step"], seen["ckptstore_saves_total"], seen["ckptstore_save_failures_total"]) == (0, 0, 0)
    assert math.isnan(seen["ckptstore_last_saved_step"])
    assert math.isnan(seen["ckptstore_last_saved_timestamp_seconds"])


def test_a_run(metrics: Metrics, tmp_path: Path) -> None:
    """Each event changes what the next scrape sees."""
    event = saved(tmp_path)
    for step in range(1, 8):
        metrics.on_step(step)
    metrics.on_saved(event)
    metrics.on_best(event)
    metrics.on_saved(event)
    metrics.on_failed(failed())
    seen = scrape(metrics)
    assert seen["ckptstore_step"] == 7
    assert seen["ckptstore_saves_total"] == 2
    assert seen["ckptstore_save_failures_total"] == 1
    assert seen["ckptstore_last_saved_step"] == 3
    assert seen["ckptstore_last_saved_timestamp_seconds"] == event.checkpoint.created.timestamp()
    assert seen["ckptstore_written_bytes_total"] == 2 * event.checkpoint.stored_bytes > 0
    assert seen["ckptstore_stall_seconds_count"] == seen["ckptstore_save_seconds_count"] == 2
    assert seen["ckptstore_stall_seconds_sum"] == pytest.approx(0.03)
    assert (seen["ckptstore_stall_seconds_bucket{le=0.01}"], seen["ckptstore_stall_seconds_bucket{le=0.02}"]) == (0, 2)
    assert (seen["ckptstore_save_seconds_bucket{le=0.2}"], seen["ckptstore_save_seconds_bucket{le=0.5}"]) == (0, 2)
    metrics.on_step(8)
    assert scrape(metrics)["ckptstore_step"] == 8


def test_borrowed_bytes_are_not_written(metrics: Metrics, tmp_path: Path) -> None:
    """What lies with an older checkpoint was stored by that one."""
    event = saved(tmp_path)
    checkpoint = replace(event.checkpoint, stored_bytes=100, borrowed_bytes=70)
    metrics.on_saved(replace(event, checkpoint=checkpoint))
    assert scrape(metrics)["ckptstore_written_bytes_total"] == 30


def test_a_resumed_run(metrics: Metrics, tmp_path: Path) -> None:
    """Begins where its checkpoint was made, with nothing saved by itself; a fresh start changes nothing."""
    metrics.on_resumed(Resumed(None, "runs/x"))
    assert math.isnan(scrape(metrics)["ckptstore_last_saved_step"])
    event = saved(tmp_path)
    metrics.on_resumed(resumed(event))
    seen = scrape(metrics)
    assert (seen["ckptstore_step"], seen["ckptstore_last_saved_step"], seen["ckptstore_saves_total"]) == (3, 3, 0)
    assert seen["ckptstore_last_saved_timestamp_seconds"] == event.checkpoint.created.timestamp()


def test_labels(tmp_path: Path) -> None:
    """Stand on all of them."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"run": "gpt2", "rank": "0"})
    metrics.on_saved(saved(tmp_path))
    metrics.on_step(9)
    seen = parse(prometheus_client.generate_latest(registry))
    assert metrics.port is None
    assert seen["ckptstore_step{rank=0,run=gpt2}"] == 9
    assert seen["ckptstore_stall_seconds_count{rank=0,run=gpt2}"] == 1
    assert all("rank=0,run=gpt2" in name for name in seen)


def test_names_are_as_prometheus_has_them() -> None:
    """Base units, ``_total`` on counters only, and a text for each."""
    registry = CollectorRegistry()
    Metrics(registry)
    families = list(registry.collect())
    assert len(families) == 8
    for family in families:
        assert family.documentation.endswith(".")
        assert family.name.startswith("ckptstore_")
        assert family.name.endswith("_seconds") == ("seconds" in family.name)
        assert all(s.name.endswith(("_total", "_created")) for s in family.samples) == (family.type == "counter")


def test_closing_frees_port_and_names(tmp_path: Path) -> None:
    """The next run in this process gets both, also in the client's own registry."""
    for _ in range(2):
        metrics = Metrics(port=0, address="127.0.0.1")
        assert "ckptstore_step" in scrape(metrics)
        with pytest.raises(FormatError, match="one run at a time"):
            Metrics()
        metrics.on_closed(STATS)
        with pytest.raises(URLError):
            scrape(metrics)
        assert b"ckptstore" not in prometheus_client.generate_latest()
        # What comes late does no harm.
        metrics.on_saved(saved(tmp_path))
        metrics.on_step(1)
        metrics.on_closed(STATS)


def test_a_port_that_is_taken() -> None:
    """Is an error that names it, and leaves nothing registered."""
    registry = CollectorRegistry()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FormatError, match=f"127.0.0.1:{port}"):
            Metrics(registry, port=port, address="127.0.0.1")
    assert list(registry.collect()) == []
    Metrics(registry)


@pytest.mark.parametrize("port", [-1, 65536, "80", True, 1.5])
def test_what_is_no_port(port: object) -> None:
    """Is refused, and leaves nothing registered."""
    registry = CollectorRegistry()
    with pytest.raises(FormatError, match="port="):
        Metrics(registry, port=port)  # type: ignore[arg-type]
    assert list(registry.collect()) == []


@pytest.mark.parametrize("name", ["", "a b", "__name", "le", 3])
def test_what_is_no_label(name: Any) -> None:
    """Is refused: what Prometheus keeps for itself too."""
    registry = CollectorRegistry()
    with pytest.raises(FormatError, match="no name of a label"):
        Metrics(registry, {name: "x"})
    assert list(registry.collect()) == []


def test_without_the_client_it_says_what_to_install(tmp_path: Path) -> None:
    """The module imports, the class doesn't work."""
    (tmp_path / "prometheus_client.py").write_text('raise ImportError("not here")\n')
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ckptstore.integrations.prometheus import Metrics\n"
        "try: Metrics()\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'ckptstore[prometheus]'" in done.stdout
