"""How a run begins: where it goes on, what is brought back, and what is told of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

from ckptstore.config.settings import Config, Parts
from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.loader import Loaded
from ckptstore.errors import NoCheckpointError, StateError
from ckptstore.state import fence
from ckptstore.state.staging import steps_begun
from ckptstore.trainer import parts, resuming
from ckptstore.trainer.decisions import past_of
from ckptstore.trainer.events import Resumed
from ckptstore.trainer.run import PART
from ckptstore.trainer.together import Together

State: TypeAlias = Mapping[str, Any]


class Beginning(Together):
    """The first half of ``Checkpointer``."""

    _build: Callable[[Mapping[str, Any]], State] | None = None
    _config: Config | None = None

    def resume(
        self,
        select: bool | str | os.PathLike[str] | None = None,
        *,
        restore: Parts | None = None,
        check: bool = False,
        new_line: bool = False,
    ) -> Resumed:
        """Go on where a checkpoint was made, or begin; to be called once, before the first step, by all ranks of a job.

        It needn't be as many ranks as had saved.

        Args:
            select: True, the default: the newest good checkpoint, or a fresh start where there is none. False: a fresh
                start. A selector, as ``"best:val_loss"``: that one. A path or URL of another store, or of the folder of
                a checkpoint in one: from there.
            restore: which of optimizer, scheduler, random state and position in the data are brought back; all else
                keeps the value that it has.
            check: prove afterwards that everything is as it was saved, bit for bit.
            new_line: begin anew, or from another store, although this one has checkpoints.

        Raises:
            ExistsError: a fresh start, or another store's checkpoint, where this one has some.
            NotFoundError: no such checkpoint.
            StateError: the checkpoint doesn't fit the state; nothing was changed.
            IntegrityError: all checkpoints are damaged, or ``check`` found what differs.
        """
        if self._resumed is not None or self._closed:
            raise StateError("resume() was called already: make another Checkpointer for another run", path="")
        config = self._config
        select = select if select is not None else (config.resume if config is not None else True)
        restore = restore or (config.restore if config is not None else Parts())
        if self._minds_signals:
            self._signals.install(with_ear=self._watch.has_deadline or self.store.ranks is not None)
        try:
            self._join()
            # From here on: loading may take longer than a deadline allows.
            self._watch.start(self._team)
            with ExitStack() as stack:
                source = self._jointly.do(f"resume({select!r})", lambda: self._source(select, new_line, stack))
                self._resumed = self._begin(source, select is True, restore, check)
        except BaseException:
            self._signals.restore()
            self._watch.end()
            raise
        self._began(self._resumed)
        return self._resumed

    def _source(
        self, select: bool | str | os.PathLike[str], new_line: bool, stack: ExitStack
    ) -> resuming.Source | None:
        source = resuming.Source.of(self.store, select, stack)
        if self._jointly.leads and not new_line and (source is None or source.store is not self.store):
            resuming.refuse_fresh(self.store, f"resume({select!r}) would begin anew")
        return source

    def _begin(self, source: resuming.Source | None, may_be_fresh: bool, restore: Parts, check: bool) -> Resumed:
        if source is not None:
            try:
                return self._load(source, restore, check)
            except NoCheckpointError:
                if not may_be_fresh:
                    raise
        if (build := self._build) is not None:
            self.state = self._jointly.do("building the state", lambda: parts.check_state(build({})))
        self._register()
        return Resumed(None, self.store.url)

    def _load(self, source: resuming.Source, restore: Parts, check: bool) -> Resumed:
        before: dict[str, Any] = {}
        if self._build is not None:
            build = self._build

            def built(extra: Mapping[str, Any]) -> dict[str, Any]:
                self.state = parts.check_state(build(extra))
                before.update(resuming.options_of(self.state))
                return resuming.target(self.state, self._run, restore)

            loaded = source.load_built(built, self._jointly)
        else:
            before.update(resuming.options_of(self.state))
            loaded = source.load(resuming.target(self.state, self._run, restore))
        self._register()
        checkpoint = loaded.checkpoint
        after = resuming.options_of(self.state)
        notes = resuming.differences(after, before, "the saved value is used") if restore.optimizer else []
        notes += self._jointly.do("going on", lambda: self._go_on(source, checkpoint, restore))
        if check:
            self._jointly.do("the check", lambda: self._prove(source, loaded, restore))
        left = resuming.left_out(self.state, restore)
        # A source that is read by way of the run stands there, not by itself.
        kept = [name for name in loaded.missing if parts.kind_of(name, self.state.get(name)) != "data"]
        return Resumed(checkpoint, source.store.url, kept, resuming.unused(loaded, left), notes)

    def _prove(self, source: resuming.Source, loaded: Loaded, restore: Parts) -> None:
        self._feeds.check(strict=True)
        wanted = resuming.target(self.state, self._run, restore)
        if not (restore.rng and restore.data and loaded.checkpoint.world_size == self._place[1]):
            del wanted[PART]
        resuming.prove(source.store, loaded.checkpoint, wanted, loaded.missing)

    def _go_on(self, source: resuming.Source, checkpoint: Checkpoint, restore: Parts) -> list[str]:
        """Put counters, memory, random state and positions in place; what differs."""
        if self._run.loaded is None:
            # It was saved by hand: what its record says is all that is known.
            self._counters.go_on(checkpoint.step, checkpoint.epoch or 0, 0, 0.0)
            line = [c for c in source.store.checkpoints() if c.order <= checkpoint.order]
            self._decisions.resume_after(self.progress, line)
            return []
        others = resuming.states_of(source.store, checkpoint, self._place) if restore.data else None
        self._run.restore(rng=restore.rng, data=restore.data, place=self._place, others=others)
        facts = self._run.facts
        saved = facts["progress"]
        self._counters.go_on(saved["step"], saved["epoch"], saved["tokens"], saved["elapsed_s"])
        self._decisions.resume(past_of(facts.get("past", {}), self.progress))
        self._reports.best.update(facts.get("best", {}))
        if self._guard is not None and facts.get("guard"):
            self._guard.watch.load_state_dict(facts["guard"])
        given, here = facts.get("hyperparameters", {}), self._hyperparameters
        return resuming.differences(given, here, "the value here is used") + resuming.only_one_has(given, here)

    def _register(self) -> None:
        # Before the training step is compiled: a hook that comes later makes the compiler start again.
        fence(*parts.optimizers(self.state))

    def _began(self, resumed: Resumed) -> None:
        self._steps_seen = steps_begun()
        if resumed:
            counters = self._counters
            self._saved_at = (counters.step, counters.epoch) if resumed.url == self.store.url else None
            self._evaluations.resume(self.progress)
            self._counted.resume(self._decisions.past)
        self._say(str(resumed))
        for sentence in () if self._follows else _warnings(resumed):
            warnings.warn(sentence, UserWarning, stacklevel=3)
        self._tell("on_resumed", resumed)
        if not resumed:
            # The state before any update.
            self._decide()


def _warnings(resumed: Resumed) -> Iterator[str]:
    for name in resumed.kept:
        what = "random state and position in the data" if name == PART else repr(name)
        yield f"the checkpoint has no {what}: it keeps the value that it has"
    for name in resumed.unused:
        yield f"the checkpoint has {name!r}, which nothing here takes"
    yield from resumed.differences
