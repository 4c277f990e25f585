"""Who writes what, where several ranks save one state together. Pure: tables in, tasks out.

A tensor that several ranks have is written by one of them, large ones in pieces by several. A shard is written by a
rank that has it. What differs from rank to rank under one name is stored once for each kind of it.

Models repeat few patterns many times: what stands under a thousand names in the same way is looked at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from ckptstore.engine.crew import RanksError, ranks_text
from ckptstore.engine.plan import Source
from ckptstore.format.regions import Region, tiles
from ckptstore.format.tensorfile import BLOCK_BYTES

SHARE_BYTES = BLOCK_BYTES
"""Replicas are spread over so many ranks that each writes at least this: many small files make no save faster."""
_PIECES = 8
"""Into how many pieces of a rank's fair share large tensors are cut: so the shares differ by an eighth at most."""

Samples = npt.NDArray[np.uint64]


class Layout(TypedDict):
    """What a rank has under a name; plain values, as they travel."""

    kind: list[Any]
    """Stored type, logical type, shape of the whole tensor."""
    region: list[list[int]] | None
    """Offset and shape of the shard; None for what is no shard."""
    nbytes: int
    cuttable: bool
    """Rows of it can be taken apart."""
    parameter: int
    """Elements of the whole, where it is a parameter of a module; 0 for all else."""


class Table(TypedDict):
    """The tensors of one rank: names of the whole tensors, and of each the number of its layout."""

    names: list[str]
    codes: list[int]
    layouts: list[Layout]


class Task(TypedDict):
    """What one rank does with its tensors, by their numbers in its table; what isn't named is written as it is."""

    skip: list[int]
    """Another rank writes it."""
    rename: dict[str, str]
    """Number → the name under which it stands in this rank's tree."""
    cut: dict[str, list[int]]
    """Number → first row and number of rows of what it writes."""


class Plan(NamedTuple):
    """What all do, and what that makes."""

    tasks: list[Task]
    tensors: int
    parameters: int


def table_of(sources: Sequence[Source], parameters: Mapping[str, int]) -> Table:
    """The table of a rank's sources; ``parameters``: elements of parameters by name."""
    layouts: dict[str, Layout] = {}
    numbers: dict[str, int] = {}
    codes = []
    for source in sources:
        whole, region = source.whole, source.region
        layout: Layout = {
            "kind": [whole.dtype, whole.logical, list(whole.shape)],
            "region": None if region is None else [list(region[0]), list(region[1])],
            "nbytes": source.nbytes,
            "cuttable": source.cuttable,
            "parameter": parameters.get(whole.name, 0),
        }
        key = repr(layout)
        layouts.setdefault(key, layout)
        codes.append(numbers.setdefault(key, len(numbers)))
    return {"names": [source.whole.name for source in sources], "codes": codes, "layouts": list(layouts.values())}


def share(tables: Sequence[Table], samples: Sequence[Samples]) -> Plan:
    """Who writes what.

    Args:
        tables: one a rank.
        samples: digests of a few bytes of each rank's tensors: equal ones count as the same tensor.

    Raises:
        RanksError: shards of a tensor are missing, overlap, or don't belong together; says of which.
    """
    return _Sharing(tables, samples).plan()


@dataclass
class _Unit:
    """What is to be written once, and who has it: rank → number in its table."""

    holders: dict[int, int]
    nbytes: int
    rows: int = 0
    """Into which it can be cut; 0 where it can't."""


@dataclass
class _Sharing:
    """One plan in the making."""

    tables: Sequence[Table]
    samples: Sequence[Samples]
    count: int = 0
    parameters: int = 0
    units: list[_Unit] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self.tables)
        self.tasks: list[Task] = [{"skip": [], "rename": {}, "cut": {}} for _ in range(size)]
        self.loads = [0] * size
        self.names = {name for table in self.tables for name in table["names"]}

    def plan(self) -> Plan:
        """Look at each pattern, then at who has how much to write."""
        for holders in self._patterns():
            self._pattern(holders)
        self._assign()
        return Plan(self.tasks, self.count, self.parameters)

    # -- what stands under a name ------------------------------------------------------------------------

    def _patterns(self) -> Iterator[list[dict[int, int]]]:
        """The holders of each name, rank → number; together those that stand in the same way on the same ranks."""
        classes = rank_classes(self.tables)
        apart = _shared_names(self.tables, classes)
        for ranks in classes:
            names = self.tables[ranks[0]]["names"]
            if not names:
                continue
            codes = np.array([self.tables[rank]["codes"] for rank in ranks], np.uint32)
            _, groups = np.unique(codes, axis=1, return_inverse=True)
            columns: dict[int, list[dict[int, int]]] = {}
            for column, group in enumerate(groups.reshape(-1).tolist()):
                if names[column] not in apart:
                    columns.setdefault(group, []).append(dict.fromkeys(ranks, column))
            yield from columns.values()
        yield from ([holders] for holders in apart.values())

    def _pattern(self, members: Sequence[dict[int, int]]) -> None:
        first = members[0]
        layouts = {rank: self._layout(rank, number) for rank, number in first.items()}
        self.parameters += len(members) * max(layout["parameter"] for layout in layouts.values())
        if all(layout["region"] is None for layout in layouts.values()):
            for holders in members:
                self._whole(holders, layouts)
            return
        self._check_shards(first, layouts)
        self.count += len(members)
        regions = _by_region(layouts)
        for ranks in regions.values():
            if len(ranks) == 1:
                self.loads[ranks[0]] += len(members) * layouts[ranks[0]]["nbytes"]
            else:
                nbytes = layouts[ranks[0]]["nbytes"]
                self.units += [_Unit({rank: holders[rank] for rank in ranks}, nbytes) for holders in members]

    def _whole(self, holders: dict[int, int], layouts: Mapping[int, Layout]) -> None:
        """A name under which whole tensors stand: the same one, or several."""
        kinds: dict[tuple[str, int], dict[int, int]] = {}
        texts: dict[int, str] = {}
        for rank, number in holders.items():
            kind = layouts[rank]["kind"]
            text = texts.get(id(kind)) or texts.setdefault(id(kind), repr(kind))
            kinds.setdefault((text, int(self.samples[rank][number])), {})[rank] = number
        self.count += len(kinds)
        for index, same in enumerate(kinds.values()):
            first = next(iter(same))
            if index:
                taken = self._free(f"{self.tables[first]['names'][same[first]]}~rank{first}")
                for rank, number in same.items():
                    self.tasks[rank]["rename"][str(number)] = taken
            layout = layouts[first]
            if len(same) == 1:
                self.loads[first] += layout["nbytes"]
                continue
            shape = layout["kind"][2]
            may_be_cut = shape and all(layouts[rank]["cuttable"] for rank in same)
            self.units.append(_Unit(same, layout["nbytes"], shape[0] if may_be_cut else 0))

    def _layout(self, rank: int, number: int) -> Layout:
        table = self.tables[rank]
        return table["layouts"][table["codes"][number]]

    def _free(self, name: str) -> str:
        while name in self.names:
            name += "~"
        self.names.add(name)
        return name

    def _check_shards(self, holders: Mapping[int, int], layouts: Mapping[int, Layout]) -> None:
        """Nothing, if what the ranks have makes up one tensor (RanksError)."""
        lowest = min(holders)
        name, kind = self.tables[lowest]["names"][holders[lowest]], layouts[lowest]["kind"]
        for rank, layout in layouts.items():
            if layout["kind"] != kind or (layout["region"] is None) != (layouts[lowest]["region"] is None):
                raise RanksError(
                    f"{name!r} is {_what(layout)} on rank {rank}, and {_what(layouts[lowest])} on rank {lowest}: it "
                    "must be spread in one way over all ranks",
                    [rank],
                )
        regions = _by_region(layouts)
        if not tiles(tuple(kind[2]), list(regions)):
            stray = _stray(regions, set(range(len(self.tables))) - holders.keys())
            whose = f", that of {ranks_text(stray)}, it seems" if stray else ""
            raise RanksError(
                f"the shards of {name!r} don't make up all of {kind[2]}: one is missing or overlaps another{whose}",
                stray,
            )

    # -- who writes it -----------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give each unit, or pieces of it, to whoever has least to write so far."""
        size, loads = len(self.tables), self.loads
        shared = sorted(self.units, key=lambda u: (-u.nbytes, next(iter(u.holders.values()))))
        total = sum(unit.nbytes for unit in shared)
        writers = min(size, max(1, total // SHARE_BYTES))
        piece = max(SHARE_BYTES, total // (writers * _PIECES))
        # Who has least to write anyway.
        chosen = set(sorted(range(size), key=lambda rank: (loads[rank], rank))[:writers])
        for unit in shared:
            able = [rank for rank in unit.holders if rank in chosen] or list(unit.holders)
            pieces = min(unit.rows, -(-unit.nbytes // piece)) if unit.rows > 1 and len(able) > 1 else 1
            if pieces > 1:
                few = sorted(able, key=lambda rank: (loads[rank], rank))[:writers]
                self._cut(unit, few, pieces)
                continue
            writer = min(able, key=lambda rank: (loads[rank], rank))
            loads[writer] += unit.nbytes
            for rank, number in unit.holders.items():
                if rank != writer:
                    self.tasks[rank]["skip"].append(number)

    def _cut(self, unit: _Unit, writers: Sequence[int], pieces: int) -> None:
        """Spread the rows of one tensor over ``writers``."""
        row_bytes = unit.nbytes // unit.rows
        counts = dict.fromkeys(writers, 0)
        edges = [number * unit.rows // pieces for number in range(pieces + 1)]
        for begin, end in pairwise(edges):
            rank = min(counts, key=lambda r: (self.loads[r], r))
            counts[rank] += end - begin
            self.loads[rank] += (end - begin) * row_bytes
        at = 0
        for rank, number in unit.holders.items():
            rows = counts.get(rank, 0)
            if not rows:
                self.tasks[rank]["skip"].append(number)
            elif rows < unit.rows:
                self.tasks[rank]["cut"][str(number)] = [at, rows]
            at += rows


def rank_classes(tables: Sequence[Table]) -> list[list[int]]:
    """Ranks whose tensors have the same names, in the same order."""
    found: dict[tuple[str, ...], list[int]] = {}
    for rank, table in enumerate(tables):
        found.setdefault(tuple(table["names"]), []).append(rank)
    return list(found.values())


def _shared_names(tables: Sequence[Table], classes: Sequence[Sequence[int]]) -> dict[str, dict[int, int]]:
    """The holders of those names that ranks of several classes have."""
    times: dict[str, int] = {}
    for ranks in classes:
        for name in tables[ranks[0]]["names"]:
            times[name] = times.get(name, 0) + 1
    found: dict[str, dict[int, int]] = {name: {} for name, count in times.items() if count > 1}
    for rank, table in enumerate(tables) if found else ():
        for number, name in enumerate(table["names"]):
            if name in found:
                found[name][rank] = number
    return found


def _by_region(layouts: Mapping[int, Layout]) -> dict[Region, list[int]]:
    found: dict[Region, list[int]] = {}
    for rank, layout in layouts.items():
        box = layout["region"]
        region = Region.whole(tuple(layout["kind"][2])) if box is None else Region(tuple(box[0]), tuple(box[1]))
        found.setdefault(region, []).append(rank)
    return found


def _what(layout: Layout) -> str:
    dtype, logical, shape = layout["kind"]
    return f"{'whole' if layout['region'] is None else 'a shard'} of {shape}, {logical or dtype}"


def _stray(regions: Mapping[Region, Sequence[int]], missing: set[int]) -> list[int]:
    """The ranks whose shard overlaps an earlier one's, or else those that have none."""
    seen: list[Region] = []
    stray: set[int] = set()
    for region, ranks in regions.items():
        if any(region.within(other) is not None for other in seen):
            stray |= set(ranks)
        seen.append(region)
    return sorted(stray or missing)
