"""What the shell is offered where a word stands for something: folders, and the names of what a local store holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import click
from click.shell_completion import CompletionItem, FishComplete, add_completion_class
from click.types import StringParamType

from ckptstore.errors import CheckpointError
from ckptstore.policy.progress import MILESTONE

if TYPE_CHECKING:
    from ckptstore.format.layout import CheckpointId
    from ckptstore.storage.base import Storage

_RECORDS = 50
_STEPS = 20
"""Of how many of the newest checkpoints records are read and steps are shown: a shell waits for it."""

_SPECIAL = re.compile(r"[^\w:=@%+,./-]")

_BASH = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" cut="" type value
    local word="${line##*[[:space:]]}"
    # bash has cut the word at each colon, and replaces only what stands behind the last one.
    if [[ $COMP_WORDBREAKS == *:* && $word == *:* ]]; then
        cut="${word%%%%"${word##*:}"}"
    fi
    COMPREPLY=()
    while IFS=, read -r type value; do
        case "$type" in
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            plain) COMPREPLY+=("${value#"$cut"}") ;;
        esac
    done < <(COMP_WORDS="$line" COMP_CWORD="$word" %(complete_var)s=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null || complete -F %(complete_func)s %(prog_name)s
"""


class BashCompletion(FishComplete):
    """Completion in bash, also of words with a colon, as ``best:val_loss``: like fish it hands over the whole line."""

    name = "bash"
    source_template = _BASH

    def format_completion(self, item: CompletionItem[str]) -> str:
        """One line. bash quotes nothing, and a name in a store, which may come from anybody, must run nothing."""
        value = _SPECIAL.sub(lambda match: "\\" + match[0], item.value)
        return f"{item.type},{value}"


def register() -> None:
    """Have click complete for bash as here."""
    add_completion_class(BashCompletion)


Find: TypeAlias = "Callable[[Storage, str], Iterable[str]]"
"""The words that an incomplete one may become in a store."""


class _Names(StringParamType):
    def __init__(self, find: Find) -> None:
        self._find = find

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        found: list[str] = []
        # Where nothing can be found out there is nothing to offer.
        with suppress(CheckpointError, OSError, ValueError):
            found += (word for word in self._find(_local(ctx), incomplete) if word.startswith(incomplete))
        return [CompletionItem(word) for word in dict.fromkeys(found) if word.isprintable()]


class _Places(StringParamType):
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type=self._kind)]


def completed(command: click.Command) -> click.Command:
    """``command`` with words to offer for all of its parameters that are just text, by their names."""
    for param in command.params:
        offered = _OF_COMMANDS.get((command.name, param.name)) or _OFFERED.get(param.name or "")
        if offered is not None and param.type is click.STRING:
            param.type = offered
    return command


def _selectors(storage: Storage, incomplete: str) -> Iterator[str]:
    ids = _ids(storage)
    if incomplete[:1].isdigit():
        yield from map(str, ids)
    elif incomplete.startswith("step:"):
        yield from (f"step:{id.step}" for id in ids)
    else:
        yield from ["latest"] if ids else []
        yield from _told(storage, ids[:_RECORDS])
        yield from _holds(storage)
        yield from (f"step:{id.step}" for id in ids[:_STEPS])


def _told(storage: Storage, ids: Iterable[CheckpointId]) -> Iterator[str]:
    """Metrics, epochs and milestones, as the commit records tell them."""
    from ckptstore.format import layout
    from ckptstore.format.jsontext import parse_json

    epochs: dict[str, None] = {}
    milestones: dict[str, None] = {}
    for id in ids:
        key = layout.commit_key(id)
        # What is damaged is for other commands to tell.
        with suppress(CheckpointError, AttributeError, TypeError):
            record = parse_json(storage.read(key, limit=_RECORD_BYTES), key, limit=_RECORD_BYTES)
            yield from (f"best:{name}" for name in record.get("metrics", ()))
            reasons = record.get("reasons", ())
            milestones |= {f"milestone:{r.removeprefix(MILESTONE)}": None for r in reasons if r.startswith(MILESTONE)}
            epochs |= {f"epoch:{record['epoch']}": None} if record.get("epoch") is not None else {}
    yield from (*milestones, *epochs)


def _holds(storage: Storage, incomplete: str = "") -> Iterator[str]:
    from ckptstore.format import layout

    yield from filter(None, map(layout.hold_name, _keys(storage, layout.HOLDS)))


def _deleted(storage: Storage, incomplete: str) -> Iterator[str]:
    from ckptstore.format import layout

    yield from (str(id) for id in map(layout.record_id, _keys(storage, layout.TRASH)) if id)


def _ids(storage: Storage) -> list[CheckpointId]:
    """Those that exist, the newest first, as the names of their records tell them."""
    from ckptstore.format import layout

    gone = set(map(layout.record_id, _keys(storage, layout.TRASH)))
    ids = map(layout.record_id, _keys(storage, layout.COMMITS))
    return sorted((id for id in ids if id is not None and id not in gone), reverse=True)


def _keys(storage: Storage, prefix: str) -> list[str]:
    return [entry.key for entry in storage.list(prefix)]


def _local(ctx: click.Context) -> Storage:
    """The store that the command is given, if it lies on this machine.

    Raises:
        ValueError: it doesn't: nobody waits for a network while typing.
        CheckpointError: it can't be opened.
    """
    from ckptstore.storage import open_storage

    # While an option lacks its value, click has not told yet what is an argument.
    url = ctx.params.get("url") or ctx.params.get("source") or next(iter(ctx.args), None)
    if not isinstance(url, str) or ("://" in url and not url.startswith("file://")):
        raise ValueError(f"{url} is not on this machine")
    return open_storage(url, read_only=True)


_RECORD_BYTES = 16 << 10
_FOLDER, _FILE, _SELECTOR = _Places("dir"), _Places("file"), _Names(_selectors)
_OFFERED: Mapping[str, StringParamType] = {
    **dict.fromkeys(("url", "source", "target", "backups", "folder"), _FOLDER),
    **dict.fromkeys(("config", "output"), _FILE),
    **dict.fromkeys(("selector", "selectors", "select", "good", "bad"), _SELECTOR),
}
"""By the names of parameters, the same in all commands."""
_OF_COMMANDS: Mapping[tuple[str | None, str | None], StringParamType] = {
    ("release", "name"): _Names(_holds),
    ("undelete", "id"): _Names(_deleted),
}
