"""Tensor tables, blocks and compressed bytes made to deceive, with hashes that hold: refused, in little memory."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pytest
import zstandard

from ckptstore.engine.contents import read_contents
from ckptstore.errors import FormatError, IntegrityError
from ckptstore.format.tensorfile import TensorFile, TensorRow
from tests.integrity.checks import falls_back, refuses, reports, verified
from tests.integrity.stores import Forge, Pair, compact, opened, sealed


def refused(p: Pair, forge: Forge) -> None:
    """Refused as hostile by id, reported by verify as damage of the part, stepped around by latest."""
    forge.write()
    assert isinstance(refuses(p), FormatError)
    reports(p, p.key("part-00000.json"))
    falls_back(p)


# -- shapes -----------------------------------------------------------------------------------------------

SHAPES: dict[str, list[list[int]]] = {
    "empty and huge": [[0, 2**63 - 1], [200]],
    "2^48": [[4], [2**48]],
    "2^47 bytes": [[4], [2**47]],
    "2^59 elements": [[4], [2**30, 2**29]],
    "2^63 elements": [[4], [2**32, 2**31]],
    "overflows to 200": [[4], [2**63 - 1, 2**63 - 1, 200]],
    "overflows 64 bits to 0": [[4], [2**32, 2**32]],
    "65 dimensions": [[4], [1] * 64 + [200]],
    "100000 dimensions": [[4], [1] * 100_000],
    "64 huge dimensions": [[4], [2**47] * 64],
    "64 dimensions with a zero": [[4], [2**47] * 63 + [0]],
    "one byte less": [[4], [199]],
    "one byte more": [[4], [201]],
    "one block more": [[4], [200 + 16777216]],
    "nothing": [[0], [0]],
    "one missing": [[4]],
    "one too many": [[4], [200], [0]],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(p: Pair, forge: Forge, name: str) -> None:
    """Shapes that overflow, or differ from what the file holds, before anything of their size is allocated."""
    forge.part["files"][0]["tensors"]["shapes"] = SHAPES[name]
    refused(p, forge)


def test_columns_that_dont_fit_together(p: Pair, forge: Forge) -> None:
    tensors = forge.part["files"][0]["tensors"]
    for column, values in {"names": ["b"], "dtypes": ["U8"] * 3, "logical": {"nothing": "x"}}.items():
        before, tensors[column] = tensors[column], values
        refused(p, forge)
        tensors[column] = before


def test_other_orders(p: Pair, forge: Forge) -> None:
    """Only one order of the tensors gives the header."""
    for column in ("names", "shapes"):
        forge.part["files"][0]["tensors"][column].reverse()
    refused(p, forge)


def test_a_table_that_gives_another_header(p: Pair, forge: Forge) -> None:
    """Of the same length even: the bytes are as saved, and mean something else."""
    forge.part["files"][0]["tensors"]["names"] = ["b", "v"]
    forge.part["tree"]["model"] = {"v": {"$": "tensor", "name": "model/v"}}
    forge.write()
    error = refuses(p)
    assert isinstance(error, FormatError)
    assert "header" in str(error)
    [damage] = reports(p, p.key("model.safetensors"))
    assert damage.id == p.bad.id
    falls_back(p)


# -- blocks -----------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no blocks": lambda file: file.update(blocks=[]),
    "no blocks, no bytes": lambda file: file.update(blocks=[], stored_bytes=0),
    "twice the same": lambda file: file.update(blocks=file["blocks"] * 2),
    "twice, adding up": lambda file: file.update(blocks=file["blocks"] * 2, stored_bytes=2 * file["stored_bytes"]),
    "a hole": lambda file: file["blocks"][0].update(offset=1),
    "a hole, adding up": lambda file: file["blocks"][0].update(offset=1) or file.update(stored_bytes=4301),
    "overlapping halves": lambda file: file.update(blocks=halves(file, 2000)),
    "swapped halves": lambda file: file.update(blocks=halves(file)[::-1]),
    "halves": lambda file: file.update(blocks=halves(file)),
    "stored bytes": lambda file: file.update(stored_bytes=2**62),
    "raw": lambda file: file["blocks"][0].update(raw=4096),
    "length": lambda file: file["blocks"][0].update(length=4096),
    "both": lambda file: file["blocks"][0].update(raw=4096, length=4096) or file.update(stored_bytes=4096),
    "over a block": lambda file: file["blocks"][0].update(raw=16777217, length=16777217),
    "zero": lambda file: file["blocks"][0].update(raw=0, length=0),
    "digest of another length": lambda file: file["blocks"][0].update(digest="00"),
    "digest with a line feed": lambda file: file["blocks"][0].update(digest=file["blocks"][0]["digest"] + "\n"),
    "digest in upper case": lambda file: file["blocks"][0].update(digest=file["blocks"][0]["digest"].upper()),
    "no digest": lambda file: file["blocks"][0].update(digest=""),
}


def halves(file: dict[str, Any], overlap: int = 0) -> list[dict[str, Any]]:
    [block] = file["blocks"]
    half = block["raw"] // 2
    return [
        {**block, "raw": half, "length": half},
        {**block, "raw": half, "length": half, "offset": half - overlap},
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(p: Pair, forge: Forge, name: str) -> None:
    """Blocks that overlap, leave holes, or don't cover the file exactly."""
    BLOCKS[name](forge.part["files"][0])
    refused(p, forge)


# -- compressed bytes -------------------------------------------------------------------------------------


def replaced(p: Pair, forge: Forge, stored: bytes, *, raw: int | None = None) -> None:
    """Put ``stored`` in the place of the model's bytes, as a zstd block whose every digest but the raw one holds."""
    file = forge.part["files"][0]
    file["blocks"][0].update(length=len(stored), codec="zstd", stored_digest=blake3.blake3(stored).hexdigest())
    if raw is not None:
        file["blocks"][0]["raw"] = raw
    file["stored_bytes"] = len(stored)
    p.raw.put(p.key("model.safetensors"), stored)
    forge.write()


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(level=3, **options).compress(data)


def declaring(size: int, body: bytes = b"\x01\x00\x00") -> bytes:
    """A zstd frame of one empty last block that declares ``size`` bytes."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + body


def frames(whole: bytes) -> dict[str, bytes]:
    """What a frame of ``whole`` can be replaced by."""
    good = frame(whole)
    return {
        "declares 7e18": declaring(7 * 10**18),
        "declares 2^64 - 1": declaring(2**64 - 1),
        "declares as much and holds nothing": declaring(len(whole)),
        "declares more": frame(whole + b"x"),
        "declares less": frame(whole[:-1]),
        "no size": frame(whole, write_content_size=False),
        "trailing byte": good + b"\0",
        "trailing frame": good + frame(b"x"),
        "two halves": frame(whole[:100]) + frame(whole[100:]),
        "trailing skippable frame": good + b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
        "leading skippable frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + good,
        "cut": good[:-5],
        "magic only": good[:4],
        "no frame": b"\0" * 100,
        "not compressed": whole[:100],
        "another content": frame(bytes(len(whole))),
        "a bomb": frame(bytes(16 << 20)),
        "checksum wrong": frame(whole, write_checksum=True)[:-4] + b"\0\0\0\0",
    }


@pytest.mark.parametrize("name", frames(b"x" * 4300))
def test_frames(p: Pair, forge: Forge, name: str) -> None:
    """Frames that declare or hold something else: refused with the block named, whoever made the digests."""
    whole = p.raw.get(p.key("model.safetensors"))
    replaced(p, forge, frames(whole)[name])
    error = refuses(p, (FormatError, IntegrityError))
    assert error.key == p.key("model.safetensors")
    [damage] = reports(p, p.key("model.safetensors"))
    assert list(damage.tensors) == ["model/b", "model/w"]
    falls_back(p)


def test_an_honest_frame_loads(p: Pair, forge: Forge) -> None:
    """The forger can compress: what is refused above is refused for what it is."""
    replaced(p, forge, frame(p.raw.get(p.key("model.safetensors"))))
    assert verified(p).ok
    with opened(p.raw.url) as store:
        assert store.load("latest")["epoch"] == 2


def test_stored_bytes_are_checked_before_they_are_decoded(p: Pair, forge: Forge) -> None:
    """A bomb whose stored digest doesn't hold never reaches the decoder."""
    replaced(p, forge, declaring(7 * 10**18))
    forge.part["files"][0]["blocks"][0]["stored_digest"] = "0" * 64
    forge.write()
    assert isinstance(refuses(p), IntegrityError)
    falls_back(p)


# -- bounded memory ---------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, ckptstore
from ckptstore.engine.contents import read_contents
store = ckptstore.open(sys.argv[1], threads=1, read_only=True)
checkpoint = store.resolve("latest")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
report = store.verify(checkpoint.id)
assert not report.ok
print(report.damages[0].problem[:200])
"""
"""Verifies the newest checkpoint with 96 MiB more than an open store takes: six blocks."""


def verify_in_little_memory(path: Path) -> str:
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.fixture
def copied(p: Pair, forge: Forge, store_path: Path) -> Callable[[], Path]:
    def copy() -> Path:
        """The store as it is now, in a folder."""
        for key in p.raw.listing():
            (store_path / key).parent.mkdir(parents=True, exist_ok=True)
            (store_path / key).write_bytes(p.raw.get(key))
        return store_path

    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
class TestMemory:
    """What a record asks for is not allocated before it is proven."""

    def test_shapes(self, p: Pair, forge: Forge, copied: Callable[[], Path]) -> None:
        """2^59 bytes would be 2^35 blocks, whose bare list takes 256 GiB."""
        forge.part["files"][0]["tensors"]["shapes"] = [[4], [2**30, 2**29]]
        forge.write()
        assert "don't cover" in verify_in_little_memory(copied())

    def test_ranks(self, p: Pair, forge: Forge, copied: Callable[[], Path]) -> None:
        """The numbers of 2^32 - 1 ranks would take 128 GiB."""
        forge.commit["world_size"] = forge.manifest["world_size"] = 2**32 - 1
        forge.write()
        assert "ranks" in verify_in_little_memory(copied())

    @pytest.mark.parametrize("name", ["declares 7e18", "a bomb", "declares as much and holds nothing"])
    def test_frames(self, p: Pair, forge: Forge, copied: Callable[[], Path], name: str) -> None:
        replaced(p, forge, frames(p.raw.get(p.key("model.safetensors")))[name])
        assert "block 0" in verify_in_little_memory(copied())

    @pytest.mark.parametrize("name", ["manifest.json", "part-00000.json"])
    def test_records_over_their_limit(self, p: Pair, forge: Forge, copied: Callable[[], Path], name: str) -> None:
        """A file of limit + 1 bytes, with everything said of it true, is not read."""
        size = (256 << 20) + 1
        digest = "0" * 64
        if name == "manifest.json":
            forge.commit["manifest"] = {"size": size, "sha256": digest}
        else:
            forge.manifest["parts"][0].update(size=size, sha256=digest)
            manifest = compact(forge.manifest)
            p.raw.put(p.key("manifest.json"), manifest)
            forge.commit["manifest"] = {"size": len(manifest), "sha256": hashlib.sha256(manifest).hexdigest()}
        p.raw.put(p.commit, sealed(forge.commit))
        path = copied()
        with open(path / p.key(name), "r+b") as file:
            file.truncate(size)
        assert "allowed" in verify_in_little_memory(path)

    @pytest.mark.parametrize("size", [16385, 8 << 30])
    def test_sealed_records_over_their_limit(self, p: Pair, copied: Callable[[], Path], size: int) -> None:
        """A commit record of 8 GiB is damage like one of a byte too many."""
        path = copied()
        with open(path / p.commit, "r+b") as file:
            file.truncate(size)
        folder = Pair(type("Raw", (), {"url": str(path)})(), p.good, p.bad)
        refuses(folder)
        falls_back(folder)


# -- limits of the header ---------------------------------------------------------------------------------


def test_a_header_over_safetensors_limit() -> None:
    """25,000 names of 4,096 characters take more than the 100 MB that other readers allow."""
    rows = [TensorRow(f"{n:04096d}", "U8", (0,)) for n in range(25_000)]
    with pytest.raises(FormatError, match="too many tensors"):
        TensorFile.of(rows)


def test_many_files_without_end(p: Pair, forge: Forge) -> None:
    """Files that aren't there are told one by one, not tried before the part is known to hold."""
    file = forge.part["files"][0]
    forge.part["files"] += [{**file, "name": f"f{n}.safetensors", "prefix": f"f{n}/"} for n in range(2000)]
    forge.write()
    refuses(p)
    assert len(verified(p).damages) == 2000
    with opened(p.raw.url) as store:
        contents = read_contents(store._storage, store.resolve("latest").record)
        assert len(contents.files) == 2002
