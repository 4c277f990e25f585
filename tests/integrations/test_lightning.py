"""Lightning: its own checkpoints by way of a store, and runs that are interrupted anywhere and go on exactly."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckptstore as cs
from ckptstore.errors import ExistsError, FormatError, NotFoundError, StateError
from tests.forked import preload
from tests.ranks import processes as ranks
from tests.trainer import processes
from tests.trainer.processes import check_same

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint

from ckptstore.integrations.lightning import CkptStoreCallback, CkptStoreIO
from ckptstore.integrations.lightning_io import join, split
from tests.integrations import lightning_program
from tests.integrations.lightning_program import Model, Options, trainer_of

preload("tests.integrations.lightning_program")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulation": 4, "save": "every(steps=1)"},
    "workers": {"workers": 2},
    "plateau, validated twice": {"scheduler": "plateau", "validate": 0.5, "save": "every(steps=2)"},
    "by steps": {"max_steps": 20, "scheduler": "plateau"},
    "async, epochs and the best": {"mode": "async", "save": "every(epochs=1) | on_best(val_loss)"},
}
EXITS = {"exit": 9, "kill": -9, "term": 143, "int": 130, "raise": 7}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning's advice is for people."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        lightning_program.quiet()
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def run(options: Options, **changes: Any) -> int:
    return processes.run(options, main=lightning_program.main, **changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_anywhere(variant: str, tmp_path: Path, full: bool) -> None:
    """As Lightning alone would have it; with ``--full`` after, and in the midst of, each step."""
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), **VARIANTS[variant])
    alone = tmp_path / "alone"
    assert run(made, url=None, out=str(alone)) == 0
    expected = lightning_program.notes(alone)
    total = max(note["step"] for note in expected if "step" in note)
    cases = [(at, where) for at in range(total + 1) for where in ("step", "backward")]
    cases = [case for case in cases if case not in ((0, "step"), (total, "backward"))]
    cases += [(note["evaluated"], "validation") for note in expected if "evaluated" in note]
    ways, offset = list(EXITS), list(VARIANTS).index(variant)
    for number, (at, where) in enumerate(cases):
        if not full and (number + offset) % 15:
            continue
        way = ways[(number + offset) // (1 if full else 15) % len(ways)]
        url, out = str(tmp_path / f"store-{number}"), str(tmp_path / f"notes-{number}")
        case = replace(made, url=url, out=out)
        ended = run(case, end_by=way, end_at=at, where=where)
        found = lightning_program.notes(out)
        assert [note["broken"] for note in found if "broken" in note] == [at], "the fault did not fire"
        assert ended == EXITS[way]
        assert run(case) == 0
        check_same(lightning_program.notes(out), expected)


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"max_steps": 16}], ids=["epochs", "steps"])
def test_a_run_that_has_ended_is_made_longer(changes: dict[str, Any], tmp_path: Path) -> None:
    """It goes on where it ended, as if it had been meant to be that long."""
    longer = {"epochs": 3} if "epochs" in changes else {"max_steps": 24}
    made = Options(str(tmp_path / "store"), str(tmp_path / "notes"), scheduler="plateau", **longer)
    alone = tmp_path / "alone"
    assert run(made, url=None, out=str(alone)) == 0
    assert run(made, **changes) == 0
    assert run(made) == 0
    check_same(lightning_program.notes(made.out), lightning_program.notes(alone))


def fitted(folder: Path, store: cs.Store, callbacks: list[Any], **changes: Any) -> Any:
    """A trainer after its run."""
    options = Options(None, str(folder / "notes"), epochs=2, **changes)
    trainer = trainer_of(options, callbacks=callbacks, plugins=[CkptStoreIO(store)])
    trainer.fit(Model(options))
    return trainer


def test_model_checkpoint(tmp_path: Path) -> None:
    """``ModelCheckpoint`` saves, removes, and finds its best and last again, in another store object, too."""
    folder = tmp_path / "paths"
    keeps = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True, filename="{epoch}-{val_loss:.3f}")
    with cs.open(tmp_path / "store") as store:
        trainer = fitted(tmp_path, store, [keeps])
        names = {reason for checkpoint in store.checkpoints() for reason in checkpoint.reasons}
        assert names == {f"path {keeps.best_model_path}", f"path {folder / 'last.ckpt'}"}
        best = store.resolve("best:val_loss")
        assert best.metrics["val_loss"] == pytest.approx(float(keeps.best_model_score))
        weights = {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}
    with cs.open(tmp_path / "store") as store:
        io = CkptStoreIO(store)
        for path in ("latest", folder / "last.ckpt", tmp_path / "elsewhere" / "last.ckpt"):
            loaded = io.load_checkpoint(path)
            assert all(torch.equal(loaded["state_dict"][name], value) for name, value in weights.items())
        options = Options(None, str(tmp_path / "notes"), epochs=3)
        keeps = ModelCheckpoint(folder, monitor="val_loss", save_last=True)
        more = trainer_of(options, callbacks=[keeps], plugins=[io])
        more.fit(Model(options), ckpt_path="last")
        assert more.global_step == 24
        evaluated = trainer_of(options, callbacks=[], plugins=[io], enable_checkpointing=False)
        assert evaluated.validate(Model(options), ckpt_path="best:val_loss", verbose=False)
        for path in ("nothing.ckpt", "step:7777"):
            with pytest.raises(NotFoundError, match="no checkpoint that was saved as"):
                io.load_checkpoint(path)


def test_paths_survive_without_notes(tmp_path: Path) -> None:
    """The text that is written at a path is for people and for Lightning: the store knows the path itself."""
    with cs.open(tmp_path / "store") as store:
        io = CkptStoreIO(store)
        path = tmp_path / "x" / "a=1.ckpt"
        io.save_checkpoint({"global_step": 3, "state_dict": {"w": torch.ones(2)}}, path)
        assert path.read_text().startswith(f"ckptstore {store.resolve().id}\n")
        path.unlink()
        assert torch.equal(io.load_checkpoint(path)["state_dict"]["w"], torch.ones(2))
        io.save_checkpoint({"global_step": 3}, path, {"metrics": {"acc": 0.5}, "reasons": ["mine"]})
        assert store.resolve("best:acc").reasons == (f"path {path}", "mine")
        io.remove_checkpoint(path)
        io.remove_checkpoint(path)
        io.remove_checkpoint(path)
        assert not path.exists()
        assert store.checkpoints() == []
        assert not list((tmp_path / "store" / "checkpoints").glob("*/*.safetensors"))
        with pytest.raises(FormatError, match="nonsense"):
            io.save_checkpoint({}, path, {"nonsense": 1})


def test_same_name_in_two_folders(tmp_path: Path) -> None:
    """A name that means two checkpoints is refused, unless its folder is said."""
    with cs.open(tmp_path / "store") as store:
        io = CkptStoreIO(store)
        for number in (1, 2):
            io.save_checkpoint({"global_step": number}, tmp_path / str(number) / "last.ckpt")
        with pytest.raises(NotFoundError, match="that name was saved as"):
            io.load_checkpoint("last.ckpt")
        assert io.load_checkpoint(tmp_path / "1" / "last.ckpt")["global_step"] == 1


def test_what_is_not_plain(tmp_path: Path) -> None:
    """Hyper-parameters come back as they were; what can't be stored is named by its place."""
    given = {
        "state_dict": {"w": torch.ones(2)},
        "hyper_parameters": {"path": tmp_path, "wait": timedelta(days=1, seconds=2), "args": argparse.Namespace(a=1)},
        "callbacks": {"x": {"scores": {"a": torch.tensor(1.0)}, "list": [(tmp_path, 1)]}},
        "lr_schedulers": [{"last_epoch": 1}],
    }
    assert join(split(given)) == given
    with cs.open(tmp_path / "store") as store:
        io = CkptStoreIO(store)
        io.save_checkpoint(given, tmp_path / "a.ckpt")
        assert io.load_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"] == given["hyper_parameters"]
        with pytest.raises(StateError, match="lightning/hyper_parameters/f"):
            io.save_checkpoint({"hyper_parameters": {"f": lambda: None}}, tmp_path / "b.ckpt")
        assert len(store.checkpoints()) == 1


def test_callback_and_plugin_share_a_store(tmp_path: Path) -> None:
    """What the callback saves is a checkpoint of Lightning's, for ``ckpt_path``; the run ends with the end saved."""
    with cs.open(tmp_path / "store") as store:
        seen: list[str] = []
        callback = CkptStoreCallback(
            store,
            save="every(epochs=1) | on_best(val_loss)",
            on_saved=lambda event: seen.extend(event.checkpoint.reasons),
            tokens=lambda batch: batch[1].numel(),
            verbose=False,
        )
        trainer = fitted(tmp_path, store, [callback])
        assert callback.run is None
        assert callback.resumed is not None
        assert not callback.resumed
        assert "epoch 1" in seen
        assert "epoch 2" in seen
        latest = store.resolve()
        assert (latest.step, latest.epoch) == (16, 2)
        assert store.resolve("best:val_loss").id == callback.best_model_path
        assert store.load(only=["trainer"])["trainer"]["progress"]["tokens"] == 2 * 24 * 6
        for path in ("latest", "best:val_loss", "epoch:1", latest.id):
            assert trainer.validate(ckpt_path=path, verbose=False)
        # Its Lightning part, as of ckpt_path=, and then the callback's.
        options = Options(None, str(tmp_path / "notes"), epochs=3)
        again = trainer_of(options, callbacks=[CkptStoreCallback(store, verbose=False)], plugins=[CkptStoreIO(store)])
        again.fit(Model(options), ckpt_path="latest")
        assert store.resolve().step == 24


def test_fresh_starts_are_refused(tmp_path: Path) -> None:
    """A run that would be mixed up with another one isn't begun, and the trainer's loaders are left alone."""
    with cs.open(tmp_path / "store") as store:
        fitted(tmp_path, store, [CkptStoreCallback(store, verbose=False)])
        with pytest.raises(ExistsError, match="begin anew"):
            fitted(tmp_path, store, [CkptStoreCallback(store, resume=False, verbose=False)])
        with pytest.raises(NotFoundError):
            fitted(tmp_path, store, [CkptStoreCallback(store, resume="step:7", verbose=False)])
        with pytest.raises(FormatError, match="open already"):
            CkptStoreIO(store, keep=cs.last(1))


def test_without_lightning(tmp_path: Path) -> None:
    """One sentence says what to install."""
    code = (
        "import importlib.util as u, sys; found = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if 'lightning' in n and 'ckptstore' not in n else found(n, p)\n"
        "import ckptstore.integrations.lightning"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'ckptstore[lightning]'" in done.stderr.splitlines()[-1]


def on_rank(place: str) -> str:
    """Lightning lets rank 0 save, and all load."""
    io = CkptStoreIO(place)
    checkpoint = {"state_dict": {"weight": torch.ones(2)}, "global_step": 3}
    if distributed.get_rank() == 0:
        io.save_checkpoint(checkpoint, f"{place}.ckpt")
    distributed.barrier()
    loaded = io.load_checkpoint(f"{place}.ckpt")
    assert loaded["state_dict"]["weight"].tolist() == [1.0, 1.0]
    try:
        CkptStoreIO(cs.open(place)).save_checkpoint(checkpoint, f"{place}.ckpt")
    except cs.StateError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_one_rank_saves_for_all(store_path: Path) -> None:
    """Others aren't waited for; a store that would wait for them is refused."""
    for text in ranks.run(2, on_rank, str(store_path)):
        assert "open the store with ranks='one'" in text
