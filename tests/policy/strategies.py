"""Any run, and any schedule that fits it."""

from __future__ import annotations

from functools import reduce
from operator import or_

from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.policy.progress import Length
from ckptstore.policy.schedule import Schedule


@st.composite
def lengths(draw: st.DrawFn) -> Length:
    """A run of which all is known, as everything can be told then."""
    total = draw(st.integers(1, 120))
    epochs = draw(st.integers(1, min(total, 6)))
    # By its own length of an epoch, a run may end before its last epoch does.
    each = draw(st.sampled_from([None, None, total // epochs, total // epochs + 3]))
    tokens, step_s = draw(st.integers(1, 50)), draw(st.sampled_from([0.1, 0.7, 1.0, 13.0, 60.0]))
    return Length.of(total, epochs, steps_per_epoch=each, tokens_per_step=tokens, step_s=step_s)


def parts(length: Length) -> st.SearchStrategy[Schedule]:
    """Any one schedule that ``enumerate`` knows all of."""
    total = length.require_total("a schedule")
    tokens = total * (length.tokens_per_step or 1)
    count = st.integers(1, total)
    fits = [
        st.lists(st.integers(0, total), min_size=1, max_size=8).map(lambda steps: cs.at(*steps)),
        st.tuples(st.integers(0, total), st.integers(0, total), st.integers(1, 9)).map(
            lambda it: cs.at(f"{min(it[:2])}-{max(it[:2])}/{it[2]}")
        ),
        count.map(lambda n: cs.every(steps=n)),
        st.floats(0.01, 1).map(lambda share: cs.every(fraction=share)),
        st.integers(1, tokens).map(lambda n: cs.every(tokens=n)),
        st.floats(0.005, 30).map(lambda minutes: cs.every(minutes=minutes)),
        st.lists(count, min_size=1, max_size=4).map(lambda it: cs.milestones(it, of="steps")),
        st.lists(st.integers(1, tokens), min_size=1, max_size=4).map(lambda it: cs.milestones(it, of="tokens")),
        plans(),
    ]
    if ends := len(length.epoch_ends()):
        fits.append(st.integers(1, ends).map(lambda n: cs.every(epochs=n)))
    return st.one_of(fits)


@st.composite
def plans(draw: st.DrawFn) -> Schedule:
    """Any ``epoch_plan``."""
    then = draw(st.sampled_from(["log", "linear", "log_offset"]))
    first, least = draw(st.integers(0, 30)), draw(st.none() | st.integers(1, 20))
    if then == "linear":
        return cs.epoch_plan(first, "linear", interval=draw(st.none() | st.integers(1, 30)), min_interval=least)
    base = draw(st.sampled_from([2, 3, 10, 1.01, 1.5, 2.0, 1e6]))
    return cs.epoch_plan(first, then, base=base, min_interval=least)  # type: ignore[arg-type]


@st.composite
def scheduled(draw: st.DrawFn) -> tuple[Schedule, Length]:
    """A schedule of one to three parts, and a run that it fits."""
    length = draw(lengths())
    return reduce(or_, draw(st.lists(parts(length), min_size=1, max_size=3))), length
