"""What a checkpoint in a bucket costs: requests, by the sizes of the parts that are really sent, and their price.

python -m benchmarks.s3costs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ckptstore.format.tensorfile import BLOCK_BYTES
from ckptstore.storage.s3.upload import part_bytes

PRICED = "us-east-1, S3 Standard, November 2026, https://aws.amazon.com/s3/pricing/"
DOLLARS = {"PUT": 0.005 / 1000, "POST": 0.005 / 1000, "LIST": 0.005 / 1000, "GET": 0.0004 / 1000, "HEAD": 0.0004 / 1000}
MONTH_DOLLARS_GB = 0.023
SIZES_BYTES = {"1.5 GB": 1_500_000_000, "100 GB": 100_000_000_000, "10 TB": 10_000_000_000_000}


def files(total_bytes: int) -> list[int]:
    """A model and its AdamW, which is twice as large, each a file."""
    return [total_bytes // 3, total_bytes - total_bytes // 3]


def parts(size: int) -> int:
    """How many a file of ``size`` bytes goes up in: whole blocks, and so many at a time that 10,000 parts suffice."""
    blocks = -(-size // BLOCK_BYTES)
    return -(-blocks // -(-part_bytes(1, size) // BLOCK_BYTES))


def save(sizes: Sequence[int]) -> Counter[str]:
    """Requests of one more save into an open store: its fence twice, each file looked for before and after, the parts
    of each with one request before and one after them (none where there is one part only), part and manifest, the
    commit record, and that read back."""
    several = sum(parts(size) > 1 for size in sizes)
    sent = sum(map(parts, sizes))
    return Counter({"LIST": 2, "HEAD": 2 * len(sizes), "POST": 2 * several, "PUT": sent + 3, "GET": 1})


def load(sizes: Sequence[int], checkpoints: int = 1) -> Counter[str]:
    """Requests of a load by a new process: the store, its commit records, manifest and part, and every block."""
    blocks = sum(-(-size // BLOCK_BYTES) for size in sizes)
    return Counter({"LIST": 1 + -(-checkpoints // 1000), "GET": 1 + checkpoints + 2 + blocks})


def dollars(requests: Counter[str]) -> float:
    """Their price."""
    return sum(count * DOLLARS[kind] for kind, count in requests.items())


def markdown() -> str:
    """A table, and what it is made from."""
    head = "| a checkpoint of | parts | requests to save | cost | requests to load | cost | kept for a month |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, size in SIZES_BYTES.items():
        sizes = files(size)
        up, down = save(sizes), load(sizes)
        month = size / 1e9 * MONTH_DOLLARS_GB
        lines.append(
            f"| {name} | {sum(map(parts, sizes)):,} | {up.total():,} | ${dollars(up):.5f} | {down.total():,} | "
            f"${dollars(down):.5f} | ${month:,.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), PRICED, sep="\n\n")
