"""A report on a store: one page for a browser that needs nothing else, least of all a network.

Everything that comes from the store is text of anybody's: the template escapes it, in the data it can't end its
element, and the page's policy lets no other script run than those that stand here, and nothing be fetched.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ckptstore.errors import ExistsError, StorageError
from ckptstore.format.digest import sha256
from ckptstore.policy.retention import Keep
from ckptstore.tools.reportdata import Document, document
from ckptstore.tools.survey import survey
from ckptstore.tools.wholefile import replace_file
from ckptstore.units import count_text, size_text
from ckptstore.view import View

MARK = '<meta name="generator" content="ckptstore report">'
"""By which a file is known as a report."""

_SCRIPTS = ("basics.js", "charts.js", "timeline.js", "history.js", "table.js", "page.js")
_BEGINNING = 4096
_NONE = "\N{EN DASH}"


def report(store: View, path: str | os.PathLike[str], *, keep: Keep | None = None, force: bool = False) -> Document:
    """Write a page about ``store`` to ``path``: its checkpoints, their history and metrics, sizes, speed and backups.

    It is one HTML file that loads nothing else. Only small records are read, no data. An older report at ``path`` is
    replaced, anything else only with ``force``; the file is written whole or not at all.

    Args:
        store: see ``open``; ``read_only=True`` suffices.
        path: a local file.
        keep: rules, as ``last(10) | best("val_loss")``: the page says what goes under them and what stays.
        force: replace whatever is at ``path``.

    Returns:
        What the page shows, as it can be written as JSON.

    Raises:
        ExistsError: something else than a report is there.
        NotFoundError: opened read-only, and there is no store.
        StorageError: the storage can't be read completely, or ``path`` can't be written.
        ImportError: plotly or jinja2 is missing: ``pip install 'ckptstore[report]'``.
    """
    check_libraries()
    target = Path(path)
    check_target(target, force=force)
    shown = document(survey(store, keep=keep))
    write_page(target, page(shown), force=force)
    return shown


def check_libraries() -> None:
    """Nothing, where there is all that makes a page.

    Raises:
        ImportError: plotly or jinja2 is missing.
    """
    try:
        for name in ("jinja2", "plotly"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a report needs plotly and jinja2 ({error}): pip install 'ckptstore[report]'", name=error.name
        ) from error


def check_target(path: Path, *, force: bool = False) -> None:
    """Nothing, where a report may be written to ``path``.

    Raises:
        ExistsError: something else is there.
        StorageError: there is no such folder, or what is there can't be read.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                own = MARK.encode() in file.read(_BEGINNING)
            if not own and not force:
                raise ExistsError(f"{path} is there and no report of ckptstore: give another name, or force it")
        elif path.exists():
            raise ExistsError(f"{path} is there and no file: give another name")
        elif not path.parent.is_dir():
            raise StorageError(f"{path} can't be written: there is no folder {path.parent}")
    except OSError as error:
        if isinstance(error, ExistsError | StorageError):
            raise
        raise StorageError(f"{path} can't be read to see what it is: {error.strerror or error}") from error


def write_page(path: Path, content: bytes, *, force: bool = False) -> None:
    """Put a page at ``path``; raises as ``check_target`` does, and StorageError where it can't be written."""
    # Once more: it took a while to make.
    check_target(path, force=force)
    try:
        replace_file(path, content)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error


def page(shown: Document) -> bytes:
    """The page that shows ``shown``.

    Raises:
        ImportError: plotly or jinja2 is missing.
    """
    check_libraries()
    from jinja2 import DictLoader, Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    plotly, script = get_plotlyjs(), "\n".join(map(_source, _SCRIPTS))
    environment = Environment(
        loader=DictLoader({"page.html": _source("page.html")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": _size, "number": _number, "time": _clock, "short": _short, "value": _value}
    made = environment.get_template("page.html").render(
        doc=shown,
        policy=policy([plotly, script]),
        style=_source("page.css"),
        plotly=plotly,
        script=script,
        data=in_script(_packed(shown)),
        problems=problems(shown),
        count_text=count_text,
    )
    return made.encode()


def policy(scripts: Sequence[str]) -> str:
    """The Content-Security-Policy under which just ``scripts`` run, and nothing is loaded or sent."""
    hashes = (base64.b64encode(bytes.fromhex(sha256(script.encode()))).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{hash}'" for hash in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def in_script(data: Any) -> str:
    """``data`` as JSON that can stand in a script element: it has no character that means anything in HTML."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(shown: Document) -> Document:
    """The saves by column, which are half as long; the page makes rows of them again."""
    saves: Sequence[Mapping[str, Any]] = shown["saves"]
    names = list(saves[0]) if saves else []
    return {**shown, "saves": {name: [save[name] for save in saves] for name in names}}


def problems(shown: Document) -> list[str]:
    """What somebody should look at, one sentence each."""
    found = []
    if shown["damaged"]:
        found.append(f"{count_text(len(shown['damaged']), 'record')} damaged")
    for backup in shown["backups"]:
        if backup["behind"]:
            found.append(f"backup {backup['place']} lacks {count_text(backup['behind'], 'checkpoint')}")
    for newest in shown["verifications"][:1]:
        if not newest["ok"]:
            found.append("the last verification found damage")
    return found


def _source(name: str) -> str:
    return resources.files("ckptstore.tools").joinpath("reportpage", name).read_text(encoding="utf-8")


def _size(count: float | None) -> str:
    return _NONE if count is None else size_text(count)


def _number(count: float | None) -> str:
    return _NONE if count is None else f"{count:,}"


def _clock(when: str | None) -> str:
    """A time of a record for people; it may be any text there."""
    return _NONE if when is None else when[:19].replace("T", " ")


def _short(id: str | None) -> str:
    return _NONE if id is None else id.rpartition("-")[0]


def _value(value: object) -> str:
    return _NONE if value is None else f"{value:.6g}" if isinstance(value, float | int) else str(value)
