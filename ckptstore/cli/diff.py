"""``ckptstore diff``: what changed from one checkpoint to another."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli import texts
from ckptstore.cli.access import looking
from ckptstore.cli.outcome import BAD_NEWS
from ckptstore.cli.outline import value_text
from ckptstore.cli.pictures import check_picture, write_picture
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option, plain, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ckptstore.tools.diff import Diff
    from ckptstore.tools.difftensors import Form, TensorChange
    from ckptstore.tools.difftrees import ValueChange


@click.command()
@click.argument("url")
@click.argument("before")
@click.argument("after")
@click.option("--with", "other", metavar="URL2", help="Where AFTER is, if not at URL.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only these names, as 'model/*'. Can be repeated.")
@click.option(
    "--sort",
    type=click.Choice(["change", "share", "largest", "name"]),
    default="change",
    show_default=True,
    help="What stands first: by relative change, share of changed elements, largest change, or name.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=40, show_default=True, metavar="N", help="Lines of a table."
)
@click.option("--map", "mapped", is_flag=True, help="Draw a map: layers by kinds of parameters.")
@click.option(
    "--picture", metavar="FILE", help="Draw it into FILE, as .svg or .png. Needs matplotlib: ckptstore[plot]."
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 if anything differs, as for scripts.")
@json_option
@click.pass_context
def diff(
    ctx: click.Context,
    url: str,
    before: str,
    after: str,
    other: str | None,
    only: tuple[str, ...],
    sort: str,
    limit: int,
    mapped: bool,
    picture: str | None,
    exit_code: bool,
    as_json: bool,
) -> None:
    """Show what changed from checkpoint BEFORE to checkpoint AFTER.

    Tensors that were removed, added, reshaped or cast; for each that changed, the norm of the difference relative to
    what was before, the share of elements that differ bit by bit, and the largest change of one; plain values and
    hyper-parameters; random states; steps of optimizers; the place in the data. Of two stores, too, and however each
    checkpoint is stored. What both have in common isn't read.

    \b
      ckptstore diff runs/gpt2 step:1000 latest
      ckptstore diff runs/gpt2 step:1000 latest --only 'model/*' --sort largest
      ckptstore diff runs/gpt2 step:0 latest --only model --map --picture changes.svg
      ckptstore diff runs/a latest latest --with s3://bucket/b --exit-code

    Exit codes: 0 compared (with --exit-code: and equal); 1 no such checkpoint, one is damaged, or --exit-code and they
    differ; 2 no store at URL, the storage failed or wrong use.
    """
    from ckptstore.tools.diff import diff as compare
    from ckptstore.tools.diff import ordered

    check_picture(picture)
    with ExitStack() as stack:
        store, _ = stack.enter_context(looking(url))
        second = store if other is None else stack.enter_context(looking(other))[0]
        with byte_progress("comparing") as progress:
            found = compare(store, before, after, other=second, only=list(only) or None, progress=progress)
    changes = ordered(found.tensors, sort)
    if picture is not None:
        _draw(found, picture)
    if as_json:
        emit(_document(found, changes))
    else:
        answer(*_parts(found, changes, limit, mapped))
    if exit_code and not found.equal:
        ctx.exit(BAD_NEWS)


def _draw(found: Diff, path: str) -> None:
    from ckptstore.tools.diffmap import diff_map
    from ckptstore.tools.diffpicture import picture

    title = f"{found.before.id}\n→ {found.after.id}"
    write_picture(path, lambda format: picture(diff_map(found), format, title=title))


def _document(found: Diff, changes: list[TensorChange]) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "before": texts.checkpoint_fields(found.before, {}),
        "after": texts.checkpoint_fields(found.after, {}),
        "tensors": [_fields(change) for change in changes],
        "values": [
            {"path": it.path, "kind": it.kind, "before": _finite(it.before), "after": _finite(it.after)}
            for it in found.values
        ],
        "generators": list(found.generators),
        "steps": [
            {"path": it.path, "before": it.before, "after": it.after, "parameters": it.parameters} for it in found.steps
        ],
        "position": list(found.position),
        "compared": found.compared,
        "read_bytes": found.read_bytes,
    }


def _fields(change: TensorChange) -> dict[str, Any]:
    numbers = ("relative", "share", "norm", "norm_change", "largest")
    return {
        "name": change.name,
        "kind": change.kind,
        "before": _form(change.before),
        "after": _form(change.after),
        "elements": change.elements,
        "changed": change.changed,
        "nonfinite": change.nonfinite,
        **{name: _finite(getattr(change, name)) for name in numbers},
    }


def _form(form: Form | None) -> dict[str, Any] | None:
    return None if form is None else {"dtype": form.dtype, "shape": list(form.shape)}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parts(found: Diff, changes: list[TensorChange], limit: int, mapped: bool) -> Iterator[RenderableType]:
    yield f"before  {texts.one_line(found.before)}"
    yield f"after   {texts.one_line(found.after)}"
    if changes:
        yield ""
        yield _tensors(changes[:limit])
        yield from _more(len(changes) - limit)
    if found.values:
        yield ""
        yield _values(found.values[:limit])
        yield from _more(len(found.values) - limit)
    if mapped:
        from ckptstore.cli.diffmap import draw
        from ckptstore.tools.diffmap import diff_map

        yield ""
        yield from draw(diff_map(found), shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    told = [*_told(found)]
    yield from ["", *told] if told else []
    yield ""
    yield _summary(found)


def _more(count: int) -> Iterator[str]:
    if count > 0:
        yield f"… and {count:,} more (--limit, --json)"


def _tensors(changes: list[TensorChange]) -> Table:
    from rich.text import Text

    numbers = ("relative", "changed", "largest", "nan/inf")
    made = table("tensor", "what", *numbers, right=numbers, drop=("nan/inf", "largest"), fold=("tensor", "what"))
    for it in changes:
        cells = [it.name, _what(it), *_numbers(it)]
        made.add_row(*(Text(plain(cell)) for cell in cells))
    return made


def _what(change: TensorChange) -> str:
    if change.kind == "changed":
        return f"changed {change.after}"
    sides = " → ".join(str(form) for form in (change.before, change.after) if form is not None)
    return f"{change.kind} {sides}"


def _numbers(change: TensorChange) -> tuple[str, str, str, str]:
    relative = "" if change.relative is None else f"{change.relative:.3g}"
    share = "" if change.share is None else f"{100 * change.share:.3g} %"
    largest = "" if change.largest is None else f"{change.largest:.3g}"
    bad = change.nonfinite
    return relative, share, largest, f"{bad[0]:,} → {bad[1]:,}" if bad is not None and any(bad) else ""


def _values(changes: list[ValueChange] | Any) -> Table:
    from rich.text import Text

    made = table("value", "what", "before", "after", fold=("value", "before", "after"))
    for it in changes:
        old = "" if it.kind == "added" else value_text(it.before)
        new = "" if it.kind == "removed" else value_text(it.after)
        made.add_row(*(Text(plain(cell)) for cell in (it.path, it.kind, old, new)))
    return made


def _told(found: Diff) -> Iterator[str]:
    for step in found.steps:
        who = texts.count_text(step.parameters, "parameter")
        yield f"optimizer     {step.path}: step {step.before:g} → {step.after:g} ({who})"
    yield from (f"data          {words}" for words in found.position)
    yield from (f"random state  {path} changed" for path in found.generators)


def _summary(found: Diff) -> str:
    read = f"{texts.size_text(found.read_bytes)} read"
    compared = texts.count_text(found.compared, "tensor")
    if found.equal:
        return f"equal: {compared}, bit by bit; {read}"
    kinds: dict[str, int] = {}
    for change in found.tensors:
        kinds[change.kind] = kinds.get(change.kind, 0) + 1
    parts = [f"{count} {kind}" for kind, count in kinds.items()]
    values = texts.count_text(len(found.values), "value")
    return f"different: of {compared} {', '.join(parts) or 'none'}; {values}; {read}"
