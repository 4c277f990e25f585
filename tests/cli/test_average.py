"""``ckptstore average``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptstore
from tests.cli.conftest import Run, data_file, flip


def test_the_last_ones_go_into_a_new_store(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    """The result names its parents, and what was averaged is as it was."""
    target = tmp_path / "averaged"

    answer = run("average", url, "--last", "2", "--to", str(target))

    assert (answer.exit_code, answer.stderr) == (0, "")
    assert f"average of {ids[1]}, {ids[2]}, from" in answer.stdout
    with ckptstore.open(target, read_only=True) as store:
        [made] = store.checkpoints()
        assert answer.stdout.startswith(f"saved {made.id} (step 30")
        model = store.load("latest")["model"]
    assert torch.equal(model["layers.0.weight"], torch.full((64, 64), 25.0))
    assert model["head.weight"].dtype is torch.bfloat16
    with ckptstore.open(url, read_only=True) as store:
        assert [c.id for c in store.checkpoints()] == ids


def test_selectors_weights_only_and_dtype(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    target = str(tmp_path / "averaged")
    options = ("--weights", "3,1", "--only", "*weight", "--dtype", "fp16", "--to", target, "--json")
    made = run("average", url, "latest", "best:val_loss", *options).json
    assert (made["url"], made["step"], made["metrics"]) == (target, 30, {})
    assert made["reasons"][0].startswith(f"weighted average of {ids[1]} (0.25), {ids[2]} (0.75)")
    with ckptstore.open(target, read_only=True) as store:
        model = store.load("latest")["model"]
    assert set(model) == {"layers.0.weight", "head.weight"}
    assert torch.equal(model["layers.0.weight"], torch.full((64, 64), 27.5, dtype=torch.float16))


def test_best_and_ema(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    target = str(tmp_path / "averaged")
    assert run("average", url, "--best", "val_loss:2", "--ema", "0.75", "--to", target).exit_code == 0
    with ckptstore.open(target, read_only=True) as store:
        assert float(store.load("latest")["model"]["layers.0.weight"][0, 0]) == 22.5


def test_here_it_becomes_the_latest(run: Run, url: str, ids: list[str]) -> None:
    made = run("average", url, "--last", "3", "--here", "--json").json
    with ckptstore.open(url, read_only=True) as store:
        assert store.resolve().id == made["id"]
        assert len(store.checkpoints()) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--last", "2"), "--to URL2, or --here"),
        (("--last", "2", "--here", "--to", "memory://nowhere"), "--to URL2, or --here"),
        (("--to", "memory://nowhere"), "say what to average"),
        (("latest", "step:10", "--last", "2", "--to", "memory://nowhere"), "say what to average"),
        (("--last", "2", "--weights", "a,b", "--to", "memory://nowhere"), "write them as 1,2,0.5"),
        (("--last", "1", "--to", "memory://nowhere"), "--last"),
        (("--last", "2", "--ema", "7", "--to", "memory://nowhere"), "between 0 and 1"),
        (("--last", "2", "--dtype", "int4", "--to", "memory://nowhere"), "floating-point"),
    ],
)
def test_wrong_use_is_told(run: Run, url: str, options: tuple[str, ...], words: str) -> None:
    answer = run("average", url, *options)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert words in answer.stderr


def test_bad_news(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    target = tmp_path / "averaged"
    assert run("average", url, "latest", "step:7", "--to", str(target)).exit_code == 1
    path = data_file(url, ids[1])
    flip(path, path.stat().st_size - 1)
    answer = run("average", url, "--last", "3", "--to", str(target), "--json")
    assert (answer.exit_code, answer.json["error"]["code"], answer.json["error"]["id"]) == (1, "integrity", ids[1])
    with ckptstore.open(target, read_only=True) as store:
        assert not store.checkpoints()
