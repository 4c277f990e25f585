"""The tree of errors: shape, codes, builtin parents, pickling."""

from __future__ import annotations

import pickle

import pytest

from ckptstore import errors

TREE = {
    "NotFoundError": ("CheckpointError", FileNotFoundError, "not_found"),
    "NoCheckpointError": ("NotFoundError", FileNotFoundError, "no_checkpoint"),
    "ExistsError": ("CheckpointError", FileExistsError, "exists"),
    "StaleWriterError": ("CheckpointError", Exception, "stale_writer"),
    "StateError": ("CheckpointError", TypeError, "state"),
    "FormatError": ("CheckpointError", ValueError, "format"),
    "IntegrityError": ("CheckpointError", Exception, "integrity"),
    "SaveFailedError": ("CheckpointError", Exception, "save_failed"),
    "CommitUnknownError": ("CheckpointError", Exception, "commit_unknown"),
    "DivergedError": ("CheckpointError", Exception, "diverged"),
    "StorageError": ("CheckpointError", OSError, "storage"),
    "StorageFullError": ("StorageError", OSError, "storage_full"),
    "UnavailableError": ("StorageError", OSError, "unavailable"),
}
FIELDS = {
    "StateError": {"path": "model/w"},
    "IntegrityError": {"block": 3, "expected": "aa", "actual": "bb"},
    "StorageError": {"transient": True, "outcome": "unknown"},
}


@pytest.mark.parametrize("name", TREE)
def test_shape_and_code(name: str) -> None:
    """Each error stands where the drawing shows it, with its code and builtin parent."""
    parent, builtin, code = TREE[name]
    kind = getattr(errors, name)
    assert kind.__bases__[0].__name__ == parent
    assert issubclass(kind, builtin)
    assert kind.code == code
    assert name in (errors.__doc__ or "")


@pytest.mark.parametrize("name", TREE)
def test_pickles_with_all_fields(name: str) -> None:
    """An error crosses process borders with its message and fields."""
    fields = {"id": "i", "step": 7, "key": "k", **FIELDS.get(name, {})}
    error = getattr(errors, name)("what, why, way out", **fields)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "what, why, way out"
    assert {field: getattr(again, field) for field in fields} == fields


def test_tree_is_complete() -> None:
    """No error exists outside the drawing."""
    kinds = {k for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert kinds == {*TREE, "CheckpointError"}
    assert len({code for _, _, code in TREE.values()}) == len(TREE)
