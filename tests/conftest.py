"""Options and fixtures shared by all tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.sandboxes"]

# The sample is the same at every run, so that a change is judged by itself; the full run looks elsewhere each time.
settings.register_profile("sampled", max_examples=20, stateful_step_count=20, deadline=None, derandomize=True)
settings.register_profile(
    "full", max_examples=500, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every fault point instead of a sample")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if config.getoption("--full") else "sampled")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So a shell starts what runs in the background, and children inherit it: then no test could press Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="complete enumeration: make test-all")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Thousands of tests and all that they import stay to the end: the collector needn't go through them each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """No test leaves a handler of signals behind, by which another one would wait in vain."""
    signums = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(signum) for signum in signums]
    yield
    left = [(signum, was) for signum, was in zip(signums, before, strict=True) if signal.getsignal(signum) is not was]
    for signum, was in left:
        signal.signal(signum, was)
    assert not left


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True where every fault point is wanted, not a sample."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where a test's store lies; not yet there."""
    return tmp_path / "store"
