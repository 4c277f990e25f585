"""Folders for ``from_pretrained``, loaded by the real one; the models are made here, nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import ckptstore as cs
from tests.state.memory import same

TINY: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 99,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def gpt2(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TINY, **options))


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, d_kv=16, decoder_start_token_id=0)
    )


@pytest.fixture
def store(store_path: Path) -> Iterator[cs.Store]:
    with cs.open(store_path) as store:
        yield store


def exported(store: cs.Store, model: torch.nn.Module, path: Path, **options: Any) -> cs.ExportReport:
    """Save a model with what else is in a checkpoint, and export it."""
    optimizer = torch.optim.SGD(model.parameters())
    store.save({"model": model, "optimizer": optimizer, "step": 5}, step=5)
    return cs.export(store, "latest", path, to="hf", **options)


def config_of(model: PreTrainedModel, folder: Path) -> Path:
    """What ``--config`` names: where the training began, with weights that nobody wants."""
    model.config.save_pretrained(folder)
    for name in ("tokenizer.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "modeling.py"):
        (folder / name).write_text(name)
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def loaded(cls: type[Any], folder: Path) -> PreTrainedModel:
    """The model in a folder, of which nothing was missing and nothing left over."""
    model, told = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model


def tied(model: torch.nn.Module) -> list[set[str]]:
    """Names of one and the same weight."""
    places: dict[int, set[str]] = {}
    for name, tensor in model.state_dict().items():
        places.setdefault(tensor.data_ptr(), set()).add(name)
    return [names for names in places.values() if len(names) > 1]


def test_shards_and_index_are_those_of_save_pretrained(store: cs.Store, tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    config = config_of(model, tmp_path / "config")
    report = exported(store, model, tmp_path / "out", max_shard_bytes="20kB", config=config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    index, theirs = (json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("out", "theirs"))
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert len(set(index["weight_map"].values())) > 2
    files = {path.name for path in (tmp_path / "theirs").iterdir()} - {"generation_config.json"}
    texts = {"tokenizer.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "modeling.py"}
    assert report.files.keys() == files | texts
    assert (tmp_path / "out" / "config.json").read_bytes() == (config / "config.json").read_bytes()
    assert same(dict(loaded(AutoModelForCausalLM, tmp_path / "out").state_dict()), dict(model.state_dict()))
    assert (report.component, report.lacks_config) == ("model", False)
    assert report.left_out == {"optimizer": "it is no part of the model", "step": "it is no part of the model"}


def test_the_index_is_written_last(store: cs.Store, tmp_path: Path) -> None:
    """When all bytes of all weights are in their files."""
    seen: list[bool] = []

    def look(done: int, total: int) -> None:
        if done == total:
            seen.extend((folder / "out" / "model.safetensors.index.json").exists() for folder in tmp_path.glob("out.*"))

    exported(store, gpt2(), tmp_path / "out", max_shard_bytes="20kB", progress=look)
    assert seen == [False]
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_tied_weights_stay_tied(store: cs.Store, tmp_path: Path, make: Any) -> None:
    model = make()
    assert tied(model)
    exported(store, model, tmp_path / "out", config=config_of(model, tmp_path / "config"))
    found = loaded(type(model), tmp_path / "out")
    assert same(dict(found.state_dict()), dict(model.state_dict()))
    assert tied(found) == tied(model)


def test_weights_that_are_tied_by_hand_are_all_there(store: cs.Store, tmp_path: Path) -> None:
    """Where the configuration doesn't say so, a name that isn't in the file would be a weight made anew."""
    model = gpt2(tie_word_embeddings=False)
    model.lm_head.weight = model.transformer.wte.weight
    exported(store, model, tmp_path / "out", config=config_of(model, tmp_path / "config"))
    assert same(dict(loaded(GPT2LMHeadModel, tmp_path / "out").state_dict()), dict(model.state_dict()))


def test_a_cast_model_is_one_of_that_type(store: cs.Store, tmp_path: Path) -> None:
    """Also for the configuration, which says in which type it is loaded."""
    model = gpt2()
    report = exported(store, model, tmp_path / "out", config=config_of(model, tmp_path / "config"), dtype="bf16")
    found = loaded(AutoModelForCausalLM, tmp_path / "out")
    assert found.dtype == torch.bfloat16
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert same(dict(found.state_dict()), expected)
    assert report.cast.keys() == expected.keys()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_names_of_wrappers_are_taken_off(store: cs.Store, tmp_path: Path) -> None:
    """Of a module, and of a state_dict with such names."""
    model = gpt2(tie_word_embeddings=False)
    store.save({"model": {f"module._orig_mod.{name}": t for name, t in model.state_dict().items()}}, step=1)
    cs.export(store, "latest", tmp_path / "a", to="hf", config=config_of(model, tmp_path / "config"))
    exported(store, torch.nn.DataParallel(model), tmp_path / "b", config=tmp_path / "config")
    for folder in ("a", "b"):
        assert same(dict(loaded(GPT2LMHeadModel, tmp_path / folder).state_dict()), dict(model.state_dict()))


def test_a_broken_configuration_is_told(store: cs.Store, tmp_path: Path) -> None:
    config = config_of(gpt2(), tmp_path / "config")
    (config / "config.json").write_text("[1]")
    with pytest.raises(cs.FormatError, match=r"config.json is no configuration of a model"):
        exported(store, gpt2(), tmp_path / "out", config=config, dtype="bf16")
    assert not (tmp_path / "out").exists()
