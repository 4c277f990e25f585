"""What two checkpoints hold besides tensors: values, random state, steps, and the place in the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ckptstore.engine.tensorreader import TensorReader
from ckptstore.errors import FormatError
from ckptstore.state.rng import GENERATORS
from ckptstore.tools.outline import TAG, inside, join, nodes, plain_values, tensor_of, wanted

_RUN = "ckptstore.trainer.run.Run"
"""The type of what a ``Checkpointer`` adds to the state."""


@dataclass(frozen=True)
class ValueChange:
    """What became of a value that is no tensor.

    Attributes:
        path: in the state.
        kind: "removed", "added" or "changed".
        before, after: the value on both sides, None where it isn't there.
    """

    path: str
    kind: Literal["removed", "added", "changed"]
    before: Any
    after: Any


@dataclass(frozen=True)
class StepChange:
    """So many parameters of an optimizer had the same number of steps, and have the same now."""

    path: str
    before: float
    after: float
    parameters: int


class Sights(NamedTuple):
    """One side's tree, and what in it is told otherwise than as values and tensors.

    Attributes:
        generators: by path, the node of each random state.
        steps: by the name of a tensor that counts steps, the path of its optimizer.
        slots: the tensors of optimizers.
        run: path and state of what the ``Checkpointer`` added.
    """

    tree: Any
    generators: dict[str, Any]
    steps: dict[str, str]
    slots: set[str]
    run: tuple[str, Mapping[str, Any]] | None

    def tensors(self) -> dict[str, str]:
        """The tensors of random states, each with its path there."""
        return {
            name: path
            for path, node in self.generators.items()
            for _, inner in nodes(node)
            if (name := tensor_of(inner)) is not None
        }


def sights(reader: TensorReader) -> Sights:
    """What there is to see.

    Raises:
        FormatError: the tree is malformed.
    """
    try:
        tree, trees = reader.tree, reader.contents.trees
        run = _run_of(tree)
        generators: dict[str, Any] = {}
        for rank, own in trees.items():
            found = dict(_generators(own))
            # What all ranks have in common is said once.
            generators |= {path if rank == 0 else f"rank {rank}: {path}": it for path, it in found.items()}
        return Sights(tree, generators, dict(_steps(tree)), set(_slots(tree)), run)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{reader.contents.commit.id}: its tree is malformed: {error}") from error


def _run_of(tree: Any) -> tuple[str, Mapping[str, Any]] | None:
    entries = tree.items() if isinstance(tree, dict) and TAG not in tree else ()
    for name, node in entries:
        if isinstance(node, dict) and node.get("type") == _RUN and isinstance(node.get("state"), dict):
            return name, node["state"]
    return None


def _generators(tree: Any) -> Iterator[tuple[str, Any]]:
    run = _run_of(tree)
    known = join(run[0], "rng") if run is not None else None
    for path, node in nodes(tree):
        kind = node.get(TAG) if isinstance(node, dict) else None
        if path == known or kind == "rng":
            # Python's, NumPy's and torch's by themselves.
            yield from ((where, part) for where, part in inside(node, path) or () if part != {})
        elif kind in GENERATORS and not (known is not None and path.startswith(f"{known}/")):
            yield path, node


def _steps(tree: Any) -> Iterator[tuple[str, str]]:
    for path, node in nodes(tree):
        if isinstance(node, dict) and node.get(TAG) == "optimizer":
            for _, slots in node.get("state", ()):
                name = tensor_of(slots.get("step")) if isinstance(slots, dict) else None
                if name is not None:
                    yield name, path


def _slots(tree: Any) -> Iterator[str]:
    for path, node in nodes(tree):
        if isinstance(node, dict) and node.get(TAG) == "optimizer":
            yield from (name for _, inner in nodes(node, path) if (name := tensor_of(inner)) is not None)


def changed_generators(before: Sights, after: Sights, differing: set[str]) -> list[str]:
    """The paths of random states that aren't the same; ``differing``: the tensors that aren't."""
    moved = {path for side in (before, after) for name, path in side.tensors().items() if name in differing}
    paths = dict.fromkeys([*before.generators, *after.generators])
    return [
        path
        for path in paths
        if path in moved or _text(before.generators.get(path)) != _text(after.generators.get(path))
    ]


def changed_steps(paths: Mapping[str, str], numbers: Mapping[str, tuple[float, float]]) -> list[StepChange]:
    """How far optimizers went on, parameters alike together.

    Args:
        paths: of the optimizer of each counter, by the counter's name.
        numbers: what the counters were and are.
    """
    groups = Counter((path, *numbers[name]) for name, path in paths.items() if name in numbers)
    return [
        StepChange(path, before, after, count) for (path, before, after), count in groups.items() if before != after
    ]


def changed_values(before: Sights, after: Sights, patterns: Sequence[str]) -> list[ValueChange]:
    """What became of values, removed and added ones first; not of what is told in words."""
    sides = [{path: it for path, it in _plain(side) if wanted(path, patterns)} for side in (before, after)]
    old, new = sides
    found = [ValueChange(path, "removed", it, None) for path, it in old.items() if path not in new]
    found += [ValueChange(path, "added", None, it) for path, it in new.items() if path not in old]
    both = (path for path in old if path in new)
    return found + [ValueChange(p, "changed", old[p], new[p]) for p in both if _text(old[p]) != _text(new[p])]


def _plain(side: Sights) -> Iterator[tuple[str, Any]]:
    told = [f"{path}/" for path in side.generators]
    if side.run is not None:
        told += [f"{side.run[0]}/progress/", f"{side.run[0]}/data/"]
    alone = {path for path, node in side.generators.items() if inside(node, path) is None}
    for path, value in plain_values(side.tree):
        if path not in alone and not path.startswith(tuple(told)):
            yield path, value


def _text(value: Any) -> str:
    # As text, where nan is nan and 1 is not 1.0.
    return json.dumps(value, sort_keys=True, default=repr)


# -- where a run stands ----------------------------------------------------------------------------------


def moved_position(before: Sights, after: Sights, patterns: Sequence[str] = ()) -> list[str]:
    """How far a run went on, and each of its data sources, in words."""
    paths = [join(side.run[0], "data") for side in (before, after) if side.run is not None]
    if not any(wanted(path, patterns) for path in paths):
        return []
    found = []
    old, new = (_progress(side.run[1]) if side.run is not None else "" for side in (before, after))
    if old != new:
        found.append(f"{old or 'nothing'} → {new or 'nothing'}")
    sources = [_sources(side.run[1]) if side.run is not None else {} for side in (before, after)]
    for name in dict.fromkeys([*sources[0], *sources[1]]):
        nodes_ = [side.get(name) for side in sources]
        if _text(nodes_[0]) == _text(nodes_[1]):
            continue
        words = [_position(node) for node in nodes_]
        same = words[0] == words[1]
        found.append(f"{name}: {words[0]}, in another state" if same else f"{name}: {words[0]} → {words[1]}")
    return found


def _progress(state: Mapping[str, Any]) -> str:
    progress = state.get("progress")
    if not isinstance(progress, dict):
        return ""
    return ", ".join(f"{name} {progress[name]}" for name in ("step", "epoch", "batch") if name in progress)


def _sources(state: Mapping[str, Any]) -> Mapping[str, Any]:
    data = state.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return sources if isinstance(sources, dict) else {}


def _position(node: Any) -> str:
    if not isinstance(node, dict):
        return "not read"
    passes, running = node.get("passes"), node.get("running")
    words = f"{passes} {'pass' if passes == 1 else 'passes'} done"
    if isinstance(running, dict):
        batches, samples = running.get("batches"), running.get("samples")
        words += f", then {batches} {'batch' if batches == 1 else 'batches'} ({samples} samples)"
    return words
