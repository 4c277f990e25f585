"""Ids and keys: parsed, ordered as numbers, and refused unless they are what their numbers format to."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import FormatError
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId, new_id, parse_id
from ckptstore.storage.base import is_key

HEX = "0123456789abcdef"
ids = st.builds(
    CheckpointId,
    st.integers(0, 10**9 - 1),
    st.integers(0, 10**12 - 1),
    st.integers(0, 10**15 - 1),
    st.text(HEX, min_size=16, max_size=16),
)


@given(ids)
def test_ids_come_back(id: CheckpointId) -> None:
    assert parse_id(str(id)) == id
    assert is_key(str(id))


def test_an_id_looks_like_this() -> None:
    assert str(CheckpointId(1, 42, 1000, HEX)) == "0001-000042-step1000-0123456789abcdef"
    assert str(CheckpointId(12345, 1234567, 0, HEX)) == "12345-1234567-step0-0123456789abcdef"


@given(st.lists(ids, max_size=20))
def test_order_is_of_numbers_not_of_text_or_steps(found: list[CheckpointId]) -> None:
    """Writer, then sequence, then the random part; the step decides nothing."""
    assert sorted(found) == sorted(found, key=lambda id: (id.writer, id.seq, id.unique))


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("9999-000001-step9-" + HEX, "10000-000001-step1-" + HEX),
        ("0001-999999-step9-" + HEX, "0001-1000000-step1-" + HEX),
        ("0001-999999-step9-" + HEX, "0002-000001-step1-" + HEX),
        ("0001-000001-step1-" + "0" * 16, "0001-000001-step1-" + HEX),
    ],
)
def test_order_beyond_the_padding(older: str, newer: str) -> None:
    """Where text would order them the other way, too."""
    assert parse_id(older) < parse_id(newer)
    assert not parse_id(newer) < parse_id(older)
    assert max(parse_id(newer), parse_id(older)) == parse_id(newer)


@pytest.mark.parametrize(
    "text",
    [
        *("", "latest", "0001", "0001-000001", "0001-000001-step1", "0001-000001-1-" + HEX, "1-000001-step1-" + HEX),
        *("00001-000001-step1-" + HEX, "0001-0000001-step1-" + HEX, "0001-000001-step01-" + HEX),
        *("0001-000001-step-1-" + HEX, "0001-000001-step1-" + HEX.upper(), "0001-000001-step1-" + HEX + "0"),
        *("0001-000001-step1-" + HEX[:-1], " 0001-000001-step1-" + HEX, "0001-000001-step1-" + HEX + "\n"),
        *("0001-000001-step1-" + HEX + ".json", "../0001-000001-step1-" + HEX, "0001/000001-step1-" + HEX),
        *("1234567890-000001-step1-" + HEX, "0001-000001-step" + "1" * 16 + "-" + HEX),
        "\N{ARABIC-INDIC DIGIT ONE}001-000001-step1-" + HEX,
    ],
)
def test_what_is_no_id(text: str) -> None:
    assert layout.try_id(text) is None
    with pytest.raises(FormatError, match="no checkpoint id"):
        parse_id(text)


def test_new_ids_differ() -> None:
    """Also under the numbers of a writer that was racing with this one."""
    assert len({new_id(1, 1, 1) for _ in range(1000)}) == 1000


@given(ids, st.integers(0, 10**5))
def test_keys_and_their_inverses(id: CheckpointId, rank: int) -> None:
    assert layout.record_id(layout.commit_key(id)) == id
    assert layout.record_id(layout.tombstone_key(id)) == id
    for key in (layout.manifest_key(id), layout.part_key(id, rank), layout.file_key(id, "model.safetensors")):
        assert is_key(key)
        assert key.startswith(layout.folder(id))
        assert layout.folder_id(key) == id
        assert layout.record_id(key) is None


@given(st.integers(1, 10**9 - 1))
def test_writer_keys(number: int) -> None:
    assert layout.writer_number(layout.writer_key(number)) == number


@pytest.mark.parametrize(
    "key", ["writers/1.json", "writers/00001.json", "writers/0001", "writers/0001.json.json", "x/0001.json", "writers/"]
)
def test_what_is_no_writer(key: str) -> None:
    assert layout.writer_number(key) is None


@given(st.text(max_size=30))
def test_any_text_is_a_key_of_none(text: str) -> None:
    """Looking at a name never fails."""
    for key in (text, f"commits/{text}", f"checkpoints/{text}/x", f"writers/{text}", f"holds/{text}.json"):
        layout.record_id(key)
        layout.folder_id(key)
        layout.writer_number(key)
        layout.hold_name(key)


@pytest.mark.parametrize("name", ["paper", "v1.0", "0001", "Paper", "a" * 100, "stepping", "bestiary", "x-latest"])
def test_hold_names(name: str) -> None:
    assert layout.check_hold_name(name) == name
    assert layout.hold_name(layout.hold_key(name)) == name


@given(st.lists(st.text(max_size=120), max_size=8))
def test_file_names_are_names_and_unique_where_case_is_ignored(components: list[str]) -> None:
    """Whatever the entries of a state are called."""
    taken: set[str] = set()
    names = [layout.file_name(component, taken, suffix=".safetensors") for component in components]
    assert len({name.lower() for name in names}) == len(components)
    for name in names:
        assert layout.check_file_name(name) == name
        assert is_key(f"checkpoints/{new_id(1, 1, 1)}/{name}")


def test_file_names_say_what_is_in_them() -> None:
    taken: set[str] = set()
    wanted = ["model", "Model", "ema model", "é", "tmp-x", ".hidden", "con"]
    assert [layout.file_name(name, taken, suffix=".blocks") for name in wanted] == [
        *("model.blocks", "model-2.blocks", "ema-model.blocks", "state.blocks", "c-tmp-x.blocks", "hidden.blocks"),
        "con.blocks",
    ]


def test_many_components_of_one_name() -> None:
    """Numbered, and still names."""
    taken: set[str] = set()
    for _ in range(200):
        layout.file_name("x" * random.randrange(200), taken, suffix=".safetensors")
    assert len(taken) == 200


def test_keys_of_verifications_are_in_the_order_of_time() -> None:
    times = [datetime(2026, 1, 31, 12, 0, 0, microsecond, UTC) for microsecond in (0, 7, 999_999)]
    keys = [layout.verification_key(time) for time in times]
    assert keys[1].startswith("verifications/20260131T120000.000007Z-")
    assert keys == sorted(keys)
    assert all(layout.is_verification(key) and is_key(key) for key in keys)
    assert layout.verification_key(times[0]) != keys[0]
    for other in ("verifications/", "verifications/a.json", keys[0] + ".json", "x" + keys[0], "holds/a.json"):
        assert not layout.is_verification(other)
