"""Records made to deceive, with hashes that hold all the way up: each is refused by a named error."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest

from ckptstore.engine.damage import DamageWarning
from ckptstore.errors import CheckpointError, FormatError, IntegrityError
from tests.integrity.checks import REFUSALS, error_of, falls_back, refuses, verified
from tests.integrity.forging import forged_text, refused, refuses_to_load, restore, set_at
from tests.integrity.stores import (
    GOOD,
    NEW,
    Forge,
    MemoryRaw,
    Pair,
    flat,
    opened,
    read,
    save,
    sealed,
    silence,
    state,
)


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
        store.verify(record=False)
        assert flat(store.load(p.good.id)) == dict(GOOD)
    assert {key: p.raw.get(key) for key in p.raw.listing()} == before
