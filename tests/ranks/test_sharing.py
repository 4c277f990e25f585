"""Who writes what: everything once, by somebody who has it, evenly."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.engine.crew import RanksError
from ckptstore.engine.sharing import SHARE_BYTES, Layout, Plan, Table, share
from ckptstore.format.regions import Region, tiles

MB = 1 << 20


def table(*rows: tuple[Any, ...]) -> Table:
    """Rows of name, shape (of bytes), and a shard's offset and shape."""
    layouts: list[Layout] = []
    codes = []
    for _, shape, *region in rows:
        extent = region[1] if region else shape
        layout: Layout = {
            "kind": ["U8", None, list(shape)],
            "region": [list(region[0]), list(region[1])] if region else None,
            "nbytes": prod(extent),
            "cuttable": not region and bool(shape),
            "parameter": prod(shape),
        }
        if layout not in layouts:
            layouts.append(layout)
        codes.append(layouts.index(layout))
    return {"names": [row[0] for row in rows], "codes": codes, "layouts": layouts}


def layout(each: Table, number: int) -> Layout:
    return each["layouts"][each["codes"][number]]


def planned(tables: list[Table], samples: list[list[str]]) -> Plan:
    """As ``share``, with samples that are texts."""
    numbers = {text: number for number, text in enumerate({text for each in samples for text in each})}
    return share(tables, [np.array([numbers[text] for text in each], np.uint64) for each in samples])


def written(plan: Plan, tables: list[Table]) -> dict[str, list[tuple[int, Region]]]:
    """By the name in storage, who writes which box of it."""
    found: dict[str, list[tuple[int, Region]]] = {}
    for rank, (task, each) in enumerate(zip(plan.tasks, tables, strict=True)):
        for number, name in enumerate(each["names"]):
            key, shape = str(number), tuple(layout(each, number)["kind"][2])
            region = layout(each, number)["region"]
            box = Region.whole(shape) if region is None else Region(tuple(region[0]), tuple(region[1]))
            if number in task["skip"]:
                assert key not in task["cut"]
                continue
            if key in task["cut"]:
                begin, count = task["cut"][key]
                box = Region((begin, *(0,) * (len(shape) - 1)), (count, *shape[1:]))
            found.setdefault(task["rename"].get(key, name), []).append((rank, box))
    return found


def loads(plan: Plan, tables: list[Table]) -> list[int]:
    total = [0] * len(tables)
    for boxes in written(plan, tables).values():
        for rank, box in boxes:
            total[rank] += prod(box.shape)
    return total


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Table], list[list[str]]]:
    size = draw(st.integers(1, 6))
    rows: list[list[tuple[Any, ...]]] = [[] for _ in range(size)]
    samples: list[list[str]] = [[] for _ in range(size)]
    for number in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["all", "some", "shards", "replicated shards"]))
        shape = (draw(st.integers(1, 40)), draw(st.sampled_from([1, 1000, 3 * MB])))
        holders = (
            list(range(size)) if kind != "some" else draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
        )
        for index, rank in enumerate(sorted(holders)):
            box: tuple[Any, ...] = ()
            if "shards" in kind:
                groups = size if kind == "shards" else max(1, size // 2)
                part = index % groups
                begin, end = part * shape[0] // groups, (part + 1) * shape[0] // groups
                if begin == end or (kind == "replicated shards" and size < 2):
                    continue
                box = ((begin, 0), (end - begin, shape[1]))
            rows[rank].append((f"t{number}", shape, *box))
            samples[rank].append("same" if "shards" in kind else draw(st.sampled_from(["a", "b"])))
    return [table(*each) for each in rows], samples


@given(jobs())
def test_each_tensor_is_written_once_and_as_a_whole(job: tuple[list[Table], list[list[str]]]) -> None:
    tables, samples = job
    if not tables_are_whole(tables):
        with pytest.raises(RanksError, match="don't make up all of"):
            planned(tables, samples)
        return
    plan = planned(tables, samples)
    found = written(plan, tables)
    for name, boxes in found.items():
        shape = shape_of(tables, name)
        assert tiles(shape, [box for _, box in boxes]), name
    # Every rank's tree names something that is stored, and was the same there.
    for rank, each in enumerate(tables):
        for number, name in enumerate(each["names"]):
            assert plan.tasks[rank]["rename"].get(str(number), name) in found
    assert plan.tensors == len(found)


def tables_are_whole(tables: list[Table]) -> bool:
    shards: dict[str, set[Region]] = {}
    for each in tables:
        for number, name in enumerate(each["names"]):
            region = layout(each, number)["region"]
            if region is not None:
                shards.setdefault(name, set()).add(Region(tuple(region[0]), tuple(region[1])))
    return all(tiles(shape_of(tables, name), list(boxes)) for name, boxes in shards.items())


def shape_of(tables: list[Table], name: str) -> tuple[int, ...]:
    base = name.partition("~")[0]
    return next(tuple(layout(t, t["names"].index(base))["kind"][2]) for t in tables if base in t["names"])


def test_replicas_are_spread_evenly_by_bytes() -> None:
    """As many layers as a language model has, one of them a quarter of all: within an eighth of the fair share."""
    rows = [("embedding", (50_000, 2000)), *((f"layer{n}", (3000, 2000)) for n in range(48)), ("bias", (10,))]
    tables = [table(*rows)] * 4
    plan = planned(tables, [["x"] * len(rows)] * 4)
    each = loads(plan, tables)
    fair = sum(each) / 4
    assert max(each) <= 1.13 * fair
    assert plan.parameters == sum(each)


def test_little_is_written_by_one() -> None:
    """Sixteen files of a kilobyte would make no save faster."""
    tables = [table(("a", (1000,)), ("b", (1000,)))] * 16
    assert loads(planned(tables, [["x", "x"]] * 16), tables) == [2000, *[0] * 15]


def test_who_has_more_of_its_own_gets_fewer_replicas() -> None:
    tables = [
        table(("mine", (4 * SHARE_BYTES,)), ("both", (4 * SHARE_BYTES,))),
        table(("both", (4 * SHARE_BYTES,))),
    ]
    assert loads(planned(tables, [["m", "x"], ["x"]]), tables) == [4 * SHARE_BYTES] * 2


def test_a_name_with_several_contents_is_stored_for_each_of_them() -> None:
    """Pipeline stages whose layers have the same names, two replicas of each."""
    tables = [table(("0.weight", (8,)), ("0.weight~rank2", (1,)))] * 4
    plan = planned(tables, [["a", "x"], ["a", "x"], ["b", "x"], ["b", "x"]])
    assert [task["rename"] for task in plan.tasks] == [{}, {}, {"0": "0.weight~rank2~"}, {"0": "0.weight~rank2~"}]
    assert plan.tensors == 3


@pytest.mark.parametrize(
    ("rows", "ranks", "words"),
    [
        ([[("w", (4,), (0,), (2,))], [("w", (4,), (1,), (2,))]], [1], "missing or overlaps"),
        ([[("w", (4,), (0,), (2,))], [("w", (4,), (3,), (1,))]], [], "missing or overlaps"),
        ([[("w", (4,), (0,), (4,))], [("v", (4,))]], None, None),
        ([[("w", (4,), (0,), (2,))], []], [1], "missing or overlaps"),
        ([[("w", (4,), (0,), (2,))], [("w", (4,))]], [1], r"is whole of \[4\], U8 on rank 1, and a shard of"),
        ([[("w", (4,), (0,), (2,))], [("w", (6,), (2,), (2,))]], [1], r"a shard of \[6\], U8 on rank 1"),
    ],
)
def test_shards_that_make_up_no_tensor(rows: Any, ranks: list[int] | None, words: str | None) -> None:
    tables = [table(*each) for each in rows]
    samples = [["x"] * len(each) for each in rows]
    if words is None:
        planned(tables, samples)
        return
    with pytest.raises(RanksError, match=words) as caught:
        planned(tables, samples)
    assert caught.value.ranks == ranks
