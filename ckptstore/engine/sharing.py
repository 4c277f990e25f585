"""Who writes what, where several ranks save one state together. Pure: tables in, tasks out.

A tensor that several ranks have is written by one of them, large ones in pieces by several. A shard is written by a
rank that has it. What differs from rank to rank under one name is stored once for each kind of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

from ckptstore.engine.crew import RanksError, ranks_text
from ckptstore.engine.plan import Source
from ckptstore.format.regions import Region, tiles
from ckptstore.format.tensorfile import BLOCK_BYTES

SHARE_BYTES = BLOCK_BYTES
"""Replicas are spread over so many ranks that each writes at least this: many small files make no save faster."""
_PIECES = 8
"""Into how many pieces of a rank's fair share large tensors are cut: so the shares differ by an eighth at most."""


class Table(TypedDict):
    """The tensors of one rank by column; plain values, as they travel."""

    names: list[str]
    """Of the whole tensors."""
    kinds: list[list[Any]]
    """Stored type, logical type, shape of the whole."""
    regions: list[list[list[int]] | None]
    """Offset and shape of the shard; None for what is no shard."""
    nbytes: list[int]
    cuttable: list[bool]
    """Rows of it can be taken apart."""
    parameters: list[int]
    """Elements, where it is a parameter of a module or of its shard; 0 for all else."""


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
    return {
        "names": [source.whole.name for source in sources],
        "kinds": [[s.whole.dtype, s.whole.logical, list(s.whole.shape)] for s in sources],
        "regions": [None if s.region is None else [list(s.region[0]), list(s.region[1])] for s in sources],
        "nbytes": [source.nbytes for source in sources],
        "cuttable": [source.cuttable for source in sources],
        "parameters": [parameters.get(source.whole.name, 0) for source in sources],
    }


class _Copy(NamedTuple):
    """A tensor as one rank has it."""

    rank: int
    number: int
    region: Region | None
    sample: Hashable


@dataclass
class _Unit:
    """What is to be written once, and who has it."""

    copies: list[_Copy]
    nbytes: int
    rows: int = 0
    """Into which it can be cut; 0 where it can't."""


@dataclass
class _Tensor:
    """A name, and all that stands under it."""

    kind: tuple[Any, ...]
    copies: list[_Copy] = field(default_factory=list)


def share(tables: Sequence[Table], samples: Sequence[Sequence[Hashable]]) -> Plan:
    """Who writes what.

    Args:
        tables: one a rank.
        samples: digests of a few bytes of each rank's tensors: equal ones count as the same tensor.

    Raises:
        RanksError: shards of a tensor are missing, overlap, or don't belong together; says of which.
    """
    size = len(tables)
    tasks: list[Task] = [{"skip": [], "rename": {}, "cut": {}} for _ in range(size)]
    names = {name for table in tables for name in table["names"]}
    units: list[_Unit] = []
    count = 0
    for name, copies in _by_name(tables, samples).items():
        kinds = _kinds(tables, name, copies)
        count += len(kinds)
        for index, group in enumerate(kinds):
            if index:
                taken = _free(f"{name}~rank{group[0].rank}", names)
                for copy in group:
                    tasks[copy.rank]["rename"][str(copy.number)] = taken
            units += _units(tables, group)
    _assign(units, tasks, size)
    return Plan(tasks, count, _parameters(tables))


def _by_name(tables: Sequence[Table], samples: Sequence[Sequence[Hashable]]) -> dict[str, list[_Copy]]:
    found: dict[str, list[_Copy]] = {}
    for rank, (table, each) in enumerate(zip(tables, samples, strict=True)):
        for number, (name, region, sample) in enumerate(zip(table["names"], table["regions"], each, strict=True)):
            box = None if region is None else Region(tuple(region[0]), tuple(region[1]))
            found.setdefault(name, []).append(_Copy(rank, number, box, sample))
    return found


def _kinds(tables: Sequence[Table], name: str, copies: list[_Copy]) -> list[list[_Copy]]:
    """The copies of a name, sorted into what is one tensor."""
    if any(copy.region is not None for copy in copies):
        _check_shards(tables, name, copies)
        return [copies]
    kinds: dict[tuple[str, Hashable], list[_Copy]] = {}
    for copy in copies:
        kinds.setdefault((repr(tables[copy.rank]["kinds"][copy.number]), copy.sample), []).append(copy)
    return list(kinds.values())


def _check_shards(tables: Sequence[Table], name: str, copies: list[_Copy]) -> None:
    first = tables[copies[0].rank]["kinds"][copies[0].number]
    for copy in copies:
        kind = tables[copy.rank]["kinds"][copy.number]
        if kind != first or copy.region is None:
            what = "whole" if copy.region is None else f"a shard of {kind[2]}, {kind[1] or kind[0]}"
            raise RanksError(
                f"{name!r} is {what} on rank {copy.rank}, and a shard of {first[2]}, {first[1] or first[0]}, on rank "
                f"{copies[0].rank}: it must be spread in one way over all ranks",
                [copy.rank],
            )
    regions = {copy.region for copy in copies if copy.region is not None}
    if not tiles(tuple(first[2]), list(regions)):
        stray = sorted(_stray(copies, len(tables)))
        whose = f", that of {ranks_text(stray)}, it seems" if stray else ""
        raise RanksError(
            f"the shards of {name!r} don't make up all of {first[2]}: one is missing or overlaps another{whose}", stray
        )


def _stray(copies: Sequence[_Copy], size: int) -> Iterable[int]:
    """The ranks that have none of it, or one that overlaps an earlier one's."""
    missing = set(range(size)) - {copy.rank for copy in copies}
    seen: list[Region] = []
    stray = set()
    for copy in copies:
        region = copy.region
        if region is None or region in seen:
            continue
        if any(_overlap(region, other) for other in seen):
            stray.add(copy.rank)
        seen.append(region)
    return stray or missing


def _overlap(one: Region, other: Region) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    )


def _free(name: str, names: set[str]) -> str:
    while name in names:
        name += "~"
    names.add(name)
    return name


def _units(tables: Sequence[Table], copies: list[_Copy]) -> list[_Unit]:
    """What is to be written of one tensor: each of its shards, or all of it."""
    regions: dict[Region | None, list[_Copy]] = {}
    for copy in copies:
        regions.setdefault(copy.region, []).append(copy)
    found = []
    for region, holders in regions.items():
        first = holders[0]
        table = tables[first.rank]
        shape = table["kinds"][first.number][2]
        may_be_cut = region is None and shape and all(tables[c.rank]["cuttable"][c.number] for c in holders)
        found.append(_Unit(holders, table["nbytes"][first.number], shape[0] if may_be_cut else 0))
    return found


def _assign(units: list[_Unit], tasks: list[Task], size: int) -> None:
    """Give each unit, or pieces of it, to whoever has least to write so far."""
    loads = [0] * size
    for unit in units:
        if len(unit.copies) == 1:
            loads[unit.copies[0].rank] += unit.nbytes
    shared = sorted((u for u in units if len(u.copies) > 1), key=lambda u: (-u.nbytes, u.copies[0].number))
    total = sum(unit.nbytes for unit in shared)
    writers = min(size, max(1, total // SHARE_BYTES))
    piece = max(SHARE_BYTES, total // (writers * _PIECES))
    # Who has least to write anyway.
    chosen = set(sorted(range(size), key=lambda rank: (loads[rank], rank))[:writers])
    for unit in shared:
        able = [copy for copy in unit.copies if copy.rank in chosen] or unit.copies
        few = sorted(able, key=lambda copy: (loads[copy.rank], copy.rank))[:writers]
        pieces = min(unit.rows, -(-unit.nbytes // piece)) if unit.rows > 1 and len(few) > 1 else 1
        if pieces > 1:
            _cut(unit, few, pieces, loads, tasks)
            continue
        loads[few[0].rank] += unit.nbytes
        for copy in unit.copies:
            if copy is not few[0]:
                tasks[copy.rank]["skip"].append(copy.number)


def _cut(unit: _Unit, writers: list[_Copy], pieces: int, loads: list[int], tasks: list[Task]) -> None:
    """Spread the rows of one tensor over ``writers``."""
    row_bytes = unit.nbytes // unit.rows
    counts = dict.fromkeys((copy.rank for copy in writers), 0)
    edges = [number * unit.rows // pieces for number in range(pieces + 1)]
    for begin, end in pairwise(edges):
        rank = min(counts, key=lambda r: (loads[r], r))
        counts[rank] += end - begin
        loads[rank] += (end - begin) * row_bytes
    at = 0
    for copy in unit.copies:
        rows = counts.get(copy.rank, 0)
        if rows == unit.rows:
            pass
        elif rows:
            tasks[copy.rank]["cut"][str(copy.number)] = [at, rows]
        else:
            tasks[copy.rank]["skip"].append(copy.number)
        at += rows


def _parameters(tables: Sequence[Table]) -> int:
    found: dict[str, int] = {}
    for table in tables:
        found |= {name: count for name, count in zip(table["names"], table["parameters"], strict=True) if count}
    return sum(found.values())
