"""Lightning's own checkpoints in a store: what is in them, by part, and ``CkptStoreIO``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.errors import ExistsError, FormatError, NotFoundError, StateError
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.store import Store

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.fabric.utilities.cloud_io import get_filesystem
    from lightning.fabric.utilities.data import AttributeDict
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
else:

    def _package() -> tuple[str, str]:
        """Lightning under the name that the user imports it by: its older one only where nothing else is there."""
        names = {"lightning": ("lightning.fabric", "lightning.pytorch")}
        names["pytorch_lightning"] = ("lightning_fabric", "pytorch_lightning")
        order = sorted(names, key=lambda name: name not in sys.modules)
        for name in order:
            if importlib.util.find_spec(name) is not None:
                return names[name]
        raise ModuleNotFoundError("ckptstore and Lightning together need Lightning: pip install 'ckptstore[lightning]'")

    _fabric, _pytorch = _package()
    CheckpointIO = importlib.import_module(f"{_fabric}.plugins").CheckpointIO
    get_filesystem = importlib.import_module(f"{_fabric}.utilities.cloud_io").get_filesystem
    AttributeDict = importlib.import_module(f"{_fabric}.utilities.data").AttributeDict
    Trainer = importlib.import_module(_pytorch).Trainer
    LightningModule = importlib.import_module(_pytorch).LightningModule
    CheckpointCallback = importlib.import_module(f"{_pytorch}.callbacks").Checkpoint

__all__ = ["CheckpointCallback", "CkptStoreIO", "LightningModule", "Trainer"]

Fields: TypeAlias = dict[str, Any]

PARTS = {"model": "state_dict", "optimizer": "optimizer_states", "scheduler": "lr_schedulers"}
"""Entry in the store → key of Lightning's checkpoint; all else stands under ``REST``."""

REST = "lightning"
REASON = "path "
"""What a reason begins with that says under which path Lightning saved."""

_KIND = "$lightning"


class Part:
    """A value that is saved as the state of an object, as all parts of a Lightning checkpoint are."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None] = lambda value: None) -> None:
        self._get, self._put = get, put

    def state_dict(self) -> Any:
        """What is to be saved."""
        return self._get()

    def load_state_dict(self, state: Any) -> None:
        """Take over what was saved."""
        self._put(state)


def split(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint as Lightning makes it, without what only Python objects can hold."""
    entries = {name: checkpoint[key] for name, key in PARTS.items() if key in checkpoint}
    rest = {key: value for key, value in checkpoint.items() if key not in PARTS.values()}
    return {**entries, REST: _to_plain(rest)}


def join(entries: Mapping[str, Any]) -> Fields:
    """The inverse of ``split``, of what was loaded; entries that Lightning doesn't know are left out."""
    checkpoint = {key: entries[name] for name, key in PARTS.items() if name in entries}
    return {**checkpoint, **_from_plain(entries.get(REST, {}))}


def _to_plain(value: Any) -> Any:
    """Paths, time spans and namespaces, as they stand in hyper-parameters, as values that JSON has words for."""
    if isinstance(value, PurePath):
        return {_KIND: "path", "value": str(value)}
    if isinstance(value, timedelta):
        return {_KIND: "timedelta", "value": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, argparse.Namespace):
        return {_KIND: "namespace", "value": _to_plain(vars(value))}
    if isinstance(value, AttributeDict):
        return {_KIND: "attributes", "value": _to_plain(dict(value))}
    if isinstance(value, str):
        return str.__str__(value)
    if type(value) is dict:
        return {_to_plain(key) if isinstance(key, str) else key: _to_plain(item) for key, item in value.items()}
    return type(value)(map(_to_plain, value)) if type(value) in (list, tuple) else value


def _from_plain(value: Any) -> Any:
    """The inverse of ``_to_plain``; enumerated texts come back as the text that they are equal to."""
    if type(value) is dict and value.keys() == {_KIND, "value"} and value[_KIND] in _MAKERS:
        return _MAKERS[value[_KIND]](_from_plain(value["value"]))
    if type(value) is dict:
        return {key: _from_plain(item) for key, item in value.items()}
    return type(value)(map(_from_plain, value)) if type(value) in (list, tuple) else value


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "path": Path,
    "timedelta": lambda parts: timedelta(*parts),
    "namespace": lambda fields: argparse.Namespace(**fields),
    "attributes": AttributeDict,
}


class CkptStoreIO(CheckpointIO):
    """Lets ``ModelCheckpoint``, ``trainer.save_checkpoint`` and ``ckpt_path=`` go by way of a store, without pickle.

    Each path that Lightning saves under stands in the checkpoint's reasons and finds it again, in any process. Where
    the path is local, or of a storage that fsspec knows, a small text is written there that names the checkpoint, so
    that ``ckpt_path="last"`` and whatever else looks for files goes on working. Besides paths, ``ckpt_path`` may be a
    selector, as "latest" or "best:val_loss".

    Attributes:
        store: where it saves.
    """

    def __init__(self, store: Store | Place, **options: Any) -> None:
        """Nothing is written before the first save.

        Args:
            store: an open store, which stays open and which a ``CkptStoreCallback`` may share, or where to open one.
            options: for ``ckptstore.open``, where ``store`` is a place.

        Raises:
            FormatError, StorageError: as ``ckptstore.open``.
        """
        self.store = _opened(store, options)
        self._owns = self.store is not store

    def save_checkpoint(self, checkpoint: Fields, path: Place, storage_options: Any | None = None) -> None:
        """Save what Lightning collected, durably.

        Args:
            checkpoint: as ``trainer.save_checkpoint`` makes it, or any dict of Fabric's.
            path: its name, for Lightning.
            storage_options: of ``Store.save``: epoch, metrics, modes, reasons, durable.

        Raises:
            StateError: something can't be stored without pickle; the error says what.
            SaveFailedError, CommitUnknownError, StaleWriterError: it isn't saved.
        """
        options = dict(storage_options or {})
        if unknown := options.keys() - {"epoch", "metrics", "modes", "reasons", "durable"}:
            raise FormatError(f"storage_options: {', '.join(sorted(unknown))}: Store.save takes no such option here")
        if self.store.ranks is not None:
            raise StateError("Lightning lets one process save: open the store with ranks='one'", path="")
        name = _full(path)
        facts = {
            "epoch": checkpoint.get("epoch"),
            "metrics": _scores(checkpoint),
            **options,
            "reasons": [f"{REASON}{name}", *options.get("reasons", ())],
        }
        entries = {key: Part(lambda value=value: value) for key, value in split(checkpoint).items()}  # type: ignore[misc]
        saved = self.store.save(entries, step=int(checkpoint.get("global_step", 0)), **facts)
        _write_note(name, self.store.url, saved)

    def load_checkpoint(self, path: Place, map_location: Any | None = None, weights_only: bool | None = None) -> Fields:
        """What was saved under ``path``, or what a selector means, as Lightning's own dict, on the CPU.

        Args:
            path: the path that Lightning saved under, or a selector.
            map_location: not needed: Lightning moves what it loads.
            weights_only: not needed: nothing that is loaded can run.

        Raises:
            NotFoundError: no such checkpoint.
            IntegrityError: it is damaged.
        """
        selector = "latest" if str(path) == "latest" else self.find(path).id
        state = self.store.load(selector)
        if not isinstance(state, dict) or REST not in state:
            raise StateError(
                f"the checkpoint {str(path)!r} was not made by way of Lightning: it has no {REST!r}", path=REST
            )
        return join(state)

    def remove_checkpoint(self, path: Place) -> None:
        """Remove what was saved under ``path``, where it is still there and not held."""
        with suppress(NotFoundError, ExistsError):
            self.store.delete(self._saved_as(path).id, reason=f"removed by Lightning: {_full(path)}", reclaim=True)
        _remove_note(_full(path))

    def teardown(self) -> None:
        """Close the store, where it was opened here."""
        if self._owns:
            self.store.close()
            self.store = open_store(self.store.url, ranks="one")

    def find(self, path: Place) -> Checkpoint:
        """The checkpoint that a path or a selector means.

        Raises:
            NotFoundError: there is none.
        """
        try:
            return self._saved_as(path)
        except NotFoundError as error:
            try:
                return self.store.resolve(os.fspath(path))
            except (NotFoundError, FormatError):
                raise error from None

    def _saved_as(self, path: Place) -> Checkpoint:
        name = _full(path)
        there = self.store.checkpoints()
        if (noted := _read_note(name)) is not None:
            for checkpoint in there:
                if checkpoint.id == noted:
                    return checkpoint
        if found := [checkpoint for checkpoint in there if name in _names_of(checkpoint)]:
            return found[-1]
        # Another folder's name for it, as after a move; not where several paths end like that.
        short = os.path.basename(name)
        alike = {known: each for each in there for known in _names_of(each) if os.path.basename(known) == short}
        if len(alike) == 1:
            return next(iter(alike.values()))
        more = f"; that name was saved as {', '.join(sorted(alike))}" if alike else ""
        raise NotFoundError(f"{self.store.url} has no checkpoint that was saved as {name}{more}")


def _opened(store: Store | Place, options: Mapping[str, Any]) -> Store:
    if not isinstance(store, Store):
        # Of several processes Lightning lets one save.
        return open_store(store, **{"ranks": "one", **options})
    if options:
        raise FormatError(f"{', '.join(options)}: the store is open already; give its place instead")
    return store


def _full(path: Place) -> str:
    text = os.fspath(path)
    if "://" in text:
        return text
    text = os.path.abspath(text)
    # ModelCheckpoint(save_last="link")
    return os.path.join(os.path.dirname(text), os.readlink(text)) if os.path.islink(text) else text


def _names_of(checkpoint: Checkpoint) -> list[str]:
    return [reason.removeprefix(REASON) for reason in checkpoint.reasons if reason.startswith(REASON)]


def _scores(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """What the ``ModelCheckpoint``s in it go by."""
    states = checkpoint.get("callbacks")
    found: dict[str, float] = {}
    for state in states.values() if isinstance(states, dict) else ():
        if isinstance(state, dict) and state.get("monitor") and state.get("current_score") is not None:
            found[state["monitor"]] = float(state["current_score"])
    return found


def _write_note(name: str, url: str, saved: Checkpoint) -> None:
    files = get_filesystem(name)
    files.makedirs(os.path.dirname(name), exist_ok=True)
    with files.open(name, "w") as file:
        file.write(f"ckptstore {saved.id}\nThis checkpoint lies in {url}\n")


def _read_note(name: str) -> str | None:
    try:
        with get_filesystem(name).open(name, "rb") as file:
            word, _, id = file.read(200).partition(b"\n")[0].partition(b" ")
    except (OSError, ValueError, ImportError):
        return None
    return id.decode("ascii", "replace") if word == b"ckptstore" else None


def _remove_note(name: str) -> None:
    if _read_note(name) is not None:
        get_filesystem(name).rm(name)
