"""Records made to deceive, with hashes that hold all the way up: each is refused by a named error."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from ckptstore.errors import CheckpointError, FormatError, IntegrityError
from ckptstore.format.records import CommitRecord, unseal
from ckptstore.store import DamageWarning
from tests.integrity.checks import REFUSALS, error_of, falls_back, refuses, verified
from tests.integrity.stores import (
    GOOD,
    NEW,
    Forge,
    MemoryRaw,
    Pair,
    compact,
    flat,
    opened,
    pair,
    read,
    save,
    sealed,
    silence,
    state,
)

Change = Callable[[Forge], object]


@pytest.fixture
def p() -> Pair:
    return pair(MemoryRaw(uuid4().hex))


@pytest.fixture
def forge(p: Pair) -> Forge:
    return Forge(p.raw, p.bad.id)


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


def test_forging_itself_is_not_what_is_refused(p: Pair, forge: Forge) -> None:
    """The forger's hashes and seals are those of the library: an honest forgery loads."""
    before = {key: p.raw.get(key) for key in p.listing()}
    forge.write()
    assert {key: p.raw.get(key) for key in p.listing()} == before
    forge.part["tree"]["epoch"] = 7
    forge.commit["reasons"] = ["forged"]
    forge.write()
    with opened(p.raw.url) as store:
        assert store.load("latest")["epoch"] == 7
        assert store.resolve("latest").reasons == ("forged",)


# -- names that would lead elsewhere ----------------------------------------------------------------------

PATHS = [
    "../w.safetensors",
    "../../commits/x.safetensors",
    "/etc/passwd",
    "/w.safetensors",
    "a/b.safetensors",
    "a\\b.safetensors",
    "C:w.safetensors",
    "w\0.safetensors",
    "w\n.safetensors",
    "w.safetensors\n",
    ".",
    "..",
    "",
    ".w.safetensors",
    "-w.safetensors",
    "w.safetensors.",
    "w.safetensors ",
    "W.safetensors",
    "ẁ.safetensors",
    "manifest.json",
    "part-00000.json",
    "w.pickle",
    "tmp-w.safetensors",
    "x" * 101 + ".safetensors",
    "%2e%2e%2fw.safetensors",
]


@pytest.mark.parametrize("name", PATHS)
def test_file_names_that_are_none(p: Pair, forge: Forge, name: str) -> None:
    set_at("part.files.0.name", name)(forge)
    refused(p, forge)


IDS = [
    "",
    "..",
    "../0001-000001-step1-0123456789abcdef",
    "0001-000001-step1-0123456789abcdef/..",
    "1-1-step1-0123456789abcdef",
    "00001-000001-step1-0123456789abcdef",
    "0001-000001-step01-0123456789abcdef",
    "0001-000001-step1-0123456789ABCDEF",
    "0001-000001-step1-0123456789abcdef\n",
    "0001-000001-step1-0123456789abcdeff",
    "\N{ARABIC-INDIC DIGIT ZERO}001-000001-step1-0123456789abcdef",
    "0001-000001-step-1-0123456789abcdef",
]


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize(
    "path", ["part.files.0.owner", "part.id", "manifest.id", "commit.id"], ids=lambda path: path.replace(".", "-")
)
def test_ids_that_are_none(p: Pair, forge: Forge, path: str, id: str) -> None:
    set_at(path, id)(forge)
    refused(p, forge)


@pytest.mark.parametrize("id", IDS)
def test_lenders_that_are_none(p: Pair, forge: Forge, id: str) -> None:
    forge.commit["lenders"] = [id]
    refused(p, forge)


def test_a_file_of_a_checkpoint_that_is_no_lender(p: Pair, forge: Forge) -> None:
    """Bytes of another checkpoint, though they are what the part says, may be removed at any time: refused."""
    good = Forge(p.raw, p.good.id)
    forge.part["files"] = good.part["files"]
    assert "lender" in refused(p, forge, (FormatError,))
    forge.commit["lenders"] = [p.good.id]
    forge.write()
    with opened(p.raw.url) as store:
        assert read(store, store.resolve("latest")) == dict(GOOD)


# -- JSON's traps -----------------------------------------------------------------------------------------

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]
WRONG = [*NUMBERS, "true", "false", "1.0", "1e0", "-1", '"1"', "null", "[]", "{}", "9" * 5000, "9" * 4000, str(1 << 63)]
"""In the place of an integer, as they would stand in the text."""

MARK = 123454321
INTEGERS = [
    *("commit.step", "commit.parameters", "commit.tensors", "commit.files", "commit.raw_bytes", "commit.stored_bytes"),
    *("commit.world_size", "commit.format", "manifest.format", "manifest.world_size", "manifest.block_bytes"),
    *("manifest.parts.0.rank", "part.format", "part.rank", "part.files.0.stored_bytes", "part.files.0.blocks.0.raw"),
    *("part.files.0.blocks.0.offset", "part.files.0.blocks.0.length", "part.files.0.tensors.shapes.0.0"),
]


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


def refuses_to_load(p: Pair) -> None:
    """What is refused only when the tree is looked at."""
    with opened(p.raw.url) as store:
        error = error_of(lambda: store.load(p.bad.id))
    assert isinstance(error, REFUSALS), repr(error)


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


# -- versions, codecs, digests ----------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["commit", "manifest", "part"])
@pytest.mark.parametrize("number", [2, 10**15, 10**4000])
def test_newer_formats_say_what_to_do(p: Pair, forge: Forge, record: str, number: int) -> None:
    getattr(forge, record)["format"] = number
    forged_text(forge, f"{record}.format", str(number) if number < 10**100 else "1" + "0" * 4000)
    message = str(refuses(p))
    assert "install a newer one" in message
    assert len(message) < 6000
    falls_back(p)


def test_newer_store_says_what_to_do(p: Pair) -> None:
    """Nothing is read or written in a store of a newer format."""
    fields = json.loads(p.raw.get("store.json"))
    p.raw.put("store.json", sealed({**fields, "format": 2}))
    with opened(p.raw.url) as store:
        for action in (store.checkpoints, lambda: store.load("latest"), lambda: save(store, state(NEW), 3)):
            with pytest.raises(FormatError, match="install a newer one"):
                action()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("part.files.0.blocks.0.codec", "lz4"),
        ("part.files.0.blocks.0.codec", "float-zstd"),
        ("part.files.0.blocks.0.codec", "none "),
        ("part.files.0.blocks.0.codec", "__import__"),
        ("part.files.0.blocks.0.codec", "zstd"),
        ("part.files.0.blocks.0.stored_digest", "0" * 64),
        ("manifest.digest", "crc32"),
        ("manifest.digest", "none"),
        ("manifest.digest", "md5"),
        ("manifest.digest", "BLAKE3"),
        ("manifest.digest", "sha256"),
        ("manifest.digest", ""),
        ("manifest.block_bytes", 4096),
        ("manifest.block_bytes", 0),
        ("commit.kind", "commited"),
        ("commit.kind", "condemned"),
        ("commit.modes.loss", "median"),
        ("commit.metrics.loss", "NaN"),
        ("commit.metrics.loss", "0x10"),
        ("commit.created", "yesterday"),
        ("commit.created", "x" * 2000),
        ("commit.store_id", "f" * 32),
        ("manifest.store_id", "f" * 32),
        ("commit.world_size", 2),
        ("manifest.world_size", 2),
        ("manifest.parts", []),
        ("manifest.parts.0.rank", 1),
        ("part.rank", 1),
        ("part.files.0.tensors.dtypes.0", "F128"),
        ("part.files.0.tensors.dtypes.0", "u8"),
        ("part.files.0.tensors.dtypes.0", "O"),
        ("part.files.0.tensors.names.0", "__metadata__"),
        ("part.files.0.tensors.names.0", "x" * 5000),
    ],
)
def test_values_that_are_unknown(p: Pair, forge: Forge, path: str, value: object) -> None:
    """Nothing unknown is skipped, and no check is weakened by what a record names."""
    set_at(path, value)(forge)
    forge.write()
    if path == "commit.kind" and value == "condemned":
        forge.raw.put(p.commit, sealed({"kind": "condemned", **forge.commit}))
    refuses(p)
    assert not verified(p).ok
    falls_back(p)


# -- records in another's place ---------------------------------------------------------------------------


def test_a_commit_record_under_the_key_of_another(p: Pair) -> None:
    p.raw.put(p.commit, p.raw.get(f"commits/{p.good.id}.json"))
    assert isinstance(refuses(p), IntegrityError)
    falls_back(p)


def test_a_commit_record_under_an_id_of_its_own(p: Pair) -> None:
    """A checkpoint can't be made newer by giving its record another name."""
    id = "0009-000001-step1-0123456789abcdef"
    p.raw.put(f"commits/{id}.json", p.raw.get(f"commits/{p.good.id}.json"))
    with opened(p.raw.url) as store, pytest.warns(DamageWarning, match=id):
        assert store.load("latest")["epoch"] == 2


def test_a_tombstone_or_condemned_record_as_commit(p: Pair) -> None:
    with opened(p.raw.url) as store:
        store.delete(p.bad.id)
    tombstone = p.raw.get(f"trash/{p.bad.id}.json")
    p.raw.remove(f"trash/{p.bad.id}.json")
    p.raw.put(p.commit, tombstone)
    refuses(p)
    falls_back(p)


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.json"])
def test_records_of_another_checkpoint(p: Pair, forge: Forge, name: str) -> None:
    """They hold, and say that they belong elsewhere."""
    other = p.raw.get(f"checkpoints/{p.good.id}/{name}")
    message = refused(p, forge, **{"manifest" if name == "manifest.json" else "part": other})
    assert p.good.id in message


def test_a_hold_under_another_name(p: Pair) -> None:
    """A hold's record says its name; a copy under another one is damage, and pins nothing by that name."""
    with opened(p.raw.url) as store:
        store.hold(p.good.id, "paper")
        p.raw.put("holds/other.json", p.raw.get("holds/paper.json"))
        with pytest.warns(DamageWarning, match="other"):
            assert store.holds() == {"paper": p.good.id}


@pytest.mark.parametrize("id", ["", "0001", "..", "0001-000002-step2-0123456789abcdef/.."])
def test_a_hold_on_what_is_no_id(p: Pair, id: str) -> None:
    """It could select anything."""
    with opened(p.raw.url) as store:
        store.hold(p.good.id, "paper")
    fields = json.loads(p.raw.get("holds/paper.json"))
    p.raw.put("holds/paper.json", sealed({**fields, "id": id}))
    with opened(p.raw.url) as store:
        with pytest.warns(DamageWarning, match="paper"):
            assert store.holds() == {}
        assert isinstance(error_of(lambda: store.resolve("paper")), CheckpointError)


# -- the tree ---------------------------------------------------------------------------------------------

TREES: dict[str, Any] = {
    "missing tensor": {"model": {"$": "tensor", "name": "model/nothing"}},
    "no name": {"model": {"$": "tensor"}},
    "name of another type": {"model": {"$": "tensor", "name": ["model/w"]}},
    "unknown kind": {"model": {"$": "future"}},
    "kind of another type": {"model": {"$": {"$": "tensor"}}},
    "pickle": {"model": {"$": "pickle", "data": "gASVAAAA"}},
    "class by name": {"model": {"$": "object", "type": "os.system", "state": "true"}},
    "dict without items": {"model": {"$": "dict"}},
    "keys that are none": {"model": {"$": "dict", "items": [[[], 1]]}},
    "triples": {"model": {"$": "dict", "items": [["a", 1, 2]]}},
    "set of lists": {"model": {"$": "set", "items": [[]]}},
    "range bomb": {"model": {"$": "tuple", "items": 10**9}},
    "named tuple": {"model": {"$": "namedtuple", "type": "x.y", "fields": ["a;b"], "items": [1]}},
}


@pytest.mark.parametrize("name", TREES)
def test_trees_that_lead_nowhere(p: Pair, forge: Forge, name: str) -> None:
    """Only the library's errors come out of a tree, whatever it asks for."""
    forge.part["tree"] = TREES[name]
    forge.write()
    with opened(p.raw.url) as store, silence():
        error = error_of(lambda: store.load(p.bad.id))
    assert error is not None
    if isinstance(error, REFUSALS):
        falls_back(p)


def test_a_tensor_listed_twice(p: Pair, forge: Forge) -> None:
    """In one file, or in two by different prefixes."""
    file = forge.part["files"][0]
    file["tensors"]["names"] = ["w", "w"]
    refused(p, forge)
    restore(p)
    forge = Forge(p.raw, p.bad.id)
    forge.part["files"][1]["prefix"] = "mod"
    forge.part["files"][1]["tensors"]["names"] = ["el/w"]
    forge.write()
    refuses_to_load(p)


def test_a_file_listed_twice(p: Pair, forge: Forge) -> None:
    forge.part["files"].append(forge.part["files"][0])
    refused(p, forge)


def test_a_sealed_record_over_its_limit(p: Pair, forge: Forge) -> None:
    """16 KiB, whatever it holds."""
    forge.commit["reasons"] = ["x" * 900] * 18
    assert len(sealed(forge.commit)) > 16384
    refused(p, forge)


def test_a_library_record_never_has_more_than_it_may() -> None:
    """What is refused when read is refused when written: before any data are."""
    raw = MemoryRaw(uuid4().hex)
    with opened(raw.url) as store, pytest.raises(CheckpointError, match="16384"):
        save(store, state(GOOD), 1, **{f"metric-{n}": 1.0 for n in range(1000)})
    assert not [key for key in raw.listing() if key.startswith(("commits/", "checkpoints/"))]


def test_reading_nothing_by_a_record_of_zero_bytes(p: Pair, forge: Forge) -> None:
    """Sizes of zero, or far more than there is."""
    for size in (0, 1, 10**9, (1 << 63) - 1):
        forge.write()
        forge.commit["manifest"]["size"] = size
        p.raw.put(p.commit, sealed(forge.commit))
        refuses(p)
        falls_back(p)


def test_nothing_is_changed_by_looking(p: Pair, forge: Forge) -> None:
    """Reading a hostile store writes nothing."""
    set_at("part.files.0.name", "../w.safetensors")(forge)
    forge.write()
    before = {key: p.raw.get(key) for key in p.raw.listing()}
    with opened(p.raw.url) as store, silence():
        store.load("latest")
        store.verify()
        assert flat(store.load(p.good.id)) == dict(GOOD)
    assert {key: p.raw.get(key) for key in p.raw.listing()} == before
