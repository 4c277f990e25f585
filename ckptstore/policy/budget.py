"""An interval that follows from what saving costs and how often the machine fails."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ckptstore.errors import FormatError
from ckptstore.policy.progress import Costs, Length, Past, Progress, is_number
from ckptstore.policy.schedule import Schedule
from ckptstore.units import duration_s, duration_text

_SHARE = re.compile(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", re.ASCII)
_LONGEST_S = 86400 * 1e6
FIRST_S = 60.0
"""After so much training the first save is made: before it nobody knows what one costs."""


@dataclass(frozen=True)
class Interval:
    """What ``Budget`` chose, and what follows from it.

    Attributes:
        interval_s: training between two saves, in seconds.
        overhead: the share of time that saves keep training waiting, at this interval.
        loss_s: training that one failure costs on average, in seconds: half an interval, and what was still being
            saved.
        bound_by: what decided: "mtbf" (more often would cost more than it saves), "overhead", "save time" or, where
            all of these are shorter than one step, "step time".
    """

    interval_s: float
    overhead: float
    loss_s: float
    bound_by: str

    def __str__(self) -> str:
        return (
            f"a save every {duration_text(self.interval_s)} (bound by {self.bound_by}): training waits "
            f"{self.overhead:.2%} of the time, a failure costs {self.loss_s / 60:.1f} minutes on average"
        )


@dataclass(frozen=True)
class Budget(Schedule):
    """See ``budget``."""

    overhead: float
    mtbf_s: float

    def interval(self, costs: Costs) -> Interval:
        """The interval for a run whose steps and saves cost what was measured."""
        stall = max(costs.stall_s, 1e-9)
        # Daly 2006, equation 37: the optimum of the complete model to second order; Young's is its first term.
        ratio = stall / (2 * self.mtbf_s)
        best = self.mtbf_s
        if ratio < 1:
            best = math.sqrt(2 * stall * self.mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall
        overhead = stall / self.overhead - stall
        limits = {"mtbf": best, "overhead": overhead, "save time": costs.save_s, "step time": costs.step_s}
        bound_by = max(limits, key=lambda name: limits[name])
        interval = limits[bound_by]
        return Interval(interval, stall / (interval + stall), interval / 2 + costs.save_s, bound_by)

    def due(self, now: Progress, past: Past, length: Length) -> list[str]:
        """Where so much was trained since the last save that one more is worth what it costs."""
        since = now.elapsed_s - past.saved_s
        if now.costs is None:
            return ["budget, the first save"] if now.step > 0 and since >= FIRST_S else []
        interval = self.interval(now.costs).interval_s
        return [f"budget, every {duration_text(interval)}"] if since >= interval else []

    def enumerate(self, length: Length) -> list[int]:
        """Nothing that could be known."""
        return []

    def open_ends(self, length: Length) -> list[str]:
        """All of it."""
        return [f"{self} depends on what steps and saves take"]

    def __str__(self) -> str:
        # As people write them where that is the same number, or else the numbers.
        percent, mtbf = f"{self.overhead * 100:.9g}%", duration_text(self.mtbf_s)
        match = _SHARE.fullmatch(percent)
        share: object = percent if match and float(match[1]) / 100 == self.overhead else self.overhead
        return f"budget(overhead={share!r}, mtbf={mtbf if duration_s(mtbf) == self.mtbf_s else self.mtbf_s!r})"


def budget(overhead: float | str = "1%", mtbf: float | str = "6h") -> Budget:
    """Save as often as it pays: what saves cost is measured as the run goes, and the interval follows.

    The interval is the one that costs least in all, saving and repeating what failures destroy (J. W. Young, "A first
    order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher order estimate of
    the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, equation 37), but never one at which saves
    would keep training waiting for more than ``overhead`` of the time, nor a shorter one than a save takes. A manual
    save counts: what matters is how much would be lost. ``interval`` tells it, and what a failure costs.

    Args:
        overhead: share of the time, as "1%" or 0.01.
        mtbf: mean time between failures of the whole job, as "6h" or in seconds.

    Raises:
        FormatError: no share over 0 and below 100 %, or no duration.
    """
    match = _SHARE.fullmatch(overhead) if isinstance(overhead, str) else None
    share = float(match[1]) / 100 if match else overhead
    if not is_number(share) or not 0 < share < 1:  # type: ignore[operator]
        raise FormatError(f"budget(overhead={overhead!r}) must be over 0 and below 100 %, as '1%' or 0.01")
    seconds = duration_s(mtbf, "budget(mtbf=…)")
    if not 0 < seconds <= _LONGEST_S:
        raise FormatError(f"budget(mtbf={mtbf!r}) must be over 0 and below {_LONGEST_S / 86400:g}d, as '6h'")
    return Budget(float(share), seconds)
