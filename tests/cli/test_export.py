"""``ckptstore export``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import ckptstore
from tests.cli.conftest import Run, data_file, flip, state


def test_a_model_is_exported(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    """With what it is and what is not in it."""
    answer = run("export", url, "best:val_loss", "--to", "hf", "-o", str(tmp_path / "out"))

    assert (answer.exit_code, answer.stderr) == (0, "")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == state(20)["model"].keys()
    for expected in (
        "names are those in model",
        "left out: plain (it is no part of the model)",
        "from_pretrained needs a config.json",
        f"exported {ids[1]} to {tmp_path / 'out'}: 3 tensors, 1 file, 1",
    ):
        assert expected in answer.stdout
    assert len(answer.stdout.splitlines()) == 4


def test_options_reach_it(run: Run, url: str, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    options = ("--only", "model/*", "--dtype", "fp16", "--max-shard", "1kB", "--config", str(tmp_path / "config"))
    for overwrite in ((), ("--overwrite",)):
        answer = run("export", url, "--to", "hf", "-o", str(tmp_path / "out"), *options, *overwrite, "--json")
        assert answer.exit_code == 0
    document = answer.json
    assert document["step"] == 30
    assert document["component"] == "model"
    assert len(document["files"]) == 5
    assert document["written_bytes"] == sum(document["files"].values())
    assert document["cast"] == {"head.weight": "bfloat16", "layers.0.bias": "float32", "layers.0.weight": "float32"}
    assert not document["lacks_config"]
    assert run("export", url, "--to", "hf", "-o", str(tmp_path / "out"), *options).exit_code == 1


def test_values_for_torch(run: Run, url: str, tmp_path: Path) -> None:
    answer = run("export", url, "step:10", "--to", "torch", "-o", str(tmp_path / "x.pt"))

    assert answer.exit_code == 0
    assert answer.stdout.count("\n") == 1
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["plain"]["history"] == list(range(50))
    assert loaded["model"]["layers.0.weight"][0, 0] == 10


def test_much_that_is_left_out_is_cut(run: Run, store_path: Path, tmp_path: Path) -> None:
    with ckptstore.open(store_path) as store:
        store.save({"w": torch.tensor([1e9]), "ranges": [range(3)] * 20}, step=1)
    answer = run("export", str(store_path), "--to", "torch", "--dtype", "fp16", "-o", str(tmp_path / "x.pt"))

    assert "INFINITE NOW: w (too large for float16)" in answer.stdout
    assert "left out: ranges/0 (a range, which plain torch doesn't load)" in answer.stdout
    assert "left out: 12 more; --json names all" in answer.stdout


def test_what_goes_wrong_is_one_line(run: Run, url: str, ids: list[str], tmp_path: Path) -> None:
    place = str(tmp_path / "x")
    flip(data_file(url, ids[2]), -1)
    for code, kind, args in (
        (1, "integrity", ("--to", "torch", "-o", place)),
        (1, "not_found", ("step:99", "--to", "torch", "-o", place)),
        (1, "exists", ("step:10", "--to", "torch", "-o", url)),
        (2, "format", ("step:10", "--to", "torch", "-o", "s3://bucket/x")),
        (2, "state", ("step:10", "--to", "hf", "-o", place, "--only", "plain/lr")),
        (2, "usage", ("step:10", "--to", "onnx", "-o", place)),
        (2, "usage", ("step:10", "--to", "hf", "-o", place, "--max-shard", "much")),
        (2, "usage", ("step:10", "--to", "hf")),
    ):
        answer = run("export", url, *args, "--json")
        assert (answer.exit_code, answer.json["error"]["code"]) == (code, kind), args
    assert not Path(place).exists()
