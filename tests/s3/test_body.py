"""What a request carries is read, sent and let go of without being copied."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
import zlib
from itertools import pairwise

import pytest

from ckptstore.errors import StorageError
from ckptstore.storage.s3 import S3Storage
from ckptstore.storage.s3.body import Body
from tests.s3.seaweed import Seaweed

WHOLE = bytes(range(256)) * 4000


def cut(seed: int) -> Body:
    """``WHOLE`` in pieces, some of them empty."""
    draw = random.Random(seed)
    places = sorted([0, len(WHOLE), *(draw.randrange(len(WHOLE)) for _ in range(seed)), 77, 77])
    return Body([memoryview(WHOLE)[a:b] for a, b in pairwise(places)])


def sent(body: Body) -> bytes:
    async def collect() -> bytes:
        return b"".join([piece async for piece in body])

    return asyncio.run(collect())


@pytest.mark.parametrize("seed", range(6))
def test_is_its_pieces_in_a_row(seed: int) -> None:
    body = cut(seed)

    assert len(body) == len(WHOLE)
    assert body.read() == WHOLE
    assert body.tell() == len(WHOLE)
    assert body.seek(-1000, 2) == len(WHOLE) - 1000
    assert body.read() == WHOLE[-1000:]
    body.seek(0)
    assert b"".join(iter(lambda: body.read(999), b"")) == WHOLE
    assert [sent(body), sent(body)] == [WHOLE, WHOLE], "also after reading, and again"
    assert body.checksum() == Body([WHOLE]).checksum()


def test_the_checksum_is_that_of_s3() -> None:
    """CRC32, big-endian, in base64: the value of the standard's example."""
    assert zlib.crc32(b"123456789") == 0xCBF43926
    assert Body([b"1234", b"56789"]).checksum() == {"ChecksumCRC32": "y/Q5Jg=="}


def test_what_was_let_go_of_is_not_sent() -> None:
    """The memory may hold other bytes by then."""
    body, memory = cut(3), bytearray(10)
    other = Body([memoryview(memory)])
    other.close()
    memory.clear()  # which fails while it is looked at
    body.close()
    body.close()
    for use in (lambda: body.read(1), lambda: sent(body)):
        with pytest.raises(StorageError, match="broken off"):
            use()


def test_a_block_goes_up_without_a_copy_of_it(server: Seaweed, bucket: str, prefix: str) -> None:
    storage = S3Storage(bucket, prefix, server.options)
    block = memoryview(random.Random(0).randbytes(16 << 20))
    storage.list("")
    writer = storage.open_writer("a", size=2 * len(block))
    tracemalloc.start()
    try:
        for slot in [writer.reserve(len(block)), writer.reserve(len(block))]:
            writer.write(slot, block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    writer.finish()
    assert peak < 4 << 20
    reader = storage.open_reader("a")
    back = memoryview(bytearray(len(block)))
    for offset in (0, len(block)):
        reader.read_into(offset, back)
        assert back == block
