"""JSON's traps in records whose hashes hold: each is refused by a named error."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from ckptstore.errors import CheckpointError, FormatError, IntegrityError
from ckptstore.format.records import CommitRecord, unseal
from tests.integrity.checks import falls_back, refuses, verified
from tests.integrity.forging import MARK, forged_text, refused, refuses_to_load, restore, sealed_text, set_at, value_at
from tests.integrity.stores import (
    NEW,
    Forge,
    Pair,
    compact,
    opened,
    read,
    sealed,
    silence,
)

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]
WRONG = [*NUMBERS, "true", "false", "1.0", "1e0", "-1", '"1"', "null", "[]", "{}", "9" * 5000, "9" * 4000, str(1 << 63)]
"""In the place of an integer, as they would stand in the text."""

INTEGERS = [
    *("commit.step", "commit.parameters", "commit.tensors", "commit.files", "commit.raw_bytes", "commit.stored_bytes"),
    "commit.borrowed_bytes",
    *("commit.world_size", "commit.format", "manifest.format", "manifest.world_size", "manifest.block_bytes"),
    *("manifest.parts.0.rank", "part.format", "part.rank", "part.files.0.stored_bytes", "part.files.0.blocks.0.raw"),
    *("part.files.0.blocks.0.offset", "part.files.0.blocks.0.length", "part.files.0.tensors.shapes.0.0"),
]


@pytest.mark.parametrize("path", INTEGERS)
def test_what_is_no_integer(p: Pair, forge: Forge, path: str) -> None:
    """Floats, bools, text, null and numbers too large in the place of each integer of each record."""
    true = value_at(forge, path)
    for text in [*WRONG, f"{true}.0", f"{true}e0", f'"{true}"']:
        forged_text(forge, path, text)
        refuses(p)
        assert not verified(p).ok, text
        falls_back(p)


@pytest.mark.parametrize("text", NUMBERS)
@pytest.mark.parametrize("path", ["commit.metrics.loss", "part.tree.epoch", "part.tree.model"])
def test_numbers_that_json_lacks(p: Pair, forge: Forge, path: str, text: str) -> None:
    """Also those that overflow to infinity, and in the tree, where any JSON may stand."""
    forged_text(forge, path, text)
    refuses(p)
    falls_back(p)


TRAPS: dict[str, Callable[[bytes], bytes]] = {
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "trailing object": lambda data: data + b"{}",
    "trailing space": lambda data: data + b" ",
    "leading space": lambda data: b" " + data,
    "comment": lambda data: b"/**/" + data,
    "empty": lambda data: b"",
    "only a number": lambda data: b"1",
    "only a list": lambda data: b"[" + data.strip() + b"]",
    "only null": lambda data: b"null",
    "deep lists": lambda data: b"[" * 5000 + b"]" * 5000,
    "open lists": lambda data: b"[" * 16000,
    "deep objects": lambda data: b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "NUL": lambda data: data.replace(b"{", b"{\0", 1),
    "raw non-ASCII": lambda data: data.replace(b'"format"', '"fórmat"'.encode(), 1),
    "format twice": lambda data: data.replace(b'"format"', b'"format":1,"format"', 1),
    "format twice, escaped": lambda data: data.replace(b'"format"', b'"\\u0066ormat":1,"format"', 1),
    "another key twice": lambda data: data.replace(b'"id"', b'"id":"x","id"', 1),
}


def same_meaning(trap: str) -> bool:
    """White space around compact JSON says nothing else, and its hash is proven by whoever points at it."""
    return trap in ("trailing space", "leading space")


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("record", ["commit", "manifest", "part"])
def test_traps_of_json(p: Pair, forge: Forge, record: str, trap: str) -> None:
    """Duplicate keys, marks, deep nesting, other encodings, other tops."""
    plain = {"commit": sealed(forge.commit), "manifest": compact(forge.manifest), "part": compact(forge.part)}[record]
    changed = TRAPS[trap](plain)
    assert changed != plain
    if record != "commit" and same_meaning(trap):
        forge.write(**{record: changed})
        with opened(p.raw.url) as store:
            assert read(store, store.resolve("latest")) == dict(NEW)
        return
    refused(p, forge, **{record: changed})


@pytest.mark.parametrize("depth", [300, 940, 10_000, 100_000])
def test_nesting(p: Pair, forge: Forge, depth: int) -> None:
    """Lists inside of each other, in a record and in the tree."""
    deep = "[" * depth + "]" * depth
    forged_text(forge, "commit.reasons", deep if depth < 8000 else "[" * 8000)
    refuses(p)
    falls_back(p)
    fresh = Forge(p.raw, p.good.id)
    forge.commit = {**json.loads(sealed(fresh.commit)), "id": forge.id, "step": 2}
    forged_text(forge, "part.tree.epoch", deep)
    refuses_to_load(p)
    falls_back(p)


def test_nesting_where_the_stack_ends(p: Pair, forge: Forge) -> None:
    """Around the depth at which the parser gives up, and where, in newer Pythons, only the formatter does."""
    set_at("commit.reasons", MARK)(forge)

    def problem(depth: int) -> str:
        data = sealed_text(forge.commit, "[" * depth + "]" * depth)
        with pytest.raises(CheckpointError) as caught:
            unseal(data, p.commit, [CommitRecord])
        return str(caught.value)

    parsed = bisect.bisect(range(7000), False, key=lambda depth: "nested too deeply" in problem(depth))
    assert parsed > 500
    told = {problem(depth) for depth in (*range(parsed - 5, parsed + 5), 2000, 4000, 7000)}
    assert any("nested too deeply" in text or "recursion" in text for text in told)


SURROGATES = ['"\\ud800"', '"\\udfff\\ud800"', '"a\\ud83d"']


@pytest.mark.parametrize("text", SURROGATES)
@pytest.mark.parametrize(
    "path",
    [
        "commit.created",
        "commit.store_id",
        "manifest.id",
        "part.files.0.name",
        "part.files.0.prefix",
        "part.files.0.tensors.names.0",
        "part.files.0.tensors.dtypes.0",
        "part.files.0.blocks.0.codec",
    ],
)
def test_half_characters(p: Pair, forge: Forge, path: str, text: str) -> None:
    """A lone surrogate is no text: it could be neither printed nor stored."""
    forged_text(forge, path, text)
    refuses(p)
    falls_back(p)
    with opened(p.raw.url) as store, silence() as caught:
        store.checkpoints()
    for warning in caught:
        str(warning.message).encode()


@pytest.mark.parametrize("record", ["commit", "manifest", "part"])
@pytest.mark.parametrize("name", ["extra", "__class__", "py/object", "Format", "", "x" * 5000])
def test_unknown_fields(p: Pair, forge: Forge, record: str, name: str) -> None:
    getattr(forge, record)[name] = 1
    message = refused(p, forge, (FormatError, IntegrityError))
    assert len(message) < 2000


@pytest.mark.parametrize("path", ["part.files.0", "part.files.0.blocks.0", "part.files.0.tensors", "manifest.parts.0"])
def test_unknown_fields_inside(p: Pair, forge: Forge, path: str) -> None:
    set_at(f"{path}.extra", 1)(forge)
    refused(p, forge)


def every_field(record: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in record.items():
        found.append(f"{path}{name}")
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict) and name != "tree":
            found += every_field(inner, f"{path}{name}." + ("0." if inner is not value else ""))
    return found


@pytest.mark.parametrize("record", ["commit", "manifest", "part"])
def test_every_field_is_needed(p: Pair, record: str) -> None:
    """No field can be left out, but a block's codec, which is 'none' then."""
    optional = re.compile(r"self|.*\.codec|metrics\..*|modes\..*")
    missing = [path for path in every_field(getattr(Forge(p.raw, p.bad.id), record)) if not optional.fullmatch(path)]
    assert len(missing) > 5
    for path in missing:
        forge = Forge(p.raw, p.bad.id)
        *inner, last = [int(n) if n.isdigit() else n for n in path.split(".")]
        target = getattr(forge, record)
        for step in inner:
            target = target[step]
        del target[last]
        if path.startswith("manifest"):
            # The forger would put it in again.
            p.raw.put(p.commit, sealed(forge.commit))
        else:
            forge.write(**{record: compact(getattr(forge, record))} if record != "commit" else {})
        refuses(p)
        restore(p)
