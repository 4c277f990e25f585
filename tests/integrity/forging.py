"""Putting deceit into a forged checkpoint, and what must come of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from ckptstore.errors import CheckpointError
from tests.integrity.checks import REFUSALS, error_of, falls_back, refuses, verified
from tests.integrity.stores import (
    NEW,
    Forge,
    Pair,
    compact,
    opened,
    save,
    state,
)

Change = Callable[[Forge], object]
MARK = 123454321
"""A number that stands for the text to be put in its place."""


def set_at(path: str, value: Any) -> Change:
    """Put ``value`` at a place like ``part.files.0.name``; KeyError where there is no such record."""

    def change(forge: Forge) -> None:
        first, *inner, last = [int(n) if n.isdigit() else n for n in path.split(".")]
        target: Any = getattr(forge, str(first))
        for step in inner:
            target = target[step]
        target[last] = value

    return change


def value_at(forge: Forge, path: str) -> Any:
    """What stands at ``path``."""
    first, *steps = [int(n) if n.isdigit() else n for n in path.split(".")]
    found: Any = getattr(forge, str(first))
    for step in steps:
        found = found[step]
    return found


def refused(p: Pair, forge: Forge, kinds: tuple[type[CheckpointError], ...] = REFUSALS, **records: bytes) -> str:
    """Refused by id, reported by verify, stepped around by latest; gives the message."""
    forge.write(**records)
    error = refuses(p, kinds)
    assert not verified(p).ok
    falls_back(p)
    return str(error)


def with_text(fields: dict[str, Any], text: str) -> bytes:
    """``fields`` as JSON with ``text``, which need be no JSON, in the place of the marked number."""
    return compact(fields).replace(str(MARK).encode(), text.encode("utf-8", "surrogatepass"))


def sealed_text(fields: dict[str, Any], text: str) -> bytes:
    """As ``with_text``, sealed as far as that is possible."""
    content = {name: value for name, value in fields.items() if name != "self"}
    seal = hashlib.sha256(with_text(content, text)).hexdigest()
    whole = json.dumps({**content, "self": seal}, indent=1).encode() + b"\n"
    return whole.replace(str(MARK).encode(), text.encode("utf-8", "surrogatepass"))


def forged_text(forge: Forge, path: str, text: str) -> None:
    """Write the records with ``text`` at ``path``."""
    set_at(path, MARK)(forge)
    kind = path.partition(".")[0]
    if kind == "commit":
        forge.write()
        p_commit = sealed_text(forge.commit, text)
        forge.raw.put(f"commits/{forge.id}.json", p_commit)
    else:
        forge.write(**{kind: with_text(getattr(forge, kind), text)})


def refuses_to_load(p: Pair) -> None:
    """What is refused only when the tree is looked at."""
    with opened(p.raw.url) as store:
        error = error_of(lambda: store.load(p.bad.id))
    assert isinstance(error, REFUSALS), repr(error)


def restore(p: Pair) -> None:
    """Put back what ``p`` was saved as."""
    with opened(p.raw.url) as store:
        for key in p.listing():
            p.raw.remove(key)
        fresh = save(store, state(NEW, epoch=2), 2, loss=1.0)
    for key in [k for k in p.raw.listing() if fresh.id in k]:
        p.raw.put(key.replace(fresh.id, p.bad.id), p.raw.get(key).replace(fresh.id.encode(), p.bad.id.encode()))
        p.raw.remove(key)
    Forge(p.raw, p.bad.id).write()
