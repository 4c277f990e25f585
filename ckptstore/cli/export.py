"""``ckptstore export``: a checkpoint as files of other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli import texts, units
from ckptstore.cli.access import backup_option, looking
from ckptstore.cli.terminal import answer, byte_progress, emit, json_option

if TYPE_CHECKING:
    from ckptstore.tools.export import ExportReport, Target

_SHOWN = 8
_TARGETS = ["hf", "safetensors", "torch", "dcp"]


@click.command()
@click.argument("url")
@click.argument("selector", default="latest")
@click.option("-o", "--output", required=True, metavar="DEST", help="The file or folder to make, on this machine.")
@click.option(
    "--to", "target", required=True, type=click.Choice(["hf", "safetensors", "torch", "dcp"]), help="Its kind."
)
@click.option("--only", multiple=True, metavar="PATTERN", help="Only these names, as 'model/*'. Can be repeated.")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32", "fp64"]),
    help="Convert floating-point weights; integers, 8-bit types and optimizers stay.",
)
@click.option("--max-shard", metavar="SIZE", default="5GB", show_default=True, help="hf: the most in one file.")
@click.option("--config", metavar="DIR", help="hf: copy config.json, tokenizer and code from there.")
@click.option("--overwrite", is_flag=True, help="Replace what is at DEST, with all that is in it.")
@backup_option
@json_option
def export(
    url: str,
    selector: str,
    output: str,
    target: Target,
    max_shard: str,
    backups: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Write a checkpoint as files that other programs read.

    \b
      hf            a folder for from_pretrained of transformers: one model, in shards, with an index
      safetensors   one file with all tensors
      torch         one file for torch.load(weights_only=True), with optimizers as load_state_dict takes them
      dcp           a folder for torch.distributed.checkpoint

    Blocks are read one by one and proven: a checkpoint may be larger than the memory. DEST appears when all of it is
    on the disk; until then it is in DEST.tmp-..., which only a killed process leaves behind. Names are those in the
    model where one model is all there is; otherwise the whole paths. What can't be exported is named.

    \b
      ckptstore export runs/gpt2 best:val_loss --to hf --only 'model/*' --dtype bf16 --config gpt2/ -o out/
      ckptstore export s3://bucket/gpt2 step:1000 --to torch -o gpt2.pt

    Exit codes: 0 exported; 1 damaged, no such checkpoint, or DEST exists; 2 no store at URL, nothing to export, no
    space or wrong use.
    """
    from ckptstore.tools.export import export as write

    limit = units.size_bytes(max_shard)
    with looking(url, backups) as (store, _), byte_progress("exporting") as progress:
        options |= {"only": options["only"] or None, "max_shard_bytes": limit, "progress": progress}
        report = write(store, selector, output, to=target, **options)
    if as_json:
        emit(_document(report))
    else:
        answer(*_lines(report))


def _document(report: ExportReport) -> dict[str, Any]:
    return {
        "id": report.checkpoint.id,
        "step": report.checkpoint.step,
        "path": str(report.path),
        "to": report.to,
        "component": report.component,
        "files": dict(report.files),
        "written_bytes": report.written_bytes,
        "read_bytes": report.read_bytes,
        "tensors": report.tensors,
        "cast": dict(report.cast),
        "overflowed": dict(report.overflowed),
        "converted": dict(report.converted),
        "left_out": dict(report.left_out),
        "lacks_config": report.lacks_config,
        "seconds": report.seconds,
    }


def _lines(report: ExportReport) -> Iterator[str]:
    many = len(report.files) > 1
    yield from (f"{name}  {texts.size_text(size)}" for name, size in report.files.items() if many)
    if report.component:
        yield f"names are those in {report.component}"
    if report.cast:
        types = ", ".join(sorted({*report.cast.values()}))
        yield f"converted: {texts.count_text(len(report.cast), 'tensor')}, from {types}"
    yield from _some("INFINITE NOW", report.overflowed, "too large for {}")
    yield from _some("simpler now", report.converted, "{}")
    yield from _some("left out", report.left_out, "{}")
    if report.lacks_config:
        yield "from_pretrained needs a config.json there, too: give its folder as --config, or copy it"
    size, seconds = report.written_bytes, report.seconds
    yield (
        f"exported {report.checkpoint.id} to {report.path}: {texts.count_text(report.tensors, 'tensor')}, "
        f"{texts.count_text(len(report.files), 'file')}, {texts.size_text(size)}, {seconds:.2f} s, "
        f"{texts.rate_text(size, seconds)}"
    )


def _some(title: str, found: Mapping[str, str], form: str) -> Iterator[str]:
    yield from (f"{title}: {name} ({form.format(what)})" for name, what in list(found.items())[:_SHOWN])
    if len(found) > _SHOWN:
        yield f"{title}: {len(found) - _SHOWN} more; --json names all"
