"""``ckptstore show``."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import ckptstore
from tests.cli.conftest import Run, flip


def test_latest_is_shown_without_a_selector(run: Run, url: str, ids: list[str]) -> None:
    """Facts, files, values and tensors stand under each other."""
    answer = run("show", url)

    assert (answer.exit_code, answer.stderr) == (0, "")
    assert re.search(r"^saved +in [\d.]+ s, training waited [\d.]+ s$", answer.stdout, re.MULTILINE)
    for expected in (
        ids[2],
        "val_loss 2 (min is best)",
        "every 10 steps",
        "UTC 20",
        "model.safetensors",
        "plain values",
        "lr = 0.001",
        'names = ["a", "b"]',
        "history = [0, 1, 2, … 50 in all]",
        "nan = nan",
        "3 tensors, 17.7 kB in all",
        "weight  F32[64, 64]  16.4 kB",
        "head.weight  BF16[8, 64]  1.02 kB",
    ):
        assert expected in answer.stdout


def test_selectors_work(run: Run, url: str, ids: list[str]) -> None:
    run("hold", url, "step:10", "paper")
    for selector, id in {"best:val_loss": ids[1], "step:20": ids[1], "paper": ids[0], ids[2][:11]: ids[2]}.items():
        assert run("show", url, selector, "--json").json["id"] == id
    assert "held by" in run("show", url, "paper").stdout


def test_json_lists_files_values_and_tensors(run: Run, url: str) -> None:
    shown = run("show", url, "step:20", "--json").json

    assert shown["tensors"]["model/head.weight"] == {"dtype": "BF16", "shape": [8, 64], "bytes": 1024, "logical": None}
    assert shown["values"]["plain/names"] == ["a", "b"]
    assert shown["values"]["plain/nan"] == "nan"
    (file,) = shown["files"]
    assert (file["name"], file["tensors"], file["blocks"], file["codecs"]) == ("model.safetensors", 3, 1, ["none"])
    assert file["raw_bytes"] == file["stored_bytes"] == shown["stored_bytes"]


def test_compressed_files_name_their_codec(run: Run, store_path: Path) -> None:
    with ckptstore.open(store_path, compression="zstd") as store:
        store.save({"model": {"x": torch.zeros(10000)}}, step=1)

    shown = run("show", str(store_path), "--json").json
    assert shown["files"][0]["codecs"] == ["zstd"]
    assert shown["stored_bytes"] < shown["raw_bytes"]


def test_depth_collapses_what_lies_deeper(run: Run, url: str) -> None:
    shallow, deep = run("show", url, "--depth", "1").stdout, run("show", url, "--depth", "2").stdout
    assert "model/  3 tensors, 17.7 kB" in shallow
    assert "layers.0." not in shallow
    assert "layers.0.  2 tensors, 16.6 kB" in deep
    assert run("show", url, "--depth", "0").exit_code == 2


def test_only_takes_names_and_folders(run: Run, url: str) -> None:
    """A pattern that matches a folder takes what is in it, as in ``load(only=…)``."""
    assert list(run("show", url, "--only", "*head*", "--json").json["tensors"]) == ["model/head.weight"]
    model = run("show", url, "--only", "model", "--json").json
    assert (len(model["tensors"]), model["values"]) == (3, {})
    both = run("show", url, "--only", "plain/lr", "--only", "*bias", "--json").json
    assert (list(both["tensors"]), both["values"]) == (["model/layers.0.bias"], {"plain/lr": 0.001})
    nothing = run("show", url, "--only", "modle/*", "--only", "plain")
    assert "0 tensors, 0 B in all" in nothing.stdout
    assert nothing.stderr == "nothing here matches 'modle/*'; did you mean 'model/*'?\n"


def test_missing_ones_are_bad_news_and_bad_selectors_wrong_use(run: Run, url: str) -> None:
    missing, wrong = run("show", url, "step:77"), run("show", url, "foo:1")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: ")
    assert "'step:77'" in missing.stderr
    assert wrong.exit_code == 2
    assert run("show", url, "step:77", "--json").json["error"]["code"] == "not_found"


def test_a_damaged_part_is_bad_news(run: Run, url: str, ids: list[str]) -> None:
    flip(Path(url) / "checkpoints" / ids[2] / "part-00000.json", 100)

    answer = run("show", url, "--json")
    assert answer.exit_code == 1
    error = answer.json["error"]
    assert (error["code"], error["id"], error["key"]) == ("integrity", ids[2], f"checkpoints/{ids[2]}/part-00000.json")
    assert {"message", "expected", "actual"} <= set(error)


def test_a_tensor_is_described(run: Run, url: str) -> None:
    """Range, histogram, first values, and where it lies."""
    answer = run("show", url, "--tensor", "model/layers.0.bias")

    assert (answer.exit_code, answer.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in answer.stdout.splitlines() if line]
    facts = {line[0]: line[1] for line in lines if len(line) == 2}
    assert facts["tensor"] == "model/layers.0.bias"
    assert facts["type"] == "F32[64], 64 elements, 256 B"
    assert facts["lies"].endswith("/model.safetensors, block 0 (none)")
    assert (facts["min"], facts["max"], facts["mean"], facts["zeros"], facts["nan"]) == ("0", "63", "31.5", "1", "none")
    assert facts["first"] == "0, 1, 2, 3, 4, 5, 6, 7, …"
    assert sum(line.count("█") > 20 for line in answer.stdout.splitlines()) == 20


def test_several_tensors_make_a_table(run: Run, url: str) -> None:
    answer = run("show", url, "step:20", "--tensor", "model/layers*", "--tensor", "model/head.weight")
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert {row[0]: row[-8:-3] for row in rows[1:]} == {
        "model/layers.0.weight": ["20", "20", "20", "0", "1280"],
        "model/layers.0.bias": ["0", "63", "31.5", "18.47", "292.1"],
        "model/head.weight": ["1", "1", "1", "0", "22.63"],
    }
    found = run("show", url, "step:20", "--tensor", "model/*", "--json").json
    assert [len(it["counts"]) for it in found["tensors"]] == [20, 20, 20]
    assert found["tensors"][0]["homes"][0]["blocks"] == [0, 0]


def test_a_misspelt_tensor_is_bad_news_with_a_hint(run: Run, url: str) -> None:
    answer = run("show", url, "--tensor", "model/layers.0.bais")
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert "did you mean model/layers.0.bias" in answer.stderr
