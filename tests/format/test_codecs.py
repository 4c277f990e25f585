"""Codecs come back, whatever the bytes; digests are those of the published vectors."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import FormatError
from ckptstore.format.codecs import CODECS, Compression, decode, encode, parse_compression
from ckptstore.format.digest import BLOCK_DIGEST, block_digest, sha256

SETTINGS = ["none", "zstd", "zstd:-7", "zstd:19", "float-zstd"]


def round_trip(raw: bytes, setting: str) -> str:
    segments = [("U8", len(raw))]
    codec, stored = encode(raw, parse_compression(setting), segments)
    out = bytearray(len(raw))
    decode(codec, memoryview(bytes(stored)), memoryview(out), segments)
    assert out == raw
    assert len(stored) <= len(raw)
    return codec


@given(st.binary(min_size=1, max_size=5000), st.sampled_from(SETTINGS))
def test_any_bytes_come_back(raw: bytes, setting: str) -> None:
    round_trip(raw, setting)


@given(st.binary(min_size=1, max_size=10), st.integers(200, 500), st.sampled_from(SETTINGS))
def test_repeated_bytes_come_back_smaller(raw: bytes, times: int, setting: str) -> None:
    # float-zstd stores up to 31 bytes as they are, after a table.
    least = 200 if setting == "float-zstd" else 1
    assert round_trip(raw * times * least, setting) == setting.partition(":")[0]


def test_what_cant_be_compressed_is_stored_as_it_is() -> None:
    noise = hashlib.shake_256(b"seed").digest(1 << 20)
    assert round_trip(noise, "zstd") == "none"


def test_a_whole_block() -> None:
    assert round_trip(bytes(range(256)) * (1 << 16), "zstd") == "zstd"


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("by", [-1, 1])
def test_another_length_is_refused(codec: str, by: int) -> None:
    raw = b"abc" * 1000
    stored = raw if codec == "none" else encode(raw, Compression(codec), [("U8", len(raw))])[1]
    with pytest.raises(FormatError):
        decode(codec, memoryview(bytes(stored)), memoryview(bytearray(len(raw) + by)), [("U8", len(raw) + by)])


@given(st.binary(max_size=300))
def test_no_bytes_are_decoded_but_those_encoded(stored: bytes) -> None:
    """Random bytes are no frame, or one of exactly the length asked for."""
    with pytest.raises(FormatError):
        decode("zstd", memoryview(stored), memoryview(bytearray(1000)), [("U8", 1000)])


@pytest.mark.parametrize("codec", ["", "lz4", "auto", "float-zstd:1", "NONE", "none "])
def test_unknown_codecs(codec: str) -> None:
    with pytest.raises(FormatError, match="unknown codec"):
        decode(codec, memoryview(b""), memoryview(bytearray()), [])


@pytest.mark.parametrize(
    "text",
    [
        *("", "gzip", "zstd:", "zstd:20", "zstd:-8", "zstd:1.5", "none:1", "ZSTD", "zstd :1"),
        *("zstd:\N{SUPERSCRIPT TWO}", "auto:1", "float-zstd:", "float-zstd:20", "float"),
    ],
)
def test_unknown_settings(text: str) -> None:
    with pytest.raises(FormatError, match="compression="):
        parse_compression(text)


@pytest.mark.parametrize(
    ("text", "codec", "level"),
    [
        ("none", "none", 1),
        ("auto", "auto", 1),
        ("zstd", "zstd", 1),
        ("zstd:-7", "zstd", -7),
        ("float-zstd", "float-zstd", 1),
        ("float-zstd:19", "float-zstd", 19),
    ],
)
def test_settings(text: str, codec: str, level: int) -> None:
    assert parse_compression(text) == Compression(codec, level)


BLAKE3 = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
}
"""github.com/BLAKE3-team/BLAKE3, test_vectors.json: of the bytes 0 to 250, again and again."""

SHA256 = {
    b"": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    b"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    b"a" * 1_000_000: "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
}
"""NIST, FIPS 180-4 examples."""


@pytest.mark.parametrize("length", BLAKE3)
def test_blake3(length: int) -> None:
    data = bytes(n % 251 for n in range(length))
    assert BLOCK_DIGEST == "blake3"
    assert block_digest("blake3", data) == BLAKE3[length]
    assert block_digest("blake3", memoryview(bytearray(data))) == BLAKE3[length]


@pytest.mark.parametrize("data", SHA256, ids=len)
def test_sha256(data: bytes) -> None:
    assert sha256(data) == block_digest("sha256", data) == SHA256[data]


@pytest.mark.parametrize("name", ["", "crc32", "md5", "BLAKE3", "sha-256", "none"])
def test_unknown_digests(name: str) -> None:
    with pytest.raises(FormatError, match="unknown block digest"):
        block_digest(name, b"")
