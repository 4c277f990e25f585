"""Whatever is written, the answer is a config or an error that says what is wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore import config
from ckptstore.config import foreign
from ckptstore.config.environment import variables
from ckptstore.config.files import plain, yaml_value
from ckptstore.config.model import LEVELS, names
from ckptstore.errors import CheckpointError, FormatError

WORDS = ["every(steps=5)", "last(2)", "at(", "1GB", "1h", "runs/a", "s3://b/x", "1B,5B", "latest", "auto", "yes", "log"]
KNOWN = [
    *(name for level in LEVELS for name in names(level)),
    *foreign.TRAINING, *foreign.FLAGS, *foreign.SECTIONS,
    *("save_at_steps", "save_steps", "eval_steps", "milestones", "save_dir", "enabled", "train_steps", "epochs"),
]  # fmt: skip
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS) | st.binary()
)
keys = st.sampled_from(KNOWN) | st.text(max_size=5) | st.integers(0, 3)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@given(st.dictionaries(keys, values, max_size=6))
def test_any_dict(data: dict[Any, Any]) -> None:
    with contextlib.suppress(FormatError):
        assert isinstance(config.parse(data, environment={}), config.Config)


@given(st.dictionaries(st.sampled_from([*variables(), "CKPTSTORE_X", "CKPTSTORE_STORAGE_OPTIONS__A"]), st.text()))
def test_any_environment(environment: dict[str, str]) -> None:
    with contextlib.suppress(FormatError):
        assert isinstance(config.parse({}, environment=environment), config.Config)


pieces = st.sampled_from(
    [*KNOWN, *WORDS, ":", ": ", "\n", "\n  ", "- ", "[", "]", "{", "}", "#", "&a ", "*a", "|", "'", '"']
)


@given(st.lists(pieces, max_size=25).map("".join), st.sampled_from(["a.yaml", "a.toml"]))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    """Reading it, and writing steps into it: where that is done, they are there, and nothing else has changed."""
    path: Path = tmp_path_factory.mktemp("any") / name
    path.write_text(text)
    with contextlib.suppress(FormatError):
        config.load(path, environment={})
    try:
        config.write_steps(path, [5, 7])
    except CheckpointError:
        assert path.read_text() == text
        return
    written = path.read_text()
    assert "5, 7" in written
    assert others(written) == others(text)


def others(text: str) -> dict[str, Any]:
    """All in a file but the steps that are saved."""
    data = plain(yaml_value(text, "a") or {}, "a")
    data.pop("save", None)
    for section, key in (("training", "checkpoint_schedule"), ("checkpointing", "save_at_steps")):
        inner = data.get(section)
        if isinstance(inner, dict):
            inner.pop(key, None)
        if not inner:
            data.pop(section, None)
    return data
