"""From each program to a store in one call: what the real frameworks, and files of older programs, leave on disk."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import ckptstore as cs
from ckptstore.errors import FormatError
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.layouts import find
from tests.tools.older_systems import (
    Run,
    Tiers,
    component_folder,
    legacy_folder,
    milestone,
    state_folder,
    weights_folder,
)
from tests.tools.test_layouts import names, read, steps


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit for bit, whatever kinds of containers they are in."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "tobytes"):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return bool(one == other or one != one)


def loaded(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def check(store: cs.Store, checkpoint: cs.Checkpoint, files: Mapping[str, Path]) -> None:
    """The checkpoint holds what is in the files."""
    state = store.load(checkpoint.id)
    for component, path in files.items():
        expected = loaded(path)
        if component == "":
            assert all(same(expected[name], state[name]) for name in expected)
        else:
            assert same(expected, state[component]), component


def imported(path: Path, store: cs.Store) -> list[cs.Checkpoint]:
    report = cs.import_from(path, store)
    assert not [item.problem for item in report.items if item.problem]
    assert report.checkpoints == store.checkpoints()
    return list(report.checkpoints)


@pytest.fixture
def store(store_path: Path, sandbox: object) -> cs.Store:
    return cs.open(store_path)


# -- Hugging Face ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The output of Trainer, and the model at its end; saved at 6, 12 and 18, nine steps an epoch."""
    from tests.integrations.huggingface_program import Options, trainer_of

    folder = tmp_path_factory.mktemp("huggingface")
    arguments = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    trainer = trainer_of(Options(str(folder), arguments=arguments | {"num_train_epochs": 2}))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder / "trainer", trainer.model


def test_what_trainer_leaves(huggingface: tuple[Path, Any]) -> None:
    """Steps, epochs and metrics as Trainer recorded them; the model at the end is the last checkpoint's."""
    found = find(huggingface[0])

    assert steps(found) == [6, 12, 18]
    assert [one.epoch for one in found] == [0, 1, 2]
    assert [sorted(one.metrics) for one in found] == [["eval_loss", "loss"]] * 3
    assert all(set(one.files) == {"model", "optimizer", "scheduler", "rng_state"} for one in found)
    state = found[-1].values["trainer_state"]
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert [one.metrics["eval_loss"] for one in found] == evaluated
    assert set(found[0].values) == {"trainer_state", "config", "generation_config"}
    assert found[0].left_out == {"training_args.bin": "a pickled object of the program that wrote it"}
    assert "step 18" in found[-1].left_out["model.safetensors"]


def test_trainers_folders_that_are_damaged(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    """A state that can't be read leaves the step to the name, and no parent's; what lacks weights is left out."""
    output = tmp_path / "checkpoint-999"
    shutil.copytree(huggingface[0], output)
    for step in (6, 18):
        (output / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step":')
    (output / "checkpoint-12").rename(output / "checkpoint-7")
    shutil.copytree(output / "checkpoint-18", output / "good")
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-9")
    (output / "checkpoint-9" / "model.safetensors").unlink()

    found = find(output)

    assert steps(found) == [6, 12, 18]
    assert found[0].metrics == {}
    assert "no valid JSON" in found[0].left_out["trainer_state.json"]
    assert "holds no weights" in found[-1].left_out["checkpoint-9"]
    assert "--step" in found[-1].left_out["good"]
    (good,) = find(output / "good")
    assert good.step is None


def test_weights_that_are_newer_than_all_checkpoints(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(huggingface[0], output)
    shutil.rmtree(output / "checkpoint-18")

    found = find(output)

    assert [(one.path.name, one.step) for one in found[-2:]] == [("checkpoint-12", 12), ("run", 18)]
    assert "optimizer" not in found[-1].files


def test_a_sharded_model(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    """As save_pretrained writes it; by its folder and by its index, and named where a part of it is missing."""
    folder = tmp_path / "model"
    huggingface[1].save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2

    assert [(one.step, one.files) for one in find(folder)] == [(None, {"model": index})]
    assert find(index)[0].files == {"model": index}
    shards[1].unlink()
    with pytest.raises(FormatError, match=f"incomplete: .*{shards[1].name}: not there"):
        find(folder)


def test_from_trainer(huggingface: tuple[Path, Any], store: cs.Store) -> None:
    made = imported(huggingface[0], store)

    assert [(c.step, c.epoch) for c in made] == [(6, 0), (12, 1), (18, 2)]
    for found, checkpoint in zip(find(huggingface[0]), made, strict=True):
        check(store, checkpoint, found.files)
        assert checkpoint.metrics == found.metrics
    best = store.resolve("best:eval_loss")
    assert best.metrics["eval_loss"] == min(c.metrics["eval_loss"] for c in made)
    model = type(huggingface[1])(huggingface[1].config)
    model.load_state_dict(store.load("latest")["model"], strict=False)
    assert same(dict(model.state_dict()), dict(huggingface[1].state_dict()))


# -- Accelerate ------------------------------------------------------------------------------------------


class Counter:
    """An object of the user's own, as ``register_for_checkpointing`` takes it."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": torch.arange(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.fixture(scope="module")
def accelerate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and two optimizers, accumulated over two batches; four saves under automatic names."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    folder = tmp_path_factory.mktemp("accelerate")
    named = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=named, gradient_accumulation_steps=2)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    adam = torch.optim.AdamW(first.parameters())
    sgd = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 2)
    batches = DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=2, shuffle=True)
    first, second, adam, sgd, scheduler, batches = accelerator.prepare(first, second, adam, sgd, scheduler, batches)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    for _ in range(2):
        for number, (batch,) in enumerate(batches):
            with accelerator.accumulate(first):
                accelerator.backward(second(first(batch)).sum())
                for one in (adam, sgd, scheduler):
                    one.step()
                adam.zero_grad()
                sgd.zero_grad()
                counter.count += 1
            if number in (3, 5):
                accelerator.save_state()
    return folder


def test_what_accelerate_leaves(accelerate: Path, tmp_path: Path) -> None:
    """The number in a name counts saves, and random_states counts batches: the optimizer's own state tells."""
    found = find(accelerate)
    assert names(found) == [f"checkpoint_{number}" for number in range(4)]
    assert steps(found) == [None] * 4
    components = "model model_1 optimizer optimizer_1 scheduler random_states_0 custom_checkpoint_0".split()
    assert all(set(one.files) == set(components) for one in found)

    told = read_all(accelerate)
    assert steps(told) == [2, 3, 5, 6]
    batches = [loaded(one.files["random_states_0"])["step"] for one in told]
    assert batches == [4, 0, 4, 0]

    for name, step, epoch in (("step_20", 20, None), ("checkpoint-30", 30, None), ("epoch_4", None, 5)):
        path = tmp_path / name
        shutil.copytree(accelerate / "checkpoints" / "checkpoint_0", path)
        (one,) = find(path)
        assert (one.kind, one.step, one.epoch) == ("accelerate", step, epoch)
    (tmp_path / "step_20" / "sampler.bin").write_bytes(b"pickled")
    assert "sampler.bin" in find(tmp_path / "step_20")[0].left_out


def read_all(path: Path) -> list[Found]:
    """As ``read``, of states whose files are pickles by any name."""
    from ckptstore.tools.importing.told import settled, told

    return settled([(one, told(one, {name: loaded(file) for name, file in one.files.items()})) for one in find(path)])


def test_a_checkpoint_of_several_folders(accelerate: Path, tmp_path: Path) -> None:
    """As programs write it that save each model in a folder of its own."""
    path = tmp_path / "checkpoint-30"
    shutil.copytree(accelerate / "checkpoints" / "checkpoint_0", path)
    (path / "unet").mkdir()
    (path / "model.safetensors").rename(path / "unet" / "diffusion_pytorch_model.safetensors")
    (path / "model_1.safetensors").unlink()

    (found,) = find(tmp_path)

    assert found.files["unet"].name == "diffusion_pytorch_model.safetensors"
    assert "model" not in found.files


def test_from_accelerate(accelerate: Path, store: cs.Store) -> None:
    made = imported(accelerate, store)

    assert [c.step for c in made] == [2, 3, 5, 6]
    for found, checkpoint in zip(read_all(accelerate), made, strict=True):
        check(store, checkpoint, found.files)


def test_back_to_accelerate(accelerate: Path, store: cs.Store, tmp_path: Path) -> None:
    """Its own loaders read what was imported and exported."""
    from accelerate import load_checkpoint_in_model

    latest = imported(accelerate, store)[-1]
    kept = store.load(latest.id)
    for name, model in (("model", torch.nn.Linear(3, 2)), ("model_1", torch.nn.Linear(2, 1))):
        cs.export(store, latest.id, tmp_path / name, to="hf", only=[f"{name}/*"])
        load_checkpoint_in_model(model, tmp_path / name)
        assert same(model.state_dict(), kept[name])


# -- Lightning -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of eight steps: one callback saves at each validation, and the last, another one each five steps."""
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.integrations.lightning_program import Model, Options, quiet

    folder = tmp_path_factory.mktemp("lightning")
    with warnings.catch_warnings():
        quiet()
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            max_epochs=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                ModelCheckpoint(monitor="val_loss", save_top_k=-1, save_last=True),
                ModelCheckpoint(every_n_train_steps=5, save_top_k=-1, filename="each-{step}"),
            ],
        )
        trainer.fit(Model(Options(None, str(folder / "notes"))))
    return folder


def test_what_lightning_leaves(lightning: Path) -> None:
    """The epochs that were over, the metric of the file's own save, and last.ckpt as what it is."""
    found = find(lightning)
    assert all(one.kind == "lightning" for one in found)

    told = read(lightning)
    assert [(one.path.name, one.step, one.epoch) for one in told] == [
        ("each-step=5.ckpt", 5, 0),
        ("epoch=0-step=8.ckpt", 8, 1),
        ("each-step=10.ckpt", 10, 1),
        ("each-step=15.ckpt", 15, 1),
        ("epoch=1-step=16.ckpt", 16, 2),
    ]
    assert [list(one.metrics) for one in told] == [[], ["val_loss"], [], [], ["val_loss"]]
    content = loaded(told[4].path)
    assert content["epoch"] == 1
    (score,) = {c["current_score"].item() for c in content["callbacks"].values() if c["monitor"]}
    assert told[4].metrics["val_loss"] == score
    assert told[4].left_out["last.ckpt"] == "holds the same as epoch=1-step=16.ckpt"
    version = lightning / "lightning_logs" / "version_0"
    assert find(version) == find(version / "checkpoints") == found


def test_back_to_lightning(lightning: Path, store: cs.Store, tmp_path: Path) -> None:
    """Its trainer goes on from what was imported and exported as from its own file."""
    from lightning.pytorch import Trainer

    from tests.integrations.lightning_program import Model, Options, quiet

    (own,) = lightning.rglob("epoch=0-step=8.ckpt")
    saved = next(c for c in imported(lightning, store) if c.step == 8)
    cs.export(store, saved.id, tmp_path / "exported.ckpt", to="torch")
    ends = []
    for path in (own, tmp_path / "exported.ckpt"):
        with warnings.catch_warnings():
            quiet()
            # What the file of Lightning's doesn't hold.
            torch.manual_seed(0)
            model = Model(Options(None, str(tmp_path / "notes")))
            trainer = Trainer(
                accelerator="cpu",
                default_root_dir=tmp_path,
                max_epochs=2,
                enable_progress_bar=False,
                enable_model_summary=False,
                logger=False,
            )
            trainer.fit(model, ckpt_path=path)
        assert trainer.global_step == 16
        ends.append([model.state_dict(), trainer.optimizers[0].state_dict()])
    assert same(*ends)


def test_lightnings_link_to_the_last(lightning: Path, tmp_path: Path) -> None:
    """Which it makes with save_last="link"."""
    for path in lightning.rglob("*.ckpt"):
        shutil.copy(path, tmp_path)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("epoch=1-step=16.ckpt")

    found = find(tmp_path)

    assert len(found) == 5
    assert found[-1].left_out == {"last.ckpt": "a link to epoch=1-step=16.ckpt"}
    assert find(tmp_path / "last.ckpt")[0].kind == "lightning"


def test_lightnings_last_that_is_newer(lightning: Path, tmp_path: Path) -> None:
    """It is a checkpoint where no other one holds the same."""
    for name in ("last.ckpt", "epoch=0-step=8.ckpt"):
        shutil.copy(next(lightning.rglob(name)), tmp_path)

    found = read(tmp_path)
    assert [(one.path.name, one.step) for one in found] == [("epoch=0-step=8.ckpt", 8), ("last.ckpt", 16)]
    assert found[1].metrics == read(lightning)[-1].metrics


def test_two_runs_of_lightning_in_one_folder(lightning: Path, tmp_path: Path) -> None:
    """Files of one step are one save only if the weights are the same."""
    for name in ("epoch=0-step=8.ckpt", "epoch=0-step=8-v1.ckpt", "best.ckpt"):
        shutil.copy(next(lightning.rglob("epoch=0-step=8.ckpt")), tmp_path / name)
    other = loaded(tmp_path / "epoch=0-step=8-v1.ckpt")
    other["state_dict"]["net.0.weight"][0, 0] += 1
    torch.save(other, tmp_path / "epoch=0-step=8-v1.ckpt")

    found = read(tmp_path)

    assert names(found) == ["best.ckpt", "epoch=0-step=8-v1.ckpt"]
    assert found[0].left_out["epoch=0-step=8.ckpt"] == "holds the same as best.ckpt"
    assert found[0].metrics["val_loss"] > 0


def test_from_lightning(lightning: Path, store: cs.Store) -> None:
    made = imported(lightning, store)

    assert [(c.step, c.epoch) for c in made] == [(5, 0), (8, 1), (10, 1), (15, 1), (16, 2)]
    for found, checkpoint in zip(read(lightning), made, strict=True):
        check(store, checkpoint, {"": found.path})
        assert checkpoint.metrics == found.metrics


# -- older programs --------------------------------------------------------------------------------------


def test_from_tiers(tmp_path: Path, store: cs.Store) -> None:
    run, tiers = Run(), Tiers(tmp_path / "checkpoints")
    for step in (50, 99, 150, 199):
        tiers.save(run.train(), step, best=step == 150)
    tiers.emergency(run.train(), 231)

    made = imported(tmp_path, store)

    assert [(c.step, c.epoch) for c in made] == [(50, 0), (99, 1), (150, 1), (199, 2), (230, 2)]
    for found, checkpoint in zip(read(tmp_path), made, strict=True):
        check(store, checkpoint, {"": found.path})
    assert store.resolve("best:val_loss").step == 199
    assert store.resolve("epoch:2").step == 230
    assert "interrupted before step 231" in made[-1].reasons
    (fresh := Run()).resume(store.load("latest"))
    assert same(fresh.weights(), run.weights())
    assert same(fresh.optimizer.state_dict(), run.optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:the checkpoint has")
def test_a_run_goes_on_where_another_program_left_off(tmp_path: Path, store: cs.Store, store_path: Path) -> None:
    """The next line after the import is resume()."""
    old = Run().train(3)
    Tiers(tmp_path / "checkpoints").save(old, 99)
    imported(tmp_path / "checkpoints", store)
    new = Run()

    with cs.Checkpointer(store_path, {"model": new.model, "optimizer": new.optimizer}, verbose=False) as checkpointer:
        resumed = checkpointer.resume()

    assert resumed is not None
    assert (checkpointer.progress.step, checkpointer.progress.epoch) == (99, 1)
    assert same(new.weights(), old.weights())
    assert same(new.optimizer.state_dict(), old.optimizer.state_dict())


def test_from_milestones(tmp_path: Path, store: cs.Store) -> None:
    run = Run()
    paths = [milestone(tmp_path, run.train(), step, 10**9 * n, f"{n}.0B") for step, n in ((900, 1), (1000, 2))]
    paths[1].with_suffix(".json").write_text("{")

    made = imported(tmp_path, store)

    assert [c.step for c in made] == [900, 1000]
    assert store.resolve("milestone:1B") == made[0]
    for checkpoint, path in zip(made, paths, strict=True):
        check(store, checkpoint, {"": path})


def test_from_state_folders(tmp_path: Path, store: cs.Store) -> None:
    run = Run()
    weights_folder(tmp_path / "checkpoint-0", run)
    paths = [state_folder(tmp_path, run.train(), step, epoch=step // 50) for step in (9, 100)]
    weights_folder(tmp_path / "checkpoint-tmp-9", run)

    made = imported(tmp_path, store)

    assert [(c.step, c.epoch) for c in made] == [(0, None), (9, 0), (100, 2)]
    for checkpoint, path in zip(made[1:], paths, strict=True):
        check(store, checkpoint, {"model": path / "model.safetensors", "": path / "training_state.pt"})
    (fresh := Run()).resume(store.load("latest"))
    assert same(fresh.train(2).weights(), run.train(2).weights())


def test_from_explicit_steps(huggingface: tuple[Path, Any], tmp_path: Path, store: cs.Store) -> None:
    """Trainer's folders at steps of one's own, weights before the first and after the last one written by hand."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(huggingface[0], checkpoints, ignore=shutil.ignore_patterns("*.safetensors.index", "runs"))
    for path in [path for path in checkpoints.iterdir() if path.is_file()]:
        path.unlink()
    for name in ("checkpoint-0", "final"):
        weights_folder(checkpoints / name, Run())

    made = imported(tmp_path, store)

    assert [c.step for c in made] == [0, 6, 12, 18]
    check(store, made[0], {"model": checkpoints / "checkpoint-0" / "model.safetensors"})
    assert "--step" in find(tmp_path)[-1].left_out["final"]


def test_from_folders_below_checkpoints(tmp_path: Path, store: cs.Store) -> None:
    run = Run()
    old = legacy_folder(tmp_path, run.train(), 100)
    new = component_folder(tmp_path, run.train(), 1000)

    made = imported(tmp_path, store)

    assert [c.step for c in made] == [100, 1000]
    assert made[1].metrics == {"eval_loss": 1 / 1001}
    check(store, made[0], {"model": old / "model.safetensors", "": old / "training_state.pt"})
    files = {"model": "pytorch_model.bin", "optimizer": "optimizer_state.pt", "dataset": "dataset_state.pt"}
    check(store, made[1], {name: new / file for name, file in files.items()})
    assert store.load("latest")["manifest"]["world_size"] == 2
