"""``ckptstore show``: what one checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli import texts
from ckptstore.cli.access import looking
from ckptstore.cli.outline import Branch, draw, grow, unmatched, value_text
from ckptstore.cli.terminal import answer, emit, json_option, note, plain, table
from ckptstore.errors import FormatError
from ckptstore.tools.outline import plain_values, wanted

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ckptstore.engine.catalogue import Checkpoint
    from ckptstore.engine.contents import Contents, DataFile

_Tensors = dict[str, dict[str, Any]]
_Values = dict[str, Any]


@click.command()
@click.argument("url")
@click.argument("selector", default="latest")
@click.option(
    "--depth", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Levels of names to unfold."
)
@click.option("--only", multiple=True, metavar="PATTERN", help="Only these names, as 'model/*'. Can be repeated.")
@click.option("--tensor", "names", multiple=True, metavar="NAME", help="The numbers in this tensor, or all that match.")
@json_option
def show(url: str, selector: str, depth: int, only: tuple[str, ...], names: tuple[str, ...], as_json: bool) -> None:
    """Show what a checkpoint holds.

    Step, metrics, reasons, times and sizes; the files with their blocks; the plain values; the tensors with
    shape, type and bytes. SELECTOR is "latest" by default. Nothing but records is read, and nothing is run.

    With --tensor what is in one tensor: range, mean, spread, percentiles, histogram, nan and infinities, its first
    values, and where it lies; of several a table. Nothing but its blocks is read, and every one is verified.

    \b
      ckptstore show runs/gpt2
      ckptstore show runs/gpt2 best:val_loss --only 'model/*' --depth 9
      ckptstore show runs/gpt2 step:1000 --json | jq '.tensors | keys'
      ckptstore show runs/gpt2 --tensor model/head.weight
      ckptstore show runs/gpt2 --tensor 'model/*.weight'

    Exit codes: 0 good; 1 no such checkpoint or tensor, or what is read is damaged; 2 no store at URL or wrong use.
    """
    if names:
        from ckptstore.cli.tensortext import show_tensors

        show_tensors(url, selector, names, as_json)
        return
    with looking(url) as (store, _):
        checkpoint = store.resolve(selector)
        contents = store.contents(checkpoint)
        holds = store.holds()
    all_tensors, all_values = _tensors(contents), _values(contents)
    tensors = {name: it for name, it in all_tensors.items() if wanted(name, only)}
    values = {path: it for path, it in all_values.items() if wanted(path, only)}
    for remark in unmatched(only, [*all_tensors, *all_values]):
        note(plain(remark))
    if as_json:
        emit(_document(checkpoint, contents, holds, tensors, values))
    else:
        answer(_head(checkpoint, holds), "", _files(contents), "", *_trees(tensors, values, depth))


def _tensors(contents: Contents) -> _Tensors:
    from ckptstore.format.tensorfile import TensorRow

    found = {}
    for name, entry in contents.tensors.items():
        size = TensorRow(entry.name, entry.dtype, tuple(entry.shape)).nbytes
        found[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": size, "logical": entry.logical}
    return found


def _values(contents: Contents) -> _Values:
    # The tree of all ranks together stands in the first one's part.
    parts = [part for part in contents.parts if part.tree is not None or part.rank == 0]
    many = len(parts) > 1
    found: _Values = {}
    for part in parts:
        try:
            found.update(plain_values(part.tree, f"rank {part.rank}" if many else ""))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise FormatError(f"{contents.commit.id}: the tree of rank {part.rank} is malformed: {error}") from error
    return found


def _document(
    checkpoint: Checkpoint, contents: Contents, holds: Mapping[str, str], tensors: _Tensors, values: _Values
) -> dict[str, Any]:
    return {
        **texts.checkpoint_fields(checkpoint, holds),
        "tensors": tensors,
        "files": [_file_fields(file) for file in contents.files],
        "values": {path: _finite(value) for path, value in values.items()},
    }


def _file_fields(file: DataFile) -> dict[str, Any]:
    return {
        "key": file.key,
        "name": file.entry.name,
        "owner": file.entry.owner,
        "tensors": len(file.entry.tensors.names),
        "blocks": len(file.entry.blocks),
        "codecs": sorted({block.codec for block in file.entry.blocks}),
        "raw_bytes": sum(block.raw for block in file.entry.blocks),
        "stored_bytes": file.entry.stored_bytes,
    }


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _head(checkpoint: Checkpoint, holds: Mapping[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in _facts(checkpoint, holds):
        if value:
            made.add_row(name, Text(plain(value)))
    return made


def _facts(c: Checkpoint, holds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    size = texts.size_text(c.stored_bytes)
    if c.stored_bytes != c.raw_bytes:
        size += f", {c.stored_bytes / c.raw_bytes:.2f} of the {texts.size_text(c.raw_bytes)} in memory"
    yield "id", c.id
    yield "step", str(c.step)
    yield "epoch", "" if c.epoch is None else str(c.epoch)
    yield "metrics", ", ".join(f"{name} {value:.6g} ({c.modes.get(name)} is best)" for name, value in c.metrics.items())
    yield "reasons", ", ".join(c.reasons)
    yield "held by", ", ".join(texts.holds_of(c.id, holds))
    yield "created", f"{texts.time_text(c.created)} (UTC {c.created:%Y-%m-%d %H:%M:%S})"
    yield "saved", texts.timing_text(c.timing)
    yield "size", size
    yield "parameters", f"{c.parameters:,}" if c.parameters else ""
    yield "ranks", str(c.world_size) if c.world_size > 1 else ""


def _files(contents: Contents) -> Table:
    from rich.text import Text

    numbers = ("tensors", "blocks", "stored", "raw")
    files = [_file_fields(file) for file in contents.files]
    lent = any(it["owner"] != contents.commit.id for it in files)
    made = table(
        "file",
        *numbers,
        "codec",
        *(["borrowed from"] if lent else []),
        right=numbers,
        drop=("blocks", "raw"),
        fold=("file", "borrowed from"),
    )
    for it in files:
        sizes = texts.size_text(it["stored_bytes"]), texts.size_text(it["raw_bytes"])
        borrowed = it["owner"] if it["owner"] != contents.commit.id else ""
        cells = (it["name"], str(it["tensors"]), str(it["blocks"]), *sizes, ", ".join(it["codecs"]), borrowed)
        made.add_row(*(Text(plain(cell)) for cell in cells[: len(made.columns)]))
    return made


def _trees(tensors: _Tensors, values: _Values, depth: int) -> Iterator[RenderableType]:
    if values:
        leaves = ((path, f" = {value_text(value)}", 0) for path, value in values.items())
        yield draw("plain values", grow(leaves, "/"), depth, lambda b: texts.count_text(b.count, "value"))
        yield ""
    rows = ((name, f"  {it['dtype']}{it['shape']}  {_what(it)}", it["bytes"]) for name, it in tensors.items())
    root = grow(rows, "/.")
    yield draw(f"{_summary(root)} in all", root, depth, _summary)


def _what(tensor: dict[str, Any]) -> str:
    logical = f" as {tensor['logical']}" if tensor["logical"] else ""
    return texts.size_text(tensor["bytes"]) + logical


def _summary(branch: Branch) -> str:
    return f"{texts.count_text(branch.count, 'tensor')}, {texts.size_text(branch.stored_bytes)}"
