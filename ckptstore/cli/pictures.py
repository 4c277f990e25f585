"""Pictures that commands draw into files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ckptstore.cli.outcome import CommandError
from ckptstore.tools.wholefile import replace_file


def check_picture(path: str | None) -> None:
    """Nothing, if ``path`` names a picture that can be drawn.

    Raises:
        click.BadParameter: it doesn't.
    """
    if path is not None and Path(path).suffix not in (".svg", ".png"):
        raise click.BadParameter(f"{path!r} must end in .svg or .png", param_hint="--picture")


def write_picture(path: str, draw: Callable[[str], bytes]) -> None:
    """Write what ``draw`` makes of a format, whole or not at all.

    Raises:
        CommandError: there is no matplotlib, or the file can't be written.
    """
    try:
        drawn = draw(Path(path).suffix[1:])
    except ImportError as error:
        message = f"--picture needs matplotlib, and it can't be imported ({error}): pip install 'ckptstore[plot]'"
        raise CommandError(message, code="no_matplotlib") from error
    try:
        replace_file(Path(path), drawn)
    except OSError as error:
        raise CommandError(f"{path} can't be written: {error.strerror or error}", code="os") from error
