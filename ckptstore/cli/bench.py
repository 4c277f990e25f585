"""``ckptstore bench``: how fast is it here, beside what else there is?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptstore.cli import texts
from ckptstore.cli.outcome import CommandError
from ckptstore.cli.terminal import answer, emit, json_option, note, round_progress, table
from ckptstore.cli.units import size_bytes
from ckptstore.errors import NotFoundError

if TYPE_CHECKING:
    from rich.table import Table

    from ckptstore.tools.throughput import Result

_TITLES = {
    "ckptstore": "ckptstore",
    "torch": "torch.save + fsync",
    "safetensors": "safetensors + fsync",
    "dcp": "DCP",
    "raw": "machine limit",
}


@click.command()
@click.argument("url")
@click.option("--size", type=size_bytes, default="1GB", show_default=True, metavar="SIZE", help="100MB, 1GB, 1GiB.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Times each one is measured.",
)
@json_option
def bench(url: str, size: int, rounds: int, as_json: bool) -> None:
    """Measure how fast saving and loading are at URL.

    Saves a state of --size (fp32 tensors as a GPT has them, random numbers) and loads it into existing tensors,
    with ckptstore, torch.save, safetensors and torch.distributed.checkpoint (DCP) in turn. A save ends when the
    bytes are durable: files and folders synced. A load begins cold: every file is synced and dropped from the page
    cache (posix_fadvise DONTNEED) before it. What was loaded is compared with what was saved once. "machine limit"
    is plain 16 MiB direct reads and writes by two threads, nothing hashed.

    URL is an existing folder; the files go into bench-... in it and are removed afterwards, also after Ctrl-C. Needs
    free space of 2 times --size, memory of about 3 times, and PyTorch. In a bucket only ckptstore is measured.

    \b
      ckptstore bench /mnt/checkpoints
      ckptstore bench runs --size 200MB --rounds 5 --json
      ckptstore bench s3://bucket/runs

    Exit codes: 0 measured; 1 something else was loaded than saved; 2 no such folder, too little space, no PyTorch
    or wrong use.
    """
    from ckptstore.tools.throughput import RIVALS, local_folder, measure

    rivals: Sequence[str] = (*RIVALS, "raw")
    try:
        if local_folder(url) is None:
            rivals = ("ckptstore",)
            note(f"{url} is no folder: only ckptstore is measured")
        with round_progress() as progress:
            results = measure(url, size, rounds, rivals, progress)
    except NotFoundError as error:
        raise CommandError(str(error), code="no_folder") from error
    except ImportError as error:
        message = f"bench needs PyTorch, and it can't be imported ({error}): pip install torch"
        raise CommandError(message, code="no_torch") from error
    if as_json:
        measured = {"url": url, "size_bytes": results[0].size_bytes, "rounds": rounds}
        emit(measured | {"results": [_fields(result) for result in results]})
    else:
        answer(_table(results), _explanation(results, rounds))


def _fields(result: Result) -> dict[str, Any]:
    return {
        "subject": result.subject,
        "save": _speed_fields(result.save_s, result.save_gb_s, result.save_median_gb_s),
        "load": _speed_fields(result.load_s, result.load_gb_s, result.load_median_gb_s),
    }


def _speed_fields(seconds: Sequence[float], gb_s: Sequence[float], median: float) -> dict[str, Any]:
    return {
        "seconds": list(seconds),
        "gb_s": list(gb_s),
        "median_gb_s": median,
        "min_gb_s": min(gb_s),
        "max_gb_s": max(gb_s),
    }


def _table(results: Sequence[Result]) -> Table:
    numbers = ("save GB/s", "load GB/s")
    made = table("subject", numbers[0], "min-max", numbers[1], "min-max", right=(*numbers, "min-max"))
    for result in results:
        made.add_row(
            _TITLES[result.subject],
            f"{result.save_median_gb_s:.2f}",
            f"{min(result.save_gb_s):.2f}-{max(result.save_gb_s):.2f}",
            f"{result.load_median_gb_s:.2f}",
            f"{min(result.load_gb_s):.2f}-{max(result.load_gb_s):.2f}",
        )
    return made


def _explanation(results: Sequence[Result], rounds: int) -> str:
    size = texts.size_text(results[0].size_bytes)
    return f"{size}, medians of {texts.count_text(rounds, 'round')}; saves durable, loads with a cold page cache"
