"""Rules that go by the age of a checkpoint."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ckptstore.policy.plan import Foreseen
from ckptstore.policy.retention import Situation
from ckptstore.policy.rules import within

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_longer_than_the_calendar() -> None:
    """As somebody writes who means for ever."""
    old = Foreseen("a", 1, None, [], NOW - timedelta(days=365 * 500), 1)
    assert set(within("999999d").kept([old], Situation(NOW))) == {"a"}
    assert within("1d").kept([old], Situation(NOW)) == {}
