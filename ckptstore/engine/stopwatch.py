"""How long a save takes, for its commit record: measured from the call on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptstore.format.records import TimingRecord

_DIGITS = 6


@dataclass(frozen=True)
class Stopwatch:
    """Measures one save.

    Attributes:
        began: when the caller was called, by ``time.perf_counter``.
        stalled: tells how many seconds the caller has waited so far, or None where that isn't known. None: it has
            waited all the time.
    """

    began: float = field(default_factory=time.perf_counter)
    stalled: Callable[[], float | None] | None = None

    def read(self) -> TimingRecord:
        """What it shows now."""
        save_s = time.perf_counter() - self.began
        stall_s = self.stalled() if self.stalled is not None else save_s
        # The caller's time is read a little later.
        waited_s = None if stall_s is None else round(min(stall_s, save_s), _DIGITS)
        return TimingRecord(save_s=round(save_s, _DIGITS), stall_s=waited_s)
