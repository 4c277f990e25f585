"""What changed from one checkpoint to another: structure, weights, values, random state, place in the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckptstore.engine.catalogue import Checkpoint
from ckptstore.engine.tensorreader import BlockCache
from ckptstore.engine.workers import Progress
from ckptstore.errors import StateError
from ckptstore.store import Store
from ckptstore.tools import difftrees
from ckptstore.tools.difftensors import KINDS, Comparison, TensorChange
from ckptstore.tools.difftrees import StepChange, ValueChange, sights
from ckptstore.tools.outline import nodes, wanted
from ckptstore.view import check_patterns


@dataclass(frozen=True)
class Diff:
    """What ``diff`` found.

    Attributes:
        before, after: the checkpoints.
        tensors: what became of tensors, what matters most first.
        values: what became of plain values, hyper-parameters of optimizers among them.
        generators: paths of random states that changed.
        steps: how far optimizers went on.
        position: how far the run and its data sources went on, in words.
        compared: tensors that were compared, the equal ones included.
        weights: those of them that belong to no optimizer and to no random state.
        read_bytes: what was read of both.
    """

    before: Checkpoint
    after: Checkpoint
    tensors: Sequence[TensorChange]
    values: Sequence[ValueChange]
    generators: Sequence[str]
    steps: Sequence[StepChange]
    position: Sequence[str]
    compared: int
    weights: Sequence[str]
    read_bytes: int

    @property
    def equal(self) -> bool:
        """Whether the states are the same, bit by bit."""
        return not (self.tensors or self.values or self.generators or self.steps or self.position)


def diff(
    store: Store,
    before: str,
    after: str,
    *,
    other: Store | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints, in one store or in two, however each is stored: compressed, or in shards of many ranks.

    Blocks that both have, at the same place of the same tensor, aren't read, but those of the first one where other
    blocks of their tensor differ, for its norm. Norms are summed in fp64. Memory is bounded.

    Tensors come in this order: removed, added, reshaped, cast, and changed ones by the norm of the difference relative
    to what was before.

    Args:
        store: where the first is, and the second.
        before, after: selectors.
        other: where the second one is, if not in ``store``.
        only: patterns of names, as ``["model/*"]``: of what is compared, tensors and values. None: all.
        progress: called with (bytes done, bytes in all), from any thread.

    Raises:
        NotFoundError, FormatError: no such checkpoint, no selector.
        StateError: a pattern matches nothing.
        IntegrityError: what has to be read is damaged.
    """
    check_patterns(only)
    patterns, place = list(only or ()), other or store
    sides = store.resolve(before), place.resolve(after)
    cache = BlockCache()
    with store.reader(sides[0].id, cache=cache) as one, place.reader(sides[1].id, cache=cache) as two:
        old, new = sights(one), sights(two)
        names = list(dict.fromkeys([*one.tensors, *two.tensors]))
        chosen = [name for name in names if wanted(name, patterns)]
        _check(patterns, names, old, new)
        comparison = Comparison(one, two, chosen)
        found = comparison.run(progress)
        differing = {change.name for change in found}
        counters = {name: path for name, path in old.steps.items() if name in comparison.numbers}
        apart = {**old.tensors(), **new.tensors(), **counters}
        others = {*apart, *old.slots, *new.slots}
        generators = difftrees.changed_generators(old, new, differing)
        return Diff(
            *sides,
            tensors=ordered([it for it in found if it.name not in apart]),
            values=difftrees.changed_values(old, new, patterns),
            generators=[path for path in generators if wanted(path.rpartition(": ")[2], patterns)],
            steps=difftrees.changed_steps(counters, comparison.numbers),
            position=difftrees.moved_position(old, new, patterns),
            compared=len(chosen),
            weights=[name for name in chosen if name not in others],
            read_bytes=one.read_bytes + two.read_bytes,
        )


def _check(patterns: Sequence[str], names: Sequence[str], old: difftrees.Sights, new: difftrees.Sights) -> None:
    paths = [path for side in (old, new) for path, _ in nodes(side.tree)]
    for pattern in patterns:
        if not any(wanted(name, [pattern]) for name in (*names, *paths)):
            raise StateError(
                f"only={pattern!r} matches nothing in either checkpoint: patterns are like 'model/*'", path="only"
            )


ORDERS = ("change", "share", "largest", "name")


def ordered(changes: Sequence[TensorChange], by: str = "change") -> list[TensorChange]:
    """Structure first, then by relative change, share of changed elements, or largest change; or all by name."""
    if by == "name":
        return sorted(changes, key=lambda it: it.name)

    def key(it: TensorChange) -> tuple[int, float, str]:
        amount = {"change": it.relative, "share": it.share, "largest": it.largest}[by]
        kind = KINDS.index(it.kind)
        # What can't be measured comes before what can.
        return kind, -math.inf if amount is None or math.isnan(amount) else -amount, it.name

    return sorted(changes, key=key)
