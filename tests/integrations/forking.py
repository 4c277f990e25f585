"""Runs in processes of their own, forked from one that has imported what takes seconds to import."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]


class Forker:
    """Runs ``main(fields)`` of a module, each time in a fork of a process that has done nothing but import it."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.forking", module],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, fields: dict[str, Any]) -> int:
        """How it ended: an exit code, or a signal as a negative number."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve(module: str) -> None:
    main = importlib.import_module(module).main
    importlib.import_module("tests.frozen")
    told = os.fdopen(os.dup(1), "w")
    # What a run prints is for people.
    os.dup2(2, 1)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            end(main, json.loads(line))
        told.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        told.flush()


def end(main: Any, fields: dict[str, Any]) -> NoReturn:
    code = 0
    try:
        main(fields)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
