"""The tree of names that ``show`` draws, and the plain values in a stored tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

import ckptstore
from ckptstore.cli.outline import draw, grow, value_text
from ckptstore.tools.outline import plain_values
from tests.cli.conftest import Run


def drawn(names: list[str], depth: int) -> list[str]:
    root = grow(((name, "", 1) for name in names), "/.")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(draw("all", root, depth, lambda branch: f"({branch.count}, {branch.stored_bytes} B)"))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_folders_with_one_entry_take_no_level() -> None:
    assert drawn(["a/b.c", "a/b.d", "e/f"], 1) == ["all", "├── a/b.  (2, 2 B)", "└── e/f"]


def test_counts_go_up_the_tree() -> None:
    assert drawn(["m/x.1", "m/x.2", "m/y"], 2) == ["all", "└── m/  (3, 3 B)", "    ├── y", "    └── x.  (2, 2 B)"]


@pytest.mark.parametrize(
    ("node", "values"),
    [
        (7, {"": 7}),
        ({"a": {"b": 1}, "c": None}, {"a/b": 1, "c": None}),
        ({"$": "tensor", "name": "x"}, {}),
        ({"$": "bytes", "tensor": "x"}, {}),
        ({"x": {"$": "int", "hex": "0x20000000000000"}}, {"x": 2**53}),
        ({"x": {"$": "float", "bits": "7ff0000000000000"}}, {"x": float("inf")}),
        ({"x": {"$": "str", "utf8": "eda080"}}, {"x": "\\xed\\xa0\\x80"}),
        ({"x": {"$": "bytes", "base64": "AAAA"}}, {"x": "3 bytes"}),
        ({"x": {"$": "float", "bits": "zz"}}, {"x": {"$": "float", "bits": "zz"}}),
        ({"x": {"$": "tuple", "items": [1, 2]}}, {"x": [1, 2]}),
        ({"x": {"$": "dict", "items": [[1, "one"], [{"$": "tuple", "items": []}, 2]]}}, {"x/1": "one", "x/#1": 2}),
        ({"x": {"$": "namespace", "fields": {"a": 1}}}, {"x/a": 1}),
        ({"x": {"$": "unheard-of", "word": 1}}, {"x": {"word": 1}}),
        ([{"a": 1}, 2], {"0/a": 1, "1": 2}),
    ],
)
def test_plain_values(node: object, values: dict[str, object]) -> None:
    """Every kind of node that is no tensor becomes a value with its path."""
    assert dict(plain_values(node)) == values


def test_values_of_live_objects_are_found(run: Run, store_path: Path) -> None:
    """What the library writes for an optimizer, a scheduler and random state is understood here."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with ckptstore.open(store_path) as store:
        store.save({"o": optimizer, "m": model, "s": scheduler, "rng": ckptstore.RNG()}, step=1)

    answer = run("show", str(store_path), "--json")
    values = answer.json["values"]
    assert values["o/groups/0/lr"] == 0.5
    assert values["o/groups/0/params"] == ["m/weight", "m/bias"]
    assert values["s/step_size"] == 3
    assert run("show", str(store_path), "--depth", "9").exit_code == 0


def test_long_values_are_cut() -> None:
    assert value_text(list(range(9))) == "[0, 1, 2, … 9 in all]"
    assert len(value_text("x" * 1000)) == 101


def test_a_malformed_tree_is_an_error_and_no_bug(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored tree comes from anybody."""
    asked = []

    def hostile(node: object, path: str = "") -> object:
        asked.append(path)
        raise RecursionError("too deep")

    monkeypatch.setattr("ckptstore.cli.show.plain_values", hostile)
    answer = run("show", url, "--json")

    assert asked == [""]
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "format")
