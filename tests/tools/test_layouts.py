"""What the files and folders of training programs are found as, whatever else lies there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptstore.errors import CheckpointError, FormatError, NotFoundError, StorageError
from ckptstore.tools.importing.folder import JSON_LIMIT_BYTES, by_numbers
from ckptstore.tools.importing.found import Found
from ckptstore.tools.importing.huggingface import completed_epochs
from ckptstore.tools.importing.layouts import find
from ckptstore.tools.importing.told import settled, told
from tests.tools.older_systems import (
    Run,
    Tiers,
    component_folder,
    legacy_folder,
    milestone,
    state_folder,
    weights_folder,
)


def content(found: Found) -> dict[str, Any]:
    """The state of a checkpoint, as an importer has it."""
    state: dict[str, Any] = dict(found.values)
    for component, path in found.files.items():
        loaded = torch.load(path, weights_only=False) if path.is_file() and path.suffix != ".safetensors" else {}
        state |= loaded if component == "" else {component: loaded}
    return state


def read(path: Path) -> list[Found]:
    """What is found, with what the content tells."""
    return settled([(found, told(found, content(found))) for found in find(path)])


def steps(found: list[Found]) -> list[int | None]:
    return [one.step for one in found]


def names(found: list[Found]) -> list[str]:
    return [one.path.name for one in found]


@pytest.fixture
def run() -> Run:
    return Run().train()


# -- tiers of files ------------------------------------------------------------------------------------


def test_tiers_each_save_once(tmp_path: Path, run: Run) -> None:
    """latest.pt, its backup, the epoch's and the best one are roles of the rolling files."""
    tiers = Tiers(tmp_path)
    for step in (50, 99, 100, 150, 199):
        tiers.save(run.train(), step, best=step == 150)

    found = read(tmp_path)

    assert steps(found) == [50, 99, 100, 150, 199]
    assert names(found) == [f"rolling_step_{step:06d}.pt" for step in (50, 99, 100, 150, 199)]
    assert [one.epoch for one in found] == [0, 1, 1, 1, 2]
    assert [list(one.reasons) for one in found] == [[], ["epoch 1"], [], ["best val_loss"], ["epoch 2"]]
    assert found[1].metrics == {"train_loss": 2.0 - 0.0099, "val_loss": 2.5 - 0.0099}
    assert found[-1].left_out["latest.pt"] == "holds the same as rolling_step_000199.pt"
    assert all(one.created and one.created.year == 2023 for one in found)


def test_tiers_by_names_alone(tmp_path: Path, run: Run) -> None:
    """Without a look into the files rolling ones are in order; what only the content tells is said where."""
    tiers = Tiers(tmp_path)
    for step in (999_998, 999_999, 1_000_000):
        tiers.save(run, step)

    found = find(tmp_path)

    assert steps(found) == [999_998, 999_999, 1_000_000, None, None, None]
    assert names(found)[3:] == ["epoch_09999.pt", "latest.pt", "latest_backup.pt"]
    assert found[4].facts_in["step"] == "step"
    assert found[3].epoch == 10_000
    assert steps(read(tmp_path)) == [999_998, 999_999, 1_000_000]


def test_tiers_an_emergency_comes_before_its_step(tmp_path: Path, run: Run) -> None:
    """What is named for step 51 was saved before it, with a loss of 0 that is none; latest.pt is the same save."""
    tiers = Tiers(tmp_path)
    tiers.save(run, 40)
    tiers.emergency(run.train(), 51)

    found = read(tmp_path)

    assert steps(found) == [40, 50]
    assert found[1].path.name == "emergency_step_000051_20251103_101502.pt"
    assert found[1].metrics == {}
    assert found[1].reasons == ("interrupted before step 51",)
    assert "latest.pt" in found[1].left_out


def test_tiers_an_emergency_under_a_rolling_name(tmp_path: Path, run: Run) -> None:
    """The first version of that program kept it among the rolling ones: the loss of 0 tells."""
    tiers = Tiers(tmp_path)
    tiers.save(run, 40)
    tiers.save(run, 51, train_loss=0.0)

    assert steps(read(tmp_path)) == [40, 50]


def test_tiers_of_one_step_that_differ(tmp_path: Path, run: Run) -> None:
    """After a roll-back by hand the same step was trained again: nothing of both is lost."""
    tiers = Tiers(tmp_path)
    tiers.save(run.train(), 50, timestamp=1.5)
    kept = tmp_path.rename(tmp_path.with_name("kept"))
    tiers.folder = tmp_path
    tmp_path.mkdir()
    tiers.save(run.train(), 50, timestamp=1.5)
    (kept / "latest.pt").rename(tmp_path / "best_model.pt")

    assert sorted(names(read(tmp_path))) == ["best_model.pt", "rolling_step_000050.pt"]


def test_tiers_that_are_left(tmp_path: Path, run: Run) -> None:
    """Where the rolling files are gone, the others are checkpoints by themselves; what is empty or unfinished isn't."""
    tiers = Tiers(tmp_path)
    tiers.save(run, 99)
    tiers.save(run, 120, best=True)
    tiers.save(run, 130)
    for path in tmp_path.glob("rolling*"):
        path.unlink()
    (tmp_path / "latest.pt").write_bytes(b"")
    (tmp_path / "best_model.pt.tmp").write_bytes(b"half")

    found = read(tmp_path)

    assert [(one.path.name, one.step, one.epoch) for one in found] == [
        ("epoch_00000.pt", 99, 1),
        ("best_model.pt", 120, 1),
    ]
    assert found[-1].left_out["latest_backup.pt"] == "holds the same as best_model.pt"
    assert find(tmp_path)[-1].left_out == {"latest.pt": "empty", "best_model.pt.tmp": "an unfinished save"}


def test_one_file_of_tiers(tmp_path: Path, run: Run) -> None:
    Tiers(tmp_path).save(run, 99)

    (found,) = read(tmp_path / "epoch_00000.pt")

    assert (found.kind, found.step, found.epoch) == ("tiers", 99, 1)


# -- milestones ----------------------------------------------------------------------------------------


def test_milestones(tmp_path: Path, run: Run) -> None:
    """By number: step 9 before step 10000; a JSON that is broken, or isn't there, does no harm."""
    milestone(tmp_path, run, 10000, 10**9, "1.0B")
    milestone(tmp_path, run, 9, 5 * 10**8, "500.0M")
    milestone(tmp_path, run, 20000, 5 * 10**9, "5.0B", beside=False)
    (tmp_path / "checkpoint_500.0M_step_9.json").write_text('{"global_step": 9, "current')
    (tmp_path / "checkpoint_10.0B_step_30000.json").write_text('{"global_step": 30000}')

    found = find(tmp_path)

    assert steps(found) == [9, 10000, 20000]
    assert [one.reasons for one in found] == [("milestone 500M",), ("milestone 1B",), ("milestone 5B",)]
    assert "no valid JSON" in found[0].left_out["checkpoint_500.0M_step_9.json"]
    gone = "describes checkpoint_10.0B_step_30000.pt, which isn't there"
    assert found[-1].left_out == {"checkpoint_10.0B_step_30000.json": gone}
    assert all(one.files == {"": one.path} and not one.values for one in found)


@pytest.mark.parametrize("text", ["[]", '{"global_step": -1}', '{"global_step": true}', '{"global_step": 1e999}', "{}"])
def test_a_milestone_whose_json_says_no_step(tmp_path: Path, run: Run, text: str) -> None:
    path = milestone(tmp_path, run, 12, 10**9, "1.2B")
    path.with_suffix(".json").write_text(text)

    (found,) = find(path)
    assert (found.step, found.reasons) == (12, ("milestone 1.2B",))
    renamed = path.rename(tmp_path / "checkpoint_1.2B_step_13.pt")
    assert steps(read(renamed)) == [12]


# -- folders with training_state.pt --------------------------------------------------------------------


def test_state_folders(tmp_path: Path, run: Run) -> None:
    """Only a folder's own name counts, whatever its parents are called; 9 comes before 100."""
    output = tmp_path / "checkpoint-7" / "run"
    for step in (100, 9):
        state_folder(output, run, step, epoch=step // 50)
    weights_folder(output / "checkpoint-0", run)
    weights_folder(output / "checkpoint-final", run)
    weights_folder(output / "checkpoint-tmp-9", run, pickled=True)
    (output / "checkpoint-600").write_text("a file")

    found = find(output)

    assert steps(found) == [0, 9, 100]
    assert [one.kind for one in found] == ["weights", "training state", "training state"]
    assert found[2].epoch == 2
    assert set(found[2].files) == {"model", ""}
    assert found[2].values["metadata"]["token_metrics"]["total_tokens_processed"] == 51200
    assert found[2].values["config"] == {"model_type": "linear"}
    assert "--step" in found[2].left_out["checkpoint-final"]
    assert "unfinished" in found[2].left_out["checkpoint-tmp-9"]


def test_state_folder_of_the_first_version(tmp_path: Path, run: Run) -> None:
    """Without metadata.json the name gives the step, and the content the epoch."""
    path = state_folder(tmp_path, run, 30, epoch=3, metadata=False)

    (found,) = read(path)

    assert (found.step, found.epoch) == (30, 3)
    assert set(found.files) == {"model", ""}


def test_metadata_that_is_broken(tmp_path: Path, run: Run) -> None:
    path = state_folder(tmp_path, run, 30)
    (path / "metadata.json").write_bytes(b"\xff\xfe{")

    (found,) = find(path)

    assert found.step == 30
    assert "metadata.json" in found.left_out


def test_a_folder_that_was_renamed(tmp_path: Path, run: Run) -> None:
    """metadata.json goes before the name; without both the content tells."""
    path = state_folder(tmp_path, run, 30).rename(tmp_path / "kept")
    (found,) = find(path)
    assert found.step == 30

    (path / "metadata.json").unlink()
    (found,) = find(path)
    assert (found.step, found.facts_in["step"]) == (None, "global_step")
    assert steps(read(path)) == [30]
    (found,) = read(path.rename(tmp_path / "checkpoint-31"))
    assert found.step == 30


# -- a folder per step below checkpoints/ --------------------------------------------------------------


def test_folders_below_checkpoints(tmp_path: Path, run: Run) -> None:
    """Old and new ones side by side, named by the run's folder, in which links lead to the newest weights."""
    legacy_folder(tmp_path, run, 100)
    newest = component_folder(tmp_path, run, 1000)
    component_folder(tmp_path, run, 300)
    (tmp_path / "pytorch_model.bin").symlink_to(newest / "pytorch_model.bin")

    found = find(tmp_path)

    assert steps(found) == [100, 300, 1000]
    assert set(found[0].files) == {"model", ""}
    components = "model optimizer scheduler trainer dataset rng_state_0 rng_state_1 checkpoint_metadata".split()
    assert set(found[2].files) == set(components)
    assert found[2].metrics == {"eval_loss": 1 / 1001}
    assert found[2].values["manifest"]["world_size"] == 2
    assert found[2].created
    link = str(tmp_path / "pytorch_model.bin")
    assert found[2].left_out[link] == "a link to checkpoints/checkpoint-1000/pytorch_model.bin"
    assert find(tmp_path / "checkpoints")[:2] == found[:2]


def test_one_step_in_order_of_its_time(tmp_path: Path, run: Run) -> None:
    """A step that is there twice is ordered by its recorded time."""
    for name, hour in (("a", 12), ("b", 9)):
        component_folder(tmp_path / name, run, 50, hour=hour)
        shutil.move(tmp_path / name / "checkpoints" / "checkpoint-50", tmp_path / f"step_{name}")
        (tmp_path / name / "checkpoints").rmdir()
        (tmp_path / name).rmdir()
    (tmp_path / "step_a").rename(tmp_path / "checkpoint-50")
    (tmp_path / "step_b").rename(tmp_path / "checkpoint-050")

    assert names(find(tmp_path)) == ["checkpoint-050", "checkpoint-50"]


def test_no_weights_on_purpose(tmp_path: Path, run: Run) -> None:
    path = component_folder(tmp_path, run, 50)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match="holds no weights"):
        find(path)

    (path / ".forgather_no_model_weights").touch()
    (found,) = find(path)
    assert "model" not in found.files
    assert found.step == 50


def test_the_time_of_a_file_says_nothing(tmp_path: Path, run: Run) -> None:
    for step in (300, 100, 200):
        legacy_folder(tmp_path, run, step)
    os.utime(tmp_path / "checkpoints" / "checkpoint-100")

    assert steps(find(tmp_path)) == [100, 200, 300]


# -- what is incomplete ----------------------------------------------------------------------------------


def test_an_index_without_its_shards(tmp_path: Path, run: Run) -> None:
    """It is named, and the others are found."""
    legacy_folder(tmp_path, run, 100)
    path = legacy_folder(tmp_path, run, 200)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    places = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    found = find(tmp_path)
    assert steps(found) == [100]
    why = found[0].left_out["checkpoint-200"]
    assert "model-00002-of-00002.safetensors: not there" in why
    with pytest.raises(FormatError, match=r"incomplete: .*model-00002-of-00002"):
        find(path)

    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors")
    assert [one.files["model"] for one in find(tmp_path)][1] == index
    assert not any(name.startswith("model-0") for one in find(tmp_path) for name in (*one.files, *one.left_out))


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../secret.bin"}}', "{"],
)
def test_an_index_that_is_none(tmp_path: Path, run: Run, text: str) -> None:
    path = legacy_folder(tmp_path, run, 200)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(text)

    with pytest.raises(FormatError, match=r"incomplete: model\.safetensors\.index\.json"):
        find(path)


def test_empty_files(tmp_path: Path, run: Run) -> None:
    """Empty weights are none, and the others count; of the other files that one is left out."""
    path = component_folder(tmp_path, run, 50)
    (path / "optimizer_state.pt").write_bytes(b"")
    (found,) = find(path)
    assert found.left_out["optimizer_state.pt"] == "empty"
    assert "optimizer" not in found.files

    (path / "model.safetensors").write_bytes(b"")
    (found,) = find(path)
    assert found.files["model"].name == "pytorch_model.bin"

    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is empty"):
        find(tmp_path)


# -- hostile folders -------------------------------------------------------------------------------------


def test_links_that_lead_out(tmp_path: Path, run: Run) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"secret")
    path = component_folder(tmp_path / "run", run, 50)
    (path / "dataset_state.pt").unlink()
    (path / "dataset_state.pt").symlink_to(secret)
    (path / "scheduler_state.pt").unlink()
    (path / "scheduler_state.pt").symlink_to("nowhere")
    (path / "outside").symlink_to(tmp_path)

    (found,) = find(tmp_path / "run")

    assert not {"dataset", "scheduler"} & found.files.keys()
    assert "leads out" in found.left_out["dataset_state.pt"]
    assert found.left_out["scheduler_state.pt"] == "a link to nothing"
    assert "leads out" in found.left_out["outside"]


def test_weights_that_lead_out(tmp_path: Path, run: Run) -> None:
    path = component_folder(tmp_path / "run", run, 50)
    (path / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
    (path / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")

    with pytest.raises(FormatError, match=r"pytorch_model\.bin is a link that leads out"):
        find(path)


def test_pipes_in_the_place_of_files(tmp_path: Path, run: Run) -> None:
    """They would block whoever opens them."""
    path = state_folder(tmp_path, run, 50)
    (path / "metadata.json").unlink()
    os.mkfifo(path / "metadata.json")
    os.mkfifo(path / "optimizer.pt")
    os.mkfifo(tmp_path / "latest.pt")

    (found,) = find(tmp_path)

    assert found.step == 50
    assert found.left_out["latest.pt"] == "no regular file"
    assert found.left_out["metadata.json"] == "no regular file"
    with pytest.raises(FormatError, match="no regular file"):
        find(tmp_path / "latest.pt")


def giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(JSON_LIMIT_BYTES + 1)


def deep(path: Path) -> None:
    path.write_text('{"global_step": ' + "[" * 100_000)


def too_deep(path: Path) -> None:
    path.write_text('{"global_step": 50, "a": ' + "[" * 90 + "]" * 90 + "}")


def digits(path: Path) -> None:
    path.write_text('{"global_step": ' + "9" * 100_000 + "}")


@pytest.mark.parametrize("hostile", [giant, deep, too_deep, digits])
def test_json_that_does_harm(tmp_path: Path, run: Run, hostile: Callable[[Path], None]) -> None:
    path = state_folder(tmp_path, run, 50)
    hostile(path / "metadata.json")

    (found,) = find(tmp_path)

    assert found.step == 50
    assert "metadata.json" in found.left_out
    assert "metadata" not in found.values


def test_metrics_that_are_none(tmp_path: Path, run: Run) -> None:
    path = component_folder(tmp_path, run, 50)
    values = '{"eval_loss": NaN, "a": Infinity, "b": "x", "c": true, "": 1, "eval_acc": 0.0, "d": 1e999, "e": [1]}'
    (path / "eval_metrics.json").write_text(values.replace('"b"', '"' + 200 * "b" + '": 1, "b"'))

    assert find(path)[0].metrics == {"eval_acc": 0.0}


def test_thousands_of_files(tmp_path: Path, run: Run) -> None:
    path = state_folder(tmp_path, run, 50)
    for number in range(1000):
        (path / f"junk-{number}.txt").touch()
        (tmp_path / f"rolling_step_{number:06d}.pt.tmp").touch()

    (found,) = find(tmp_path)

    assert found.step == 50
    assert found.left_out["checkpoint-50/…"] == found.left_out[f"{tmp_path.name}/…"] == "and 900 more"
    assert len(found.left_out) == 202


def test_a_folder_that_may_not_be_read(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy_folder(tmp_path, run, 100)
    closed = legacy_folder(tmp_path, run, 200)
    scandir, asked = os.scandir, []

    def refuse(path: Any) -> Any:
        if Path(path) == closed:
            asked.append(path)
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find(tmp_path)

    assert asked
    assert steps(found) == [100]
    assert "Permission denied" in found[0].left_out["checkpoint-200"]
    with pytest.raises(StorageError, match="Permission denied"):
        find(closed)


# -- files of one's own, and nothing at all --------------------------------------------------------------


def test_files_of_ones_own(tmp_path: Path, run: Run) -> None:
    """In order of the steps in their names, or of what the content tells."""
    for step in (10, 9):
        torch.save({"model": run.model.state_dict(), "loss": 0.5}, tmp_path / f"model_step_{step}.pt")
    torch.save(
        {"model": run.model.state_dict(), "iter_num": 11, "epoch": 2, "metrics": {"f1": 0.25}}, tmp_path / "c.pt"
    )
    (tmp_path / "newest.pt").symlink_to("c.pt")

    assert names(find(tmp_path)) == ["model_step_9.pt", "model_step_10.pt", "c.pt"]
    found = read(tmp_path)
    assert steps(found) == [9, 10, 11]
    assert found[0].metrics == {"loss": 0.5}
    assert (found[2].epoch, found[2].metrics) == (2, {"f1": 0.25})
    assert find(tmp_path)[-1].left_out == {"newest.pt": "a link to c.pt"}


def test_an_index_by_itself(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")

    (found,) = find(index)

    assert (found.kind, found.files) == ("safetensors", {"model": index})


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("nothing", NotFoundError, "there is nothing at"),
        ("notes.txt", FormatError, "holds no checkpoint by its name"),
        ("empty.pt", FormatError, "is empty"),
        ("folder", NotFoundError, r"no checkpoint at .*folder: looked for .*\.ckpt"),
    ],
)
def test_nothing_to_import(tmp_path: Path, name: str, error: type[CheckpointError], says: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=says):
        find(tmp_path / name)


def test_several_runs_are_not_mixed(tmp_path: Path, run: Run) -> None:
    for number in range(2):
        folder = tmp_path / "lightning_logs" / f"version_{number}" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save({"global_step": 3}, folder / "epoch=0-step=3.ckpt")
    (folder / "epoch=0-step=3.ckpt").write_bytes(b"")
    (tmp_path / "lightning_logs" / "version_2" / "checkpoints").mkdir(parents=True)

    with pytest.raises(FormatError, match=r"holds several runs: import one of .*version_0/checkpoints, .*version_1"):
        find(tmp_path)


def test_a_run_within(tmp_path: Path, run: Run) -> None:
    """Which it is one has to say."""
    legacy_folder(tmp_path / "output", run, 100)
    with pytest.raises(NotFoundError, match="output: a run of its own"):
        find(tmp_path)


def test_names_in_order() -> None:
    given = ["step_10", "step_9", "step_009", "step_" + "1" * 5000, "a2b10", "a2b9", "a"]
    assert sorted(given, key=by_numbers) == ["a", "a2b9", "a2b10", *given[1:3], "step_10", "step_" + "1" * 5000]


@pytest.mark.parametrize(
    ("epoch", "step", "completed"),
    [
        (0.9999999, 100, 1),
        (0.9999999, 9_999_999, 0),
        (2.75, 11, 2),
        (3.0, 18, 3),
        (2.9999999999999996, 18, 3),
        (0.5, 1, 0),
        (0, 0, 0),
        (float("nan"), 3, None),
        (-1.0, 3, None),
        (True, 3, None),
        ("2", 3, None),
        (None, 3, None),
    ],
)
def test_completed_epochs(epoch: Any, step: int, completed: int | None) -> None:
    assert completed_epochs(epoch, step) == completed


def test_finding_needs_no_torch(tmp_path: Path, run: Run) -> None:
    Tiers(tmp_path).save(run, 99)
    code = (
        "import sys, pathlib; from ckptstore.tools.importing.layouts import find\n"
        "assert len(find(pathlib.Path(sys.argv[1]))) == 3\n"
        "assert not {'torch', 'numpy', 'pickle'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


# -- weights in other shapes -----------------------------------------------------------------------------


def test_adapters(tmp_path: Path, run: Run) -> None:
    """What a LoRA run saves: the adapter's weights, and its config."""
    path = weights_folder(tmp_path / "checkpoint-20", run)
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "config.json").rename(path / "adapter_config.json")
    (path / "trainer_state.json").write_text('{"global_step": 20, "epoch": 0.5}')

    (found,) = find(tmp_path)

    assert (found.kind, found.step, found.files["model"].name) == ("huggingface", 20, "adapter_model.safetensors")
    assert "adapter_config" in found.values


def test_shards_of_deepspeed(tmp_path: Path, run: Run) -> None:
    """Each rank's are of no use to anybody else."""
    path = tmp_path / "checkpoint-20"
    (path / "global_step20").mkdir(parents=True)
    (path / "global_step20" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    (path / "trainer_state.json").write_text('{"global_step": 20}')
    with pytest.raises(FormatError, match=r"checkpoint-20 .*zero_to_fp32\.py"):
        find(tmp_path)

    shutil.copytree(weights_folder(tmp_path / "weights", run), path, dirs_exist_ok=True)
    (found,) = find(path)
    assert "global_step20" in found.left_out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_folders_of_distributed_checkpoint(tmp_path: Path, run: Run) -> None:
    """By itself, as the model of a sharded run of accelerate, and as Lightning's with meta.pt beside it."""
    import torch.distributed.checkpoint as dcp

    alone = tmp_path / "step" / "checkpoint-5"
    sharded = tmp_path / "sharded" / "checkpoint-30"
    lightning = tmp_path / "lightning" / "epoch=0-step=7.ckpt"
    for path in (alone, sharded / "pytorch_model_fsdp_0", lightning):
        dcp.save({"model": run.weights()}, checkpoint_id=path, no_dist=True)
    torch.save({"step": 0}, sharded / "random_states_0.pkl")
    progress = {"epoch_progress": {"current": {"processed": 1}}}
    torch.save({"global_step": 7, "loops": {"fit_loop": progress}}, lightning / "meta.pt")

    (found,) = find(alone)
    assert (found.kind, found.step, found.files) == ("dcp", 5, {"": alone})
    (found,) = find(tmp_path / "sharded")
    assert (found.kind, found.files["model"]) == ("accelerate", sharded / "pytorch_model_fsdp_0")
    (found,) = read(tmp_path / "lightning")
    assert (found.kind, found.step, found.epoch) == ("lightning", 7, 1)
    assert find(lightning)[0].files == {"state": lightning, "meta": lightning / "meta.pt"}


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path, run: Run) -> None:
    """Its files are links to the same model's blobs; a link to another model leads out."""
    model = tmp_path / "models--a--b"
    snapshot = weights_folder(model / "snapshots" / "0123", run)
    (model / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(model / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert find(snapshot)[0].files == {"model": snapshot / "model.safetensors"}

    (model / "blobs" / "abc").rename(tmp_path / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../abc")
    with pytest.raises(NotFoundError, match=r"model\.safetensors is a link that leads out"):
        find(snapshot)


def test_weights_beside_checkpoints(tmp_path: Path, run: Run) -> None:
    """A run whose folder is called as a checkpoint isn't one of that step."""
    output = weights_folder(tmp_path / "checkpoint-999", run)
    state_folder(output, run, 5)

    (found,) = find(output)

    assert found.step == 5
    assert "--step" in found.left_out["model.safetensors"]


def test_what_else_lies_beside_is_named(tmp_path: Path, run: Run) -> None:
    state_folder(tmp_path, run, 5)
    (tmp_path / "ema.pt").write_bytes(b"x")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "epoch=0-step=7.ckpt" / "checkpoint").mkdir(parents=True)

    (found,) = find(tmp_path)

    assert "by itself" in found.left_out["ema.pt"]
    assert "a pickled object" in found.left_out["training_args.bin"]
    assert "shards" in found.left_out["epoch=0-step=7.ckpt"]


def test_a_folder_called_tmp(tmp_path: Path, run: Run) -> None:
    """What is named by a person isn't unfinished."""
    assert find(weights_folder(tmp_path / "tmp", run))[0].kind == "weights"


# -- anything at all -------------------------------------------------------------------------------------

NAMES = (
    "checkpoint-1 checkpoint_2 checkpoint-tmp-3 final epoch_0 step_9 checkpoints lightning_logs version_0 snapshots "
    "blobs model.safetensors model.safetensors.index.json pytorch_model.bin optimizer.pt optimizer.bin "
    "random_states_0.pkl trainer_state.json training_state.pt metadata.json eval_metrics.json checkpoint_manifest.json "
    "config.json latest.pt rolling_step_000005.pt emergency_step_000000_20250101_000000.pt checkpoint_1.0B_step_7.pt "
    "checkpoint_1.0B_step_7.json last.ckpt a.ckpt .metadata meta.pt foo.pt trainer_state.pt x.json \u0663.pt a\nb.pt"
).split(" ")
KEYS = st.sampled_from(
    "global_step epoch step log_history timestamp weight_map metrics callbacks loops fit_loop state optimizer monitor "
    "best_k_models train_loss val_loss epoch_progress current processed meta 0".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.tensor([1.5])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
FILES = st.one_of(
    st.just(b""), st.binary(max_size=20), VALUES.map(lambda value: json.dumps(value, default=str).encode())
)
TREES = st.recursive(
    FILES | st.sampled_from(["link out", "link within", "link to nothing", "pipe"]),
    lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=25,
)


def plant(path: Path, tree: Any, root: Path) -> None:
    if isinstance(tree, dict):
        path.mkdir()
        for name, inner in tree.items():
            plant(path / name, inner, root)
    elif isinstance(tree, bytes):
        path.write_bytes(tree)
    elif tree == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link out": "/", "link within": root, "link to nothing": "nothing"}[tree])


@given(tree=st.dictionaries(st.sampled_from(NAMES), TREES, max_size=6), state=st.dictionaries(KEYS, VALUES, max_size=4))
@settings(suppress_health_check=list(HealthCheck))
def test_any_folder_at_all(tree: dict[str, Any], state: dict[str, Any]) -> None:
    """What is found lies within; else an error says what is wrong; and no content makes a difference to that."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(os.path.realpath(made), "root")
        plant(root, tree, root)
        try:
            found = find(root)
        except CheckpointError as error:
            assert str(root) in error.message  # noqa: PT017 - an error is one of two right answers
            return
        places = [path for one in found for path in one.files.values()]
        assert places
        assert all(Path(os.path.realpath(path)).is_relative_to(root) for path in places)
        assert all(one.step is None or 0 <= one.step < 10**15 for one in found)
        for one in settled([(one, told(one, state)) for one in found]):
            assert one.step is None or 0 <= one.step < 10**15
            assert one.epoch is None or 0 <= one.epoch <= 10**15
            assert all(abs(value) < 1e300 for value in one.metrics.values())
