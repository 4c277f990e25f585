"""The folders that ``Accelerator.save_state`` writes.

Under automatic naming ``checkpoint_7`` is the eighth save, not a step. The ``step`` in ``random_states_0.pkl`` is none
either: it counts the batches of the running pass over the data, and begins again with the next. What counts steps is
the state of an optimizer such as Adam (see ``told``).
"""

from __future__ import annotations

import re

from ckptstore.tools.importing.folder import Folder, number_in
from ckptstore.tools.importing.noted import Noted

_STEP = re.compile(r"(?:checkpoint-|(?:[a-z]+_)?step[_-])([0-9]+)")
"""As the examples of accelerate and diffusers name their folders."""
_EPOCH = re.compile(r"epoch[_-]([0-9]+)")
_MARKS = re.compile(
    r"random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin",
    re.ASCII,
)


def noted(folder: Folder) -> Noted | None:
    """What the folder's name tells; None if ``save_state`` didn't write it."""
    if not any(_MARKS.fullmatch(name) for name in folder.files):
        return None
    found = Noted("accelerate", step=number_in(_STEP, folder.path.name))
    running = number_in(_EPOCH, folder.path.name)
    if running is not None:
        # The examples number epochs from 0, and save at the end of one.
        found.epoch, found.reasons = running + 1, (f"epoch {running + 1}",)
    if found.step is None:
        found.facts_in["step"] = "optimizer/state/0/step"
    return found
