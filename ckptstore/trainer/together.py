"""Boundaries of several ranks: all meet where something is to be done, and do what rank 0 does.

Every rank counts alike and knows by itself where a schedule of steps, epochs or tokens is due. All else that a run goes
by, as clocks, metrics, signals and what came of a save, may differ from rank to rank: what rank 0 sees of it counts.
Where that wants something, the ranks agree on a boundary ahead (see ``agreement``). Where they meet, rank 0 does what a
run of one process would do there, and says it to the others.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

from ckptstore.engine.background import SaveHandle
from ckptstore.engine.saver import Durable
from ckptstore.errors import CheckpointError, FormatError, SaveFailedError, StorageError
from ckptstore.policy.guard import Divergence
from ckptstore.policy.progress import Progress
from ckptstore.trainer.agreement import idle_pause_s
from ckptstore.trainer.boundary import Boundary
from ckptstore.trainer.decisions import Counted
from ckptstore.trainer.guarding import error_of
from ckptstore.trainer.jointly import Jointly
from ckptstore.trainer.saving import Facts
from ckptstore.trainer.team import Said, Team, raised, told_of

_log = logging.getLogger("ckptstore")

_MARGIN_S = 0.3
"""How much farther ahead ranks agree to meet than they need to hear of it: so training doesn't wait for messages."""


class Together(Boundary):
    """What ``Boundary`` does, with all ranks of a job; the same as there where there is only one."""

    _team: Team | None = None
    # Which one of how many ranks this is.
    _place = (0, 1)
    _jointly: Jointly
    # When all ranks meet without a message.
    _counted: Counted
    # What ends the run as soon as all meet: an error of rank 0's, and what the guard of this rank has found.
    _fatal: CheckpointError | None = None
    _diverged: Divergence | None = None
    # What this rank has asked rank 0 for.
    _asked: frozenset[str] = frozenset()
    # A metric was reported that the schedule goes by.
    _news = False
    # The signal that rank 0 has got when all met last.
    _stopped: int | None = None

    def _join(self) -> None:
        """Be one of the ranks of this job, if there are several.

        Raises:
            FormatError: something can't be decided by all ranks alike.
        """
        crew = self.store.ranks
        self._jointly = Jointly(crew)
        self._counted = Counted(self._decisions.schedule, self._decisions.length)
        if crew is None:
            return
        self._place = (crew.rank, crew.size)
        self._jointly.do("resume()", self._check_evaluations)
        counters, ahead_s = self._counters, idle_pause_s(crew.size) + _MARGIN_S
        self._team = Team(
            crew,
            position=lambda: counters.step + counters.epoch,
            ahead=lambda: math.ceil(ahead_s * counters.steps_here / max(counters.elapsed_here_s, 1e-9)),
            wants=self._wants,
            told=self._told,
            asks=self._asks,
            heed=self._heed,
        )
        if not crew.leads:
            self._listeners, self._on_step = [], []

    def _check_evaluations(self) -> None:
        if not self._evaluations.is_counted():
            raise FormatError(
                "evaluate= goes by time or metrics, which differ from rank to rank: write it in steps, epochs or tokens"
            )

    @property
    def _follows(self) -> bool:
        """Whether this is another rank than the first."""
        return self._team is not None and not self._team.leads

    # -- in the watch thread -----------------------------------------------------------------------------

    def _wants(self) -> int | None:
        """Rank 0: whether there is something that all should meet for: the signal that ends the run, or 0 else."""
        signals = self._signals
        if signals.came is not None:
            return signals.came[0]
        others = (signals.save, self._carried or None, self._fatal, self._diverged)
        return 0 if any(each is not None for each in others) else None

    def _told(self, signum: int) -> None:
        """The others: the deadline counts from now on here, too."""
        if signum and self._signals.came is None:
            self._asked |= {"stop"}
            self._signals.came = signum, time.monotonic()

    def _asks(self) -> Iterator[tuple[str, str]]:
        """The others: what this rank wants of all, once."""
        signals = self._signals
        # Each is done with only when it was passed on.
        if signals.save is not None:
            yield "save", signals.save
            signals.save = None
        if signals.came is not None and "stop" not in self._asked:
            yield "stop", str(signals.came[0])
            self._asked |= {"stop"}
        if self._diverged is not None and "diverged" not in self._asked:
            yield "diverged", json.dumps(vars(self._diverged))
            self._asked |= {"diverged"}

    def _heed(self, kind: str, what: str) -> None:
        """Rank 0: as if it had happened here."""
        if kind == "stop":
            self._signals.end_by(int(what))
        elif kind == "save":
            self._signals.save = what
        elif self._diverged is None:
            self._diverged = Divergence(**json.loads(what))

    # -- boundaries --------------------------------------------------------------------------------------

    def _boundary(self) -> None:
        if self._team is None:
            super()._boundary()
        elif self._is_time() | self._all_know(self._undecided):
            self._meet(super()._boundary)
        elif self._team.leads:
            self._look_alone()
            self._carried = self._pending()
        else:
            self._undecided = False

    def _linger(self) -> None:
        if self._team is None:
            super()._linger()
        elif self._is_time():
            self._meet(super()._linger)
        elif self._team.leads:
            self._look_alone()

    def _decide(self) -> None:
        if self._team is None:
            super()._decide()
        elif self._all_know(True):
            self._meet(super()._decide)
        elif self._team.leads:
            self._carried += self._decisions.due(self.progress)

    def _is_time(self) -> bool:
        assert self._team is not None
        return self._team.agreement.is_time(self._counters.step + self._counters.epoch)

    def _all_know(self, asks: bool) -> bool:
        """Whether something is due that all ranks know of by themselves."""
        news, self._news = self._news, False
        return (asks and self._counted.due(self._counted_progress())) or news

    def _counted_progress(self) -> Progress:
        counters = self._counters
        return Progress(counters.step, counters.epoch, counters.tokens)

    def _look_alone(self) -> None:
        """Rank 0 tells what came of a save; where it ends the run, it does so when all meet."""
        try:
            self._collect()
        except CheckpointError as error:
            self._fatal = error

    # -- meetings ----------------------------------------------------------------------------------------

    def _meet(self, act: Callable[[], SaveHandle | None], *, durable: Durable | None = None) -> SaveHandle | None:
        """Rank 0 does ``act``, the others do what it says."""
        team = self._team
        if team is None:
            return act()
        if not team.leads:
            return self._follow(team, durable)
        team.agreement.begin_meeting()
        try:
            self._end_if_fatal()
            handle = act()
        except BaseException as error:
            with suppress(StorageError):
                team.say(**told_of(error))
            raise
        finally:
            team.agreement.end_meeting()
        team.say("done", stop=self._signals.stop, at=[self._counters.step, self._counters.epoch])
        return handle

    def _end_if_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._diverged is not None:
            self._end_astray(self._diverged)

    def _announce(self, how: Literal["begin", "run"], facts: Facts) -> None:
        if self._team is not None:
            known = {name: self._run.facts[name] for name in ("progress", "past", "best")}
            self._team.say(how, facts=facts, known=known)

    def _follow(self, team: Team, durable: Durable | None) -> SaveHandle | None:
        """Do what rank 0 says, until it goes on; the last save in the background."""
        self._undecided, handle = False, None
        while (said := team.hear())["what"] in ("begin", "run"):
            handle = self._save_as_told(said, durable)
        if said["what"] != "done":
            raise raised(said)
        here = [self._counters.step, self._counters.epoch]
        if said["at"] != here:
            raise SaveFailedError(
                f"rank {team.rank} is at step {here[0]}, epoch {here[1]}, and rank 0 at step {said['at'][0]}, epoch "
                f"{said['at'][1]}: every rank must call step(), report(), save() and end_epoch() alike"
            )
        self._stopped = said["stop"]
        return handle

    def _save_as_told(self, said: Said, durable: Durable | None) -> SaveHandle | None:
        counters = self._counters
        # Its own counts: all fail where this rank isn't where rank 0 is.
        told: Facts = said["facts"]
        facts = Facts(
            step=counters.step,
            epoch=counters.epoch,
            metrics=told["metrics"],
            modes=told["modes"],
            reasons=told["reasons"],
        )
        self._reports.best = dict(said["known"]["best"])
        self._decisions.reported = {}
        self._forget_outcome()
        state = self._state_with(said["known"])
        try:
            if said["what"] == "begin":
                return self._saving.begin(state, facts, durable=durable)
            self._saving.run(state, facts, durable=durable)
        except CheckpointError as error:
            # What comes of it, rank 0 says next.
            _log.debug("step %d isn't saved by this rank: %s", counters.step, error)
        return None

    def _forget_outcome(self) -> None:
        """The others wait for their part of the save that was under way; what came of it, rank 0 tells."""
        with suppress(CheckpointError):
            self._saving.collect(wait=True)

    # -- what else differs -------------------------------------------------------------------------------

    def _see(self, step: int, values: Mapping[str, Any]) -> None:
        if self._team is None:
            super()._see(step, values)
        elif self._guard is not None and self._diverged is None:
            # All end together, a little later.
            self._diverged = self._guard.see(step, values)

    def check(self) -> None:
        """Mind signals now, as in the midst of a long evaluation.

        Several ranks may be anywhere in their evaluations: they mind signals when these are over.

        Raises:
            SystemExit: one came, and the state is saved.
        """
        if self._team is None:
            super().check()

    def _say(self, sentence: str) -> None:
        if not self._follows:
            super()._say(sentence)

    def _kept_bytes(self) -> int | None:
        return None if self._follows else super()._kept_bytes()

    # -- the end -----------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._team is not None:
            self._team.leave(error)
        super().__exit__(kind, error, trace)

    def _save_the_end(self, *, final: bool, broken: bool) -> None:
        team = self._team
        if team is None:
            super()._save_the_end(final=final, broken=broken)
        elif broken:
            self._end_alone()
        else:
            if team.leads:
                team.agreement.finish()
            else:
                self._forget_outcome()
            self._meet(lambda: super(Together, self)._save_the_end(final=final, broken=False))
            if not team.leads and self._stopped is not None:
                self._signals.end_by(self._stopped)
            if not team.leads and self._diverged is not None:
                # Too late for all to hear of it.
                raise error_of(self._diverged, self.store)

    def _end_alone(self) -> None:
        """Others may be anywhere: no further save begins, and the one that is under way comes to its end."""
        if self._follows:
            self._forget_outcome()
        elif (failed := self._settle()) is not None:
            raise failed.error
