"""The checkpoints that a load tries, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from ckptstore.engine.catalogue import Catalogue, Checkpoint
from ckptstore.engine.damage import FallbackWarning, all_damaged, as_error, is_newer
from ckptstore.errors import CheckpointError, IntegrityError


class Candidates:
    """``latest`` means the newest good one; every other selector just the one that it names.

    Attributes:
        skipped: newer ones that were damaged, with the error of each.
    """

    def __init__(self, selector: str, catalogue: Catalogue, first: Checkpoint, url: str) -> None:
        self._url = url
        self.skipped: dict[str, CheckpointError] = {}
        self._goes_on = selector == "latest"
        if self._goes_on:
            self.skipped |= {d.id: as_error(d) for d in catalogue.damaged if d.id and is_newer(d, first)}
        self._left = iter(reversed(catalogue.checkpoints)) if self._goes_on else iter([first])

    def __iter__(self) -> Iterator[Checkpoint]:
        return self._left

    def give_up(self, checkpoint: Checkpoint, error: CheckpointError) -> None:
        """``checkpoint`` is damaged: go on with the one before.

        Raises:
            CheckpointError: ``error``, where there is none before.
        """
        if not self._goes_on:
            error.add_note("load('latest') goes back to the newest good checkpoint; verify() finds all damage")
            raise error
        self.skipped[checkpoint.id] = error
        message = f"{checkpoint.id} is damaged, trying the one before: {error}"
        # The line of whoever called load().
        warnings.warn(message, FallbackWarning, stacklevel=3)

    def none_left(self) -> IntegrityError:
        """The error to raise where all were given up."""
        return all_damaged(self._url, {id: str(error) for id, error in self.skipped.items()})
