"""What the callback for the Hugging Face Trainer saves and when, what it goes on with, and what it refuses."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import ckptstore as cs
from ckptstore.integrations.huggingface import CkptStoreCallback
from tests.integrations.huggingface_program import Options, Words, ending, notes, saving_of, trainer_of

SHORT = {"num_train_epochs": 2, "eval_strategy": "no"}
"""Of 18 steps."""


def train(options: Options, select: Any = None, *callbacks: Any, **more: Any) -> tuple[CkptStoreCallback, Trainer]:
    saving = saving_of(options)
    trainer = trainer_of(options, saving, *callbacks)
    saving.train(trainer, select, **more)
    return saving, trainer


def steps(folder: Path) -> list[int]:
    return [c.step for c in cs.open(folder / "store").checkpoints()]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def micro_batches(options: Options) -> int:
    return len([note for note in notes(options) if "step" in note])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- when it saves ---------------------------------------------------------------------------------------


def test_any_schedule(tmp_path: Path) -> None:
    """Named steps and ranges, the state before any step among them; Trainer itself writes nothing."""
    options = Options(str(tmp_path), "at(0, 1, 5, '8-14/3')", SHORT | {"save_strategy": "steps", "save_steps": 2})
    saving, trainer = train(options)

    assert steps(tmp_path) == [0, 1, 5, 8, 11, 14, 18]
    assert not list(tmp_path.glob("trainer/checkpoint*"))
    assert trainer.args.save_strategy == "steps"
    assert saving.checkpointer is not None
    assert saving.checkpointer.stats().saves == 7


def test_the_state_before_any_step(tmp_path: Path) -> None:
    options = Options(str(tmp_path), "at(0)", SHORT)
    untrained = weights(trainer_of(options).model)
    train(options)

    found = trainer_of(options)
    nn.init.zeros_(found.model.lm_head.weight)
    cs.open(tmp_path / "store").load("step:0", into={"model": found.model}, strict="parts")
    assert same(weights(found.model), untrained)


def test_without_a_schedule_the_arguments_say_when(tmp_path: Path) -> None:
    """save_strategy, save_steps and save_total_limit mean what they always did."""
    options = Options(
        str(tmp_path), "", SHORT | {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}, {"final": False}
    )
    saved: list[cs.Saved] = []
    train(Options(options.folder, "", options.arguments, options.more | {"on_saved": saved.append}))

    assert [each.checkpoint.step for each in saved] == [5, 10, 15, 18]
    assert {each.checkpoint.reasons for each in saved} == {("the Trainer's save_strategy",)}
    assert steps(tmp_path) == [10, 15, 18]


def test_at_the_ends_of_epochs_with_what_was_measured(tmp_path: Path) -> None:
    train(Options(str(tmp_path), "", {"save_strategy": "epoch", "num_train_epochs": 2}))

    found = cs.open(tmp_path / "store").checkpoints()
    assert [(c.step, c.epoch) for c in found] == [(9, 1), (18, 2)]
    assert all(c.metrics.keys() >= {"loss", "eval_loss"} for c in found)


def test_a_callback_asks(tmp_path: Path) -> None:
    """``control.should_save`` of somebody else is obeyed beside a schedule."""

    class Asking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step in (4, 9)

    train(Options(str(tmp_path), "at(6)", SHORT), None, Asking())

    assert steps(tmp_path) == [4, 6, 9, 18]


# -- the best --------------------------------------------------------------------------------------------

RISING = {"num_train_epochs": 4, "load_best_model_at_end": True, "lr_scheduler_type": "constant"}
"""It learns its few samples by heart, and others get worse."""


@pytest.mark.parametrize("keep", [None, cs.last(1)])
def test_the_best_is_loaded_at_the_end(tmp_path: Path, keep: Any) -> None:
    """Where it is not the last; it stays whatever else goes."""
    options = Options(str(tmp_path), "every(epochs=1)", RISING | {"save_strategy": "epoch"}, {"keep": keep})
    _, trainer = train(options)

    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    store = cs.open(tmp_path / "store")
    found = store.resolve("best:eval_loss")
    assert min(losses) < losses[-1]
    assert found.metrics["eval_loss"] == min(losses) == trainer.state.best_metric
    assert steps(tmp_path) == ([9, 18, 27, 36] if keep is None else [found.step, 36])
    at_end = weights(trainer.model)
    store.load("latest", into={"model": trainer.model}, strict="parts")
    assert not same(weights(trainer.model), at_end)
    store.load(found.id, into={"model": trainer.model}, strict="parts")
    assert same(weights(trainer.model), at_end)
    assert str(trainer.state.best_model_checkpoint).endswith(found.id)


def test_greater_is_better(tmp_path: Path) -> None:
    """A metric whose name doesn't tell is recorded with the mode that the arguments give."""
    arguments = {"metric_for_best_model": "loss", "greater_is_better": True, "save_strategy": "epoch"}
    _, trainer = train(Options(str(tmp_path), "", RISING | arguments))

    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = cs.open(tmp_path / "store").resolve("best:eval_loss")
    assert best.modes["eval_loss"] == "max"
    assert best.metrics["eval_loss"] == max(losses)
    assert trainer.state.best_global_step == best.step


# -- going on --------------------------------------------------------------------------------------------


def test_a_run_that_is_over_stays_so(tmp_path: Path) -> None:
    """In the midst of an epoch, too; with more steps it goes on."""
    options = Options(str(tmp_path), "every(steps=5)", SHORT | {"max_steps": 12})
    _, trainer = train(options)
    _, again = train(options)

    assert micro_batches(options) == 12
    assert again.state.global_step == 12
    assert same(weights(again.model), weights(trainer.model))
    assert steps(tmp_path) == [5, 10, 12]
    with pytest.warns(UserWarning, match="max_steps is 14 here and was 12"):
        _, longer = train(Options(str(tmp_path), "every(steps=5)", SHORT | {"max_steps": 14}))
    assert longer.state.global_step == 14
    assert micro_batches(options) == 14


def test_a_run_that_was_stopped_early_stays_so(tmp_path: Path) -> None:
    """Unless somebody says where to go on."""
    arguments = RISING | {"save_strategy": "epoch", "metric_for_best_model": "loss"}
    options = Options(str(tmp_path), "", arguments | {"num_train_epochs": 9}, patience=1)
    _, trainer = train(options)
    stopped_at = trainer.state.global_step
    once = micro_batches(options)
    _, again = train(options)

    assert stopped_at < 81
    assert micro_batches(options) == once
    assert again.state.global_step == stopped_at
    _, forced = train(options, f"step:{stopped_at}")
    assert forced.state.global_step > stopped_at


def test_patience_goes_on(tmp_path: Path) -> None:
    """Of the evaluations without a better result, those before count after a resume, too."""
    arguments = RISING | {"save_strategy": "epoch", "num_train_epochs": 12}
    options = Options(str(tmp_path), "", arguments, patience=3)
    _, trainer = train(options)
    stopped_at = trainer.state.global_step
    _, again = train(options, f"step:{stopped_at - 9}")

    assert stopped_at < 12 * 9
    assert again.state.global_step == stopped_at


def test_the_first_evaluation_is_of_the_start(tmp_path: Path) -> None:
    """With eval_on_start a resumed run doesn't evaluate once more; the log is that of the whole run."""
    options = Options(str(tmp_path), "at(5)", SHORT | {"eval_strategy": "epoch", "eval_on_start": True})
    _, whole = train(options)
    _, again = train(options, "step:5")

    assert {**ending(again), "random": 0} == {**ending(whole), "random": 0}


def test_what_is_read_is_told_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set or a sampler with ``set_epoch``."""
    told: list[int] = []
    monkeypatch.setattr(Words, "set_epoch", lambda self, epoch: told.append(epoch), raising=False)
    arguments = SHORT | {"train_sampling_strategy": "sequential"}
    train(Options(str(tmp_path), "at(12)", arguments))
    train(Options(str(tmp_path), "at(12)", arguments), "step:12")

    assert told == [0, 1, 1]


def test_from_a_selector_and_from_elsewhere(tmp_path: Path) -> None:
    options = Options(str(tmp_path), "every(steps=6)", SHORT)
    _, whole = train(options)
    _, again = train(options, "step:6")
    other = Options(str(tmp_path / "other"), "every(steps=6)", SHORT)
    (tmp_path / "other").mkdir()
    _, moved = train(other, str(tmp_path / "store"))

    assert steps(tmp_path) == [6, 12, 18, 12, 18]
    assert {**ending(again), "random": 0} == {**ending(whole), "random": 0}
    assert moved.state.global_step == 18
    with pytest.raises(cs.NotFoundError, match="step:7"):
        train(options, "step:7")
    with pytest.raises(cs.ExistsError):
        train(options, False)


@pytest.mark.parametrize("which", ["model.safetensors", "part-00000.json"])
def test_a_damaged_one_is_left_for_the_one_before(tmp_path: Path, which: str) -> None:
    options = Options(str(tmp_path), "every(steps=6)", SHORT)
    _, whole = train(options)
    newest = cs.open(tmp_path / "store").resolve("latest")
    path = tmp_path / "store" / "checkpoints" / newest.id / which
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.warns(cs.FallbackWarning, match=newest.id):
        _, again = train(options)

    resumed = [note["resumed"] for note in notes(options) if "resumed" in note]
    assert resumed == [None, 12]
    assert {**ending(again), "random": 0} == {**ending(whole), "random": 0}
    with pytest.raises((cs.IntegrityError, cs.FormatError), match=newest.id):
        train(options, newest.id)


def test_a_scaler_is_saved_with_the_rest(tmp_path: Path) -> None:
    options = Options(str(tmp_path), "at(7)", SHORT)
    found = []
    for _ in range(2):
        saving = saving_of(options)
        trainer = trainer_of(options, saving)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)
        saving.train(trainer, "step:7" if found else None, check=True)
        found.append(trainer.accelerator.scaler.state_dict())

    assert found[0] == found[1]
    assert found[0]["scale"] == 16.0


# -- what fails, and what is refused ---------------------------------------------------------------------


def test_failed_saves_are_counted(tmp_path: Path) -> None:
    """Training goes on after a failed save, and ends after max_failures of them."""

    class Breaking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                shutil.rmtree(tmp_path / "store")
                (tmp_path / "store").write_text("in the way")

    failed: list[cs.Failed] = []
    more = {"max_failures": 2, "mode": "sync", "on_failed": failed.append}
    with pytest.warns(RuntimeWarning, match="training goes on"), pytest.raises(cs.CheckpointError) as caught:
        train(Options(str(tmp_path), "every(steps=2)", SHORT, more), None, Breaking())

    assert [each.step for each in failed[:2]] == [4, 6]
    assert "max_failures=2" in caught.value.__notes__[0]


def test_training_began_elsewhere(tmp_path: Path) -> None:
    options = Options(str(tmp_path), arguments=SHORT)
    trainer = trainer_of(options, saving_of(options))
    with pytest.raises(cs.StateError, match=r"call saving\.train\(trainer\)"):
        trainer.train()


def test_a_checkpoint_of_another_kind(tmp_path: Path) -> None:
    with cs.open(tmp_path / "store") as store:
        store.save({"model": nn.Linear(2, 2)}, step=3)
    with pytest.raises(cs.StateError, match="was not saved from a Trainer"):
        train(Options(str(tmp_path), arguments=SHORT))


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size=True"),
        ({"ignore_data_skip": True}, {}, "ignore_data_skip=True"),
        ({}, {"resume_from_checkpoint": "there"}, "say where to go on as"),
        ({}, {"trial": {}}, "a store of its own"),
    ],
)
def test_trainers_that_can_not_go_on(tmp_path: Path, arguments: Any, given: Any, said: str) -> None:
    with pytest.raises(cs.FormatError, match=said):
        train(Options(str(tmp_path), arguments=SHORT | arguments), None, **given)
    assert not (tmp_path / "store").exists()


def test_options_that_can_not_be() -> None:
    with pytest.raises(cs.FormatError, match="evaluate: no option of CkptStoreCallback; the Trainer says so"):
        CkptStoreCallback("memory://hf", evaluate="every(steps=2)")
    with pytest.raises(cs.FormatError, match=r"retries: no option of CkptStoreCallback; known: .*max_failures"):
        CkptStoreCallback("memory://hf", retries=2)
    with pytest.raises(cs.FormatError, match="keep: the store is open already"):
        CkptStoreCallback(cs.open("memory://hf"), keep=cs.last(2))
    with pytest.raises(cs.FormatError):
        CkptStoreCallback("memory://hf", save="now and then")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ckptstore.integrations.huggingface"
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'ckptstore\[huggingface\]'"):
        importlib.import_module(name)
