"""A small run of the Hugging Face Trainer as a user would write it, to be run whole, or broken off anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from ckptstore.integrations.huggingface import CkptStoreCallback

WORDS, LENGTH = 40, 8


@dataclass(frozen=True)
class Options:
    """What a run is like, and where it is broken off.

    Attributes:
        save: the callback's; "" leaves it to the arguments.
        arguments: of ``TrainingArguments``, beside those that all runs have.
        patience: of early stopping, None without it.
        end_by: "exit" (the process is gone at once), "term", "int", "raise", or None for the whole run.
        end_at: after that step.
        where: "step", "backward" (in the midst of the step after), "evaluation".
    """

    folder: str
    save: str = "every(steps=3)"
    arguments: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    patience: int | None = None
    samples: int = 27
    stream: bool = False
    check: bool = False
    plain: bool = False
    end_by: str | None = None
    end_at: int = -1
    where: str = "step"

    @property
    def out(self) -> Path:
        return Path(self.folder, "notes")


class Words(Dataset[dict[str, Any]]):
    """Sample ``index`` tells its number; where it is loaded in the training process, one word is random."""

    def __init__(self, count: int, *, noisy: bool) -> None:
        made = torch.Generator().manual_seed(count)
        self.words = torch.randint(WORDS, (count, LENGTH), generator=made)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = self.words[index].clone()
        if self.noisy:
            words[0] = torch.randint(WORDS, (1,)).item()
        return {"input_ids": words, "labels": words, "index": index}


class Stream(IterableDataset[dict[str, Any]]):
    """The same, one after the other."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def __iter__(self) -> Any:
        yield from (self.words[index] for index in range(len(self.words)))


class Broken(Exception):
    """The run is to end here."""


class Breaking(TrainerCallback):  # type: ignore[misc]
    """Breaks a run off, once."""

    def __init__(self, options: Options) -> None:
        self.options, self.broken = options, False

    def at(self, where: str, step: int) -> None:
        options = self.options
        if self.broken or options.end_by is None or (options.where, options.end_at) != (where, step):
            return
        self.broken = True
        note(options, broken=step, where=where)
        if options.end_by == "exit":
            os._exit(9)
        if options.end_by == "raise":
            raise Broken
        os.kill(os.getpid(), {"term": signal.SIGTERM, "int": signal.SIGINT}[options.end_by])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at("step", state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at("evaluation", state.global_step)


class Drawing(TrainerCallback):  # type: ignore[misc]
    """Uses random numbers where other callbacks may."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.rand(1)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.rand(1)


class Noting(Trainer):  # type: ignore[misc]
    """Notes what each micro batch reads and loses."""

    breaking: Breaking

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        index = inputs.pop("index").tolist()
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.breaking.at("backward", self.state.global_step)
            note(self.breaking.options, step=self.state.global_step + 1, index=index, loss=found.item().hex())
        return found


def note(options: Options, **fields: Any) -> None:
    with options.out.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def trainer_of(options: Options, *callbacks: Any) -> Noting:
    torch.set_num_threads(1)
    given = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 2,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "seed": 3,
    } | options.arguments
    arguments = TrainingArguments(
        str(Path(options.folder, "trainer")),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **given,
    )
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    words = Words(options.samples, noisy=not arguments.dataloader_num_workers)
    made = Noting(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=Stream(words) if options.stream else words,
        eval_dataset=Words(8, noisy=False),
        callbacks=[*callbacks],
    )
    made.breaking = Breaking(options)
    if options.patience is not None:
        made.add_callback(EarlyStoppingCallback(options.patience))
    made.add_callback(Drawing())
    made.add_callback(made.breaking)
    return made


def saving_of(options: Options) -> CkptStoreCallback:
    return CkptStoreCallback(
        str(Path(options.folder, "store")),
        save=options.save or None,
        verbose=False,
        poll=None,
        on_resumed=lambda event: note(options, resumed=event.checkpoint.step if event else None),
        **options.more,
    )


def run(options: Options) -> None:
    """A run, to its end."""
    if options.plain:
        trainer = trainer_of(options)
        trainer.train()
    else:
        saving = saving_of(options)
        trainer = trainer_of(options, saving)
        saving.train(trainer, check=options.check)
        assert saving.checkpointer is not None
    note(options, end=ending(trainer))


def ending(trainer: Trainer) -> dict[str, Any]:
    """What a run ends with: a digest of all that was learnt, the log, random numbers."""
    found = hashlib.sha256()
    states = [trainer.optimizer.state[p] for p in trainer.model.parameters()]
    for tensor in [*trainer.model.state_dict().values(), *(v for state in states for v in state.values())]:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    found.update(repr(trainer.lr_scheduler.state_dict()).encode())
    state = trainer.state
    told = [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in state.log_history]
    # The mean over the steps of one process, which a resumed run can't have.
    return {
        "digest": found.hexdigest(),
        "log": [line for line in told if "train_loss" not in line],
        "best": [state.best_metric],
        "step": state.global_step,
        "epoch": state.epoch,
        "flos": state.total_flos,
        "random": torch.rand(1).item(),
    }


def main(fields: dict[str, Any]) -> None:
    """Run in a process of its own."""
    try:
        run(Options(**fields))
    except Broken:
        raise SystemExit(7) from None


def notes(options: Options) -> list[dict[str, Any]]:
    """What the runs noted, as far as they came."""
    return [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
