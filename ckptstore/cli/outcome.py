"""How a command ends: one line for a person, one document for a script, one exit code for both."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from ckptstore.cli.terminal import emit, plain
from ckptstore.errors import CheckpointError, ExistsError, IntegrityError, NotFoundError

BAD_NEWS = 1
UNUSABLE = 2
INTERRUPTED = 130
# What a shell reports for a command that SIGPIPE ended.
PIPE_CLOSED = 141

TRACEBACK = "CKPTSTORE_TRACEBACK"


class CommandError(click.ClickException):
    """The command can't do what was asked, for a reason that no ``CheckpointError`` tells."""

    def __init__(self, message: str, *, code: str, exit_code: int = UNUSABLE) -> None:
        super().__init__(message)
        self.code = code
        self.status = exit_code


@contextmanager
def reported(*, as_json: bool) -> Iterator[None]:
    """Turn whatever ends the block into a line on stderr, with ``as_json`` a document on stdout, and an exit code."""
    try:
        with _warnings_as_lines():
            yield
    except click.exceptions.Exit:
        # A RuntimeError for Python, and a good end for click.
        raise
    except BrokenPipeError as error:
        _close_stdout()
        raise click.exceptions.Exit(PIPE_CLOSED) from error
    except (KeyboardInterrupt, click.Abort):
        _end({"code": "interrupted", "message": "interrupted"}, "interrupted", INTERRUPTED, as_json)
    except click.UsageError as error:
        if as_json:
            emit({"error": {"code": "usage", "message": error.format_message()}})
        raise
    except CommandError as error:
        _end({"code": error.code, "message": error.message}, f"error: {error.message}", error.status, as_json)
    except CheckpointError as error:
        _end(fields_of(error), f"error: {error}", exit_code(error), as_json)
    except OSError as error:
        _flush_stdout()
        # The storage's own errors name what failed; what names nothing is the answer's way out.
        message = str(error) if error.filename else f"the answer can't be written: {error.strerror or error}"
        _end({"code": "os", "message": message}, f"error: {message}", UNUSABLE, as_json)
    except Exception as error:
        _end_as_bug(error, as_json)


def exit_code(error: CheckpointError) -> int:
    """1 where the error is the answer to what was asked, 2 where there is no answer."""
    return BAD_NEWS if isinstance(error, NotFoundError | ExistsError | IntegrityError) else UNUSABLE


def fields_of(error: CheckpointError) -> dict[str, Any]:
    """An error as JSON: its code, its message, and those of its fields that are known."""
    known = {name: getattr(error, name) for name in error._fields}
    return {"code": error.code, "message": str(error)} | {k: v for k, v in known.items() if v is not None}


def _end(fields: dict[str, Any], line: str, code: int, as_json: bool) -> None:
    if as_json:
        try:
            emit({"error": fields})
        except OSError:
            # Nobody takes the document; the line and the exit code still tell.
            _close_stdout()
    click.secho(plain(line), err=True, fg="red")
    raise click.exceptions.Exit(code)


def _end_as_bug(error: Exception, as_json: bool) -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    message = f"this is a bug in ckptstore: {type(error).__name__}: {error}"
    hint = "" if os.environ.get(TRACEBACK) else f" ({TRACEBACK}=1 shows where)"
    _end({"code": "bug", "message": message}, f"error: {message}{hint}", UNUSABLE, as_json)


def _flush_stdout() -> None:
    """It may be stdout itself that failed, as a full disk behind a redirection does."""
    try:
        sys.stdout.flush()
    except OSError:
        _close_stdout()


def _close_stdout() -> None:
    """Nobody reads on; what is still buffered must not raise once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            click.secho(plain(f"warning: {message}"), err=True, fg="yellow")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
