"""What a checkpoint knows of the run itself: how far it has come, what it remembers, its randomness, its data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptstore.config.settings import Parts
from ckptstore.errors import FormatError
from ckptstore.policy.progress import Progress
from ckptstore.state.rng import RNG, derive
from ckptstore.trainer.data import Feeds

PART = "trainer"
"""The entry of the state that holds it."""


@dataclass
class Counters:
    """How far a run has come, over all its processes.

    Attributes:
        step, epoch, tokens: as in ``Progress``.
        steps_here: of ``step``, those of this process.
    """

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    steps_here: int = 0
    _before_s: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_here_s(self) -> float:
        """Seconds of this process."""
        return time.perf_counter() - self._began

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, over all processes."""
        return self._before_s + self.elapsed_here_s

    def go_on(self, step: int, epoch: int, tokens: int, elapsed_s: float) -> None:
        """Count on from there."""
        self.step, self.epoch, self.tokens, self._before_s = step, epoch, tokens, elapsed_s
        self.steps_here, self._began = 0, time.perf_counter()


class Run:
    """Stands in the state as ``trainer``: saved with every checkpoint, and given back by ``resume``.

    Attributes:
        include: whether random state and positions are saved.
        loaded: what was loaded, None before it.
        extra: the user's own plain values.
        feeds: the positions in the data.
        facts: all else that is saved, plain: of the checkpoint that was loaded, or is being saved.
    """

    def __init__(self, feeds: Feeds) -> None:
        self.feeds = feeds
        self.extra: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.include = Parts()
        self.loaded: Mapping[str, Any] | None = None
        self._rng = RNG()

    def state_dict(self) -> dict[str, Any]:
        """All of it that is to be saved."""
        state = {**self.facts, "extra": self.extra}
        if self.include.rng:
            state["rng"] = self._rng.state_dict()
        if self.include.data:
            state["data"] = self.feeds.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep ``state``, to be put in place by ``restore`` when all else was loaded.

        Raises:
            FormatError: it is no state of a run.
        """
        if not isinstance(state.get("progress"), dict):
            raise FormatError(f"{PART!r} in the checkpoint is no state of a run")
        self.loaded = state

    def restore(
        self,
        *,
        rng: bool,
        data: bool,
        place: tuple[int, int] = (0, 1),
        others: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Put in place what was loaded: plain values, random state and positions in the data.

        Args:
            rng, data: whether these two are wanted.
            place: which one of how many ranks this is.
            others: where as many had not saved: what each of those that did knew.
        """
        assert self.loaded is not None
        state = dict(self.loaded)
        self.extra.clear()
        self.extra.update(state.pop("extra", {}))
        saved_rng, saved_data = state.pop("rng", None), state.pop("data", None)
        self.facts = state
        if rng and saved_rng is not None:
            self._rng.load_state_dict(saved_rng)
            if others is not None and place[0] >= len(others):
                # This rank is new: it draws other numbers than the one whose state it has.
                derive("rng", self._rng, place[0])
                saved_rng = self._rng.state_dict()
        if data and saved_data is not None:
            states = [saved_data] * place[1] if others is None else [other["data"] for other in others]
            self.feeds.load_state_dicts(states, *place, saved_rng if rng else None)


def progress_fields(now: Progress) -> dict[str, Any]:
    """``now`` as plain values, as far as a resumed run goes on with them."""
    return {
        "step": now.step,
        "epoch": now.epoch,
        "batch": now.batch,
        "tokens": now.tokens,
        "elapsed_s": now.elapsed_s,
    }
