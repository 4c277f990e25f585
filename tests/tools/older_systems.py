"""Files as five training programs write them, after their documents: the same names, keys and order of writing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


class Run:
    """A tiny training, from which each state that is saved differs."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.steps = 0

    def train(self, steps: int = 1) -> Run:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.full((4, 3), 0.5)).pow(2).sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.steps += 1
        return self

    def resume(self, state: dict[str, Any]) -> None:
        """Go on as whoever saved ``state``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "lr_scheduler" in state:
            self.scheduler.load_state_dict(state["lr_scheduler"])

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def random_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


class Tiers:
    """latest.pt with a backup, rolling files, one per epoch, the best, and emergency files. Steps count from 0."""

    def __init__(self, folder: Path, steps_per_epoch: int = 100) -> None:
        self.folder, self.steps_per_epoch, self.clock = folder, steps_per_epoch, 1_700_000_000.0
        folder.mkdir(parents=True, exist_ok=True)

    def content(self, run: Run, step: int, **changes: Any) -> dict[str, Any]:
        self.clock += 60.25
        return {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "train_loss": 2.0 - step / 1e4,
            "val_loss": 2.5 - step / 1e4,
            "rng_state": random_states() | {"torch_cuda": None},
            "dataloader_state": {"train_curr_shard": 1, "train_curr_pos": step, "val_curr_shard": 0, "val_curr_pos": 0},
            "args": {"lr": 0.01, "steps_per_epoch": self.steps_per_epoch},
            "timestamp": self.clock,
        } | changes

    def save(self, run: Run, step: int, *, best: bool = False, **changes: Any) -> None:
        content = self.content(run, step, **changes)
        latest = self.folder / "latest.pt"
        if latest.exists():
            latest.replace(self.folder / "latest_backup.pt")
        torch.save(content, latest)
        torch.save(content, self.folder / f"rolling_step_{step:06d}.pt")
        if (step + 1) % self.steps_per_epoch == 0:
            torch.save(content, self.folder / f"epoch_{content['epoch']:05d}.pt")
        if best:
            torch.save(content, self.folder / "best_model.pt")

    def emergency(self, run: Run, step: int) -> None:
        """As the later versions do it: before ``step``, and without a loss."""
        content = self.content(run, step, train_loss=0.0, val_loss=float("inf"))
        (self.folder / "latest.pt").replace(self.folder / "latest_backup.pt")
        torch.save(content, self.folder / "latest.pt")
        torch.save(content, self.folder / f"emergency_step_{step:06d}_20251103_101502.pt")


def milestone(folder: Path, run: Run, step: int, params: int, text: str, *, beside: bool = True) -> Path:
    """checkpoint_1.0B_step_10000.pt and .json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint_{text}_step_{step}.pt"
    facts = {
        "global_step": step,
        "current_params": params + 5,
        "target_milestone": params,
        "milestones": [10**9, 5 * 10**9],
        "reached_milestones": [params],
    }
    content = {"model_state_dict": run.model.state_dict(), "optimizer_state_dict": run.optimizer.state_dict()}
    torch.save(content | facts | {"metadata": {"note": "grown"}}, path)
    if beside:
        names = {"filename": path.name, "param_count_formatted": text, "milestone_str": text}
        path.with_suffix(".json").write_text(json.dumps(names | facts))
    return path


def state_folder(folder: Path, run: Run, step: int, *, epoch: int = 0, metadata: bool = True) -> Path:
    """checkpoint-N with what ``save_pretrained`` leaves, training_state.pt, and metadata.json since version 2."""
    path = weights_folder(folder / f"checkpoint-{step}", run)
    state = {
        "global_step": step,
        "epoch": epoch,
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.scheduler.state_dict(),
        "git_commit_hash": "0123abc",
    }
    torch.save(state | {f"{name}_rng": value for name, value in random_states().items()}, path / "training_state.pt")
    if metadata:
        tokens = {"total_tokens_processed": 512 * step, "tokens_per_step": 512}
        facts = {"experiment_name": "exp0", "global_step": step, "epoch": epoch, "timestamp": "2025-08-01T10:00:00"}
        (path / "metadata.json").write_text(json.dumps(facts | {"token_metrics": tokens, "wandb_run_id": None}))
    return path


def weights_folder(path: Path, run: Run, *, pickled: bool = False) -> Path:
    """Weights and no more: as checkpoint-0 and final."""
    path.mkdir(parents=True)
    if pickled:
        torch.save(run.model.state_dict(), path / "pytorch_model.bin")
    else:
        save_file(run.weights(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "linear"}')
    return path


def legacy_folder(output: Path, run: Run, step: int) -> Path:
    """output/checkpoints/checkpoint-N: model files and one training_state.pt."""
    path = weights_folder(output / "checkpoints" / f"checkpoint-{step}", run)
    state = {"optimizer": run.optimizer.state_dict(), "lr_scheduler": run.scheduler.state_dict(), "global_step": step}
    torch.save(state, path / "training_state.pt")
    return path


def component_folder(output: Path, run: Run, step: int, *, hour: int = 10) -> Path:
    """The same program later: a file for each component, a manifest, and metrics."""
    path = weights_folder(output / "checkpoints" / f"checkpoint-{step}", run, pickled=True)
    torch.save(run.optimizer.state_dict(), path / "optimizer_state.pt")
    torch.save(run.scheduler.state_dict(), path / "scheduler_state.pt")
    torch.save({"global_step": step, "epoch_start_step": 0}, path / "trainer_state.pt")
    torch.save({"position": 4 * step}, path / "dataset_state.pt")
    for rank in range(2):
        torch.save({"torch": torch.get_rng_state()}, path / f"rng_state_rank_{rank}.pt")
    torch.save({"best_checkpoints": []}, path / "checkpoint_metadata.pt")
    keys = ("model", "optimizer", "scheduler", "trainer", "dataset", "rng")
    components = {key: {"key": key, "sharing_pattern": "global", "ranks": [0], "checksum": None} for key in keys}
    manifest = {"checkpoint_path": str(path), "world_size": 2, "timestamp": f"2026-01-02T{hour:02d}:00:00"}
    (path / "checkpoint_manifest.json").write_text(json.dumps(manifest | {"components": components}))
    (path / "eval_metrics.json").write_text(json.dumps({"eval_loss": 1.0 / (step + 1), "eval_runtime": 3.0}))
    return path
