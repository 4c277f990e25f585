"""Numbers and names, as they are read and written."""

from __future__ import annotations

import click
import pytest

from ckptstore.cli.texts import count_text, rate_text, short_ids, size_text, timing_text
from ckptstore.cli.units import duration_s, share, size_bytes
from ckptstore.engine.catalogue import Timing


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9994, "9.99 kB"),
        (9995, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_234_000_000, "1.23 GB"),
        (5e18, "5000 PB"),
    ],
)
def test_size_text(count: float, text: str) -> None:
    assert size_text(count) == text


def test_rates_and_counts() -> None:
    assert rate_text(3e9, 2) == "1.50 GB/s"
    assert rate_text(0, 0) == "-"
    assert (count_text(1, "file"), count_text(2000, "file")) == ("1 file", "2,000 files")


def test_short_ids_name_just_one() -> None:
    """The beginning ends at a dash, and no other id begins like it."""
    ids = [
        "0001-000001-step10-aaaaaaaaaaaaaaaa",
        "0001-000002-step20-aaaaaaaaaaaaaaaa",
        "0001-000002-step20-bbbbbbbbbbbbbbbb",
        "0001-000003-step20-aaaaaaaaaaaaaaaa",
        "0001-000003-step30-aaaaaaaaaaaaaaaa",
        "0001-100000-step1-aaaaaaaaaaaaaaaa",
        "0001-1000000-step1-aaaaaaaaaaaaaaaa",
    ]
    short = short_ids(reversed(ids))
    assert [short[id] for id in ids] == [
        "0001-000001",
        ids[1],
        ids[2],
        "0001-000003-step20",
        "0001-000003-step30",
        "0001-100000-step1",
        "0001-1000000",
    ]
    for id in ids:
        assert [other for other in ids if other.startswith(short[id])] == [id]


@pytest.mark.parametrize(
    ("text", "bytes"), [("5B", 5), ("100MB", 10**8), ("1GB", 10**9), ("1GiB", 2**30), ("1.5kB", 1500), ("2KiB", 2048)]
)
def test_sizes(text: str, bytes: int) -> None:
    assert size_bytes(text) == bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("24h", 86400), ("7d", 604800), ("0.5h", 1800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(("text", "value"), [("10%", 0.1), ("0.1", 0.1), ("100%", 1), ("1", 1), ("0.5%", 0.005)])
def test_shares(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "1", "GB", "1 GB", "-1GB", "1iB", "1XB", "1e3MB", "٣MB", "1gb"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="as 100MB, 1GB or 1GiB"):
        size_bytes(text)


@pytest.mark.parametrize(
    ("timing", "text"),
    [
        (None, ""),
        (Timing(0.734, 0.0204), "in 0.73 s, training waited 0.0204 s"),
        (Timing(1234.5, 0.00001), "in 1234.50 s, training waited 0 s"),
        (Timing(0.02, None), "in 0.02 s"),
        (Timing(None, 0.1), "training waited 0.10 s"),
    ],
)
def test_how_long_a_save_took(timing: Timing | None, text: str) -> None:
    assert timing_text(timing) == text
