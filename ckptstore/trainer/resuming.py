"""Where a run goes on: which checkpoint, from which store, and what is not as it was saved."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import PurePath
from typing import Any, TypeAlias

from ckptstore.config.settings import Parts
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.damage import FallbackWarning
from ckptstore.engine.loader import Loaded
from ckptstore.errors import ExistsError, FormatError, IntegrityError
from ckptstore.format.layout import try_id
from ckptstore.opening import Place
from ckptstore.opening import open as open_store
from ckptstore.store import Store
from ckptstore.trainer import parts
from ckptstore.trainer.jointly import Jointly
from ckptstore.trainer.run import PART, Run
from ckptstore.view import View

State: TypeAlias = dict[str, Any]
Build: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Source:
    """The checkpoint to go on from, and the store that it lies in."""

    def __init__(self, store: View, selector: str) -> None:
        self.store, self.selector = store, selector

    @classmethod
    def of(cls, own: Store, select: bool | str | os.PathLike[str], stack: ExitStack) -> Source | None:
        """What ``select`` means; None for a fresh start. Another store is closed by ``stack``."""
        if select is False:
            return None
        if select is True:
            return cls(own, "latest")
        if (place := _as_place(select)) is None:
            return cls(own, str(select))
        url, selector = place
        other = stack.enter_context(open_store(url, read_only=True))
        return cls(own if other.url == own.url else other, selector)

    def load(self, state: State) -> Loaded:
        """Restore ``state``, parts that only one of both has left out."""
        return self.store.load(self.selector, into=state, strict="parts")

    def load_built(self, build: Callable[[Mapping[str, Any]], State], jointly: Jointly) -> Loaded:
        """Build the state from the plain values that the checkpoint has, then restore it.

        As with ``load("latest")``, what is damaged is left for the one before.
        """
        found = jointly.lead("the choice of a checkpoint", self._candidates)
        for id in found:
            try:
                state = jointly.do("building the state", lambda: build(self._extra_of(id)))  # noqa: B023 - called here
                return self.store.load(id, into=state, strict="parts")
            except (IntegrityError, FormatError) as error:
                if id == found[-1]:
                    raise
                if jointly.leads:
                    message = f"{id} is damaged, trying the one before: {error}"
                    warnings.warn(message, FallbackWarning, stacklevel=4)
        raise AssertionError

    def _candidates(self) -> list[str]:
        """The ids of those to try, one after the other."""
        # Also where all are wanted: it tells a store whose records are all damaged from an empty one.
        chosen = self.store.resolve(self.selector)
        if self.selector != "latest":
            return [chosen.id]
        return [c.id for c in self.store.checkpoints()[::-1] if c.order <= chosen.order]

    def _extra_of(self, id: str) -> Mapping[str, Any]:
        """The user's own plain values in a checkpoint; none in one that no run made."""
        tree = self.store.contents(self.store.resolve(id)).parts[0].tree
        if not isinstance(tree, dict) or PART not in tree:
            return {}
        values: Mapping[str, Any] = self.store.load(id, only=[PART], rank=0)[PART].get("extra", {})
        return values


def _as_place(select: str | os.PathLike[str]) -> tuple[Place, str] | None:
    """URL and selector, where ``select`` is a path or a URL: of a store, or of a checkpoint's folder in it."""
    text = os.fspath(select)
    if isinstance(select, str) and "/" not in text and os.sep not in text:
        return None
    path = PurePath(text)
    if "://" not in text and path.parent.name == "checkpoints" and try_id(path.name) is not None:
        return str(path.parent.parent), path.name
    return text, "latest"


def refuse_fresh(store: Store, what: str) -> None:
    """Nothing, where ``store`` has no checkpoints.

    Raises:
        ExistsError: it has some, which a run that begins anew would be mixed up with.
    """
    if there := store.checkpoints():
        raise ExistsError(
            f"{what}, and {store.url} has {len(there)} checkpoints, the newest of step {there[-1].step}: resume() goes "
            "on there; take another place for another run, or say new_line=True to begin a new line of history in this "
            "one"
        )


def options_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What optimizers are set to, by a name for people; before a load and after it, to compare."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        for number, optimizer in enumerate(parts.optimizers(value)):
            for index, group in enumerate(optimizer.param_groups):
                where = name + (f" {number + 1}" if number else "") + (f" group {index}" if index else "")
                # With a scheduler the rate changes all the time; what it began with does not.
                rate = "initial_lr" if "initial_lr" in group else "lr"
                # So do momentum and betas under a scheduler that cycles them.
                changing = {"params", "lr", "initial_lr"} | (
                    {"momentum", "betas"} if "max_momentum" in group else set()
                )
                for option, setting in group.items():
                    if option == rate or (option not in changing and _is_plain(setting)):
                        found[f"{where}: {'lr' if option == rate else option}"] = _as_plain(setting)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def differences(saved: Mapping[str, Any], here: Mapping[str, Any], which: str) -> list[str]:
    """Sentences on what differs of what both have."""
    return [
        f"{name} is {here[name]!r:.80} here and was {saved[name]!r:.80} when it was saved; {which}"
        for name in here
        if name in saved and not _are_alike(saved[name], here[name])
    ]


def only_one_has(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Sentences on what only one of them has, where both have something."""
    if not saved or not here:
        return []
    gone = [
        f"{name} was {saved[name]!r:.80} when it was saved and isn't set here" for name in saved if name not in here
    ]
    new = [f"{name} is {here[name]!r:.80} here and wasn't set when it was saved" for name in here if name not in saved]
    return gone + new


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two values mean the same: a file that was read has lists where the program has tuples."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_are_alike, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_are_alike(one[key], other[key]) for key in one)
    # Not ==, first: it isn't true of nan, and of arrays it is no answer.
    return repr(one) == repr(other) or (_is_plain(one) and _is_plain(other) and bool(one == other))


def left_out(state: Mapping[str, Any], restore: Parts) -> list[str]:
    """The entries of ``state`` that aren't wanted back."""
    wanted = parts.chosen(state, restore)
    return [name for name in state if name not in wanted and parts.kind_of(name, state[name]) != "data"]


def target(state: Mapping[str, Any], run: Run, restore: Parts) -> State:
    """What is restored."""
    sources = parts.unread(state, ()) if restore.data else {}
    return {**parts.chosen(state, restore), **sources, PART: run}


def states_of(store: View, checkpoint: Checkpoint, place: tuple[int, int]) -> Sequence[Mapping[str, Any]] | None:
    """What each of the ranks that saved knew of the run; None where there are as many now.

    Args:
        place: which one of how many ranks this is.
    """
    if checkpoint.world_size == place[1]:
        return None
    return [store.load(checkpoint.id, only=[PART], rank=rank)[PART] for rank in range(checkpoint.world_size)]


def unused(loaded: Loaded, left: Sequence[str]) -> list[str]:
    """What the checkpoint has and nobody here asked for, or knows."""
    return [name for name in loaded.unexpected if name not in left]


def prove(store: View, checkpoint: Checkpoint, state: State, missing: Sequence[str]) -> None:
    """Nothing, where all of ``state`` but what is ``missing`` is bit for bit what the checkpoint holds.

    Raises:
        IntegrityError: it is not; what differs first.
    """
    only = [glob.escape(name) for name in state if name not in missing]
    if wrong := store.compare(checkpoint.id, state, only=only):
        more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise IntegrityError(
            f"{wrong[0]} is not what {checkpoint.id} holds{more}: it was converted, or what restores it changes it",
            id=checkpoint.id,
        )
