"""Narrow terminals, dumb ones, no colours and wide characters: nothing that matters is cut, and nothing else breaks."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from rich.cells import cell_len

import ckptstore
from tests.cli.conftest import environment, told

SEVERAL = """
import json, os, sys
from ckptstore.cli.main import cli
for name, variables, args in json.loads(sys.argv[1]):
    os.environ.update(variables)
    print("=== " + name, flush=True)
    try:
        cli(args, prog_name="ckptstore")
    except SystemExit as end:
        print("=== ended with", end.code, flush=True)
"""
PLAN = ["plan", "--save", "every(steps=100)", "--keep", "last(3) | epochs()", "--steps", "500", "--epochs", "2"]
PLAIN = {"TERM": "xterm", "NO_COLOR": "", "COLUMNS": "80"}
TERMINALS = {
    "wide": PLAIN,
    "narrow": {**PLAIN, "COLUMNS": "40"},
    "colourless": {**PLAIN, "NO_COLOR": "1"},
    "dumb": {**PLAIN, "TERM": "dumb"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Metrics, reasons and names as people write them everywhere, some of them long, and a borrowed file."""
    path = tmp_path_factory.mktemp("terminal") / "store"
    frozen = torch.nn.Linear(8, 8)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with ckptstore.open(path) as store:
        for step in (10, 20):
            metrics = {"val_loss": 1.2345 + step, "損失": 0.5}
            state = {"model": frozen, "ключ": {"値" * 30: torch.ones(4)}}
            store.save(state, step=step, epoch=1, metrics=metrics, reasons=["評価の後に保存", "every 10 steps"])
        store.hold("step:10", "a-rather-long-name-of-a-hold-for-the-paper")
    return str(path)


@pytest.fixture(scope="module")
def shown(store: str) -> dict[str, dict[str, str]]:
    """What each kind of terminal shows of each command, all run by one process."""
    du = ["du", store, "--all", "--keep", "last(1) | best('val_loss')"]
    commands = [["ls", store], ["show", store], du, ["verify", store], ["release", store, "nothing"], PLAN]
    calls = [(f"{name} {args[0]}", variables, args) for name, variables in TERMINALS.items() for args in commands]
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SEVERAL, json.dumps(calls)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(),
    )
    os.close(follower)
    seen = told(leader).decode().replace("\r\n", "\n")
    child.wait(timeout=60)
    os.close(leader)
    parts = re.findall(r"^=== (\w+) (\w+)\n(.*?)^=== ended with \d\n", seen, re.DOTALL | re.MULTILINE)
    assert len(parts) == len(calls), seen
    found: dict[str, dict[str, str]] = {}
    for name, command, text in parts:
        found.setdefault(name, {})[command] = text
    return found


def undressed(text: str) -> str:
    """``text`` without colours and what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("terminal", ["narrow", "wide"])
def test_nothing_that_matters_is_cut(store: str, shown: dict[str, dict[str, str]], terminal: str) -> None:
    with ckptstore.open(store, read_only=True) as opened:
        ids = [checkpoint.id for checkpoint in opened.checkpoints()]
    columns = int(TERMINALS[terminal]["COLUMNS"])
    seen = {name: undressed(text) for name, text in shown[terminal].items()}

    for name in ("ls", "show"):
        assert max(map(cell_len, seen[name].splitlines())) <= columns, name
    for id in ids:
        assert id[:11] in seen["ls"]
        assert id[:11] in seen["du"]
    whole = {name: re.sub(r"[\s│├└─]+", "", text) for name, text in seen.items()}
    for text in ("21.235", "every", "評価の", "a-rather-"):
        assert text in whole["ls"]
    for text in (ids[1], "値" * 30, "F32[4]", "16B", "model-frozen.safetensors"):
        assert text in whole["show"], text
    for text in ("last(1)", "best('val_loss')", "best:val_loss", "model", "none"):
        assert text in seen["du"], text
    for text in ("500", "one of the newest 3", "end of epoch 2"):
        assert text.replace(" ", "") in whole["plan"], text
    assert "…" not in seen["ls"] + seen["show"] + seen["du"]


def test_no_colours_where_none_are_wanted(shown: dict[str, dict[str, str]]) -> None:
    """A dumb terminal gets no bars, either, which it could not draw over."""
    coloured, colourless, dumb = shown["wide"], shown["colourless"], shown["dumb"]

    assert re.search(r"\x1b\[[0-9;]*m", coloured["plan"])
    assert "verifying" in coloured["verify"]
    assert "\x1b[31merror: " in coloured["release"]
    for plain in (colourless, dumb):
        assert re.search(r"\x1b\[(3|4|9)\d", "".join(plain.values())) is None
        assert "good: 2 checkpoints" in plain["verify"]
        assert plain["release"].startswith("error: ")
    assert "\x1b" not in "".join(dumb.values())
    assert "verifying" not in dumb["verify"]
