"""One process for all tests that has what takes seconds to import; runs in processes of their own are forked off it."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# The compiler takes a second, and each optimizer imports it.
_modules = ["torch._dynamo"]


def preload(*modules: str) -> None:
    """Have it import these, too. To be said when a test's module is imported: it begins with the first run."""
    _modules.extend(module for module in modules if module not in _modules)
    CONTEXT.set_forkserver_preload([*_modules, "tests.frozen"])
