"""How a checkpoint and the target of a load differ."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ckptstore.errors import StateError


@dataclass
class LoadReport:
    """Names, sorted.

    Attributes:
        missing: in the target, and not in the checkpoint.
        unexpected: in the checkpoint, and not in the target.
        mismatched: in both, and not of a kind, as ``name: saved F32 [3, 4], target F32 [4, 4]``.
        cast: converted into the target's element type.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)

    def add_apart(self, missing: list[str], unexpected: list[str]) -> None:
        """Add whole entries of the state that only one of the two has, where these are no misfits."""
        self.missing = sorted(self.missing + missing)
        self.unexpected = sorted(self.unexpected + unexpected)

    def close(self, *, strict: bool) -> None:
        """Sort, and say what has to be said.

        Raises:
            StateError: ``strict``, and anything is missing, unexpected or mismatched. All of it is listed.
        """
        for names in (self.missing, self.unexpected, self.mismatched, self.cast):
            names.sort()
        differences = {"missing": self.missing, "unexpected": self.unexpected, "mismatched": self.mismatched}
        found = {title: names for title, names in differences.items() if names}
        if strict and found:
            lists = "; ".join(f"{title}: {', '.join(names)}" for title, names in found.items())
            first = next(iter(found.values()))[0]
            raise StateError(
                f"the checkpoint doesn't fit the target ({lists}). Nothing was changed. "
                "strict=False loads what fits, strict='parts' the entries that both have, only=['model/*'] a part",
                path=first.partition(": ")[0],
            )
        if self.cast:
            warnings.warn(
                f"saved with another element type and converted into the target's: {', '.join(self.cast)}",
                # The line of whoever called load().
                stacklevel=5,
            )
