"""Whatever is in a foreign file, nothing of it runs, and an error says what is the matter."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptstore as cs
from ckptstore.tools.importing import run
from ckptstore.tools.importing import sandbox as sandboxes
from ckptstore.tools.importing.sandbox import Reader, Sandbox
from tests.sandboxes import Shared
from tests.tools.foreign import Reduced, archive, lying_tensor, values

REFUSALS = (cs.StateError, cs.FormatError, cs.IntegrityError)


@pytest.fixture
def store(tmp_path: Path, sandbox: Sandbox) -> cs.Store:
    return cs.open(f"memory://{tmp_path.name}")


def refused(path: Path, store: cs.Store, match: str | None, *kinds: type[Exception], **options: Any) -> None:
    """No part of ``path`` comes into the store."""
    with pytest.raises(kinds or REFUSALS, match=match):
        cs.import_from(path, store, **options)
    assert store.checkpoints() == []


@pytest.mark.parametrize("without_refused", [False, True], ids=["refused", "left out"])
def test_bombs(without_refused: bool, tmp_path: Path, store: cs.Store) -> None:
    """Functions that a pickle would call are never called, at whatever place and in whatever form."""
    fired = tmp_path / "fired"
    bombs = {
        "posix.system": Reduced(os.system, f"touch {fired}"),
        "builtins.eval": Reduced(eval, f"open({str(fired)!r}, 'w')"),
        "builtins.exec": Reduced(exec, f"open({str(fired)!r}, 'w')"),
        "io.open": Reduced(io.open, str(fired), "w"),
        "subprocess.Popen": Reduced(subprocess.Popen, ["touch", str(fired)]),
        "builtins.getattr": Reduced(getattr, "x", "upper"),
    }
    for number, (name, bomb) in enumerate(bombs.items()):
        zipped = number % 2 == without_refused
        state = {"w": torch.ones(2), "x": bomb, "step": 1}
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        if without_refused and name != "posix.system":
            cs.import_from(tmp_path / "a.pt", store, without_refused=True, again=True)
            assert store.load().keys() == {"w", "step"}
        else:
            # PyTorch never lets a module like that through, whoever asks for it.
            with pytest.raises(cs.StateError, match=re.escape(name)):
                cs.import_from(tmp_path / "a.pt", store, without_refused=without_refused)
        assert not fired.exists()
    # They are ones that would fire.
    pickle.loads(pickle.dumps(bombs["io.open"])).close()
    assert fired.exists()


def test_no_module_of_others_is_imported_and_no_secret_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: cs.Store
) -> None:
    """A class is named in a file whose module would do something when it is imported; the reader knows no keys."""
    fired = tmp_path / "fired"
    (tmp_path / "evil_of_the_test.py").write_text(f"open({str(fired)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    archive(tmp_path / "a.pt", b"\x80\x02}X\x01\x00\x00\x00xcevil_of_the_test\nThing\n)\x81s.")
    with closing(Shared()) as own:
        monkeypatch.setattr(run, "Sandbox", lambda: own)
        refused(tmp_path / "a.pt", store, r"evil_of_the_test\.Thing", cs.StateError)
        refused(tmp_path / "a.pt", store, "step", cs.StateError, without_refused=True)
        assert own._process is not None
        process = Path(f"/proc/{own._process.pid}")
        environment = (process / "environ").read_bytes()
    assert not process.exists()
    assert b"OMP_NUM_THREADS" in environment
    assert b"hunter2" not in environment
    assert not fired.exists()
    __import__("evil_of_the_test")
    assert fired.exists()


CONFINED = """
import ctypes, os, sys
from ckptstore.tools.importing import confine
confine.limit(memory_bytes=1 << 28, cpu_s=60, files=4)
libc = ctypes.CDLL(None)
create, write, connect, run, remove = libc.open, libc.open, libc.connect, libc.execl, libc.unlink
path = os.fsencode(sys.argv[1])
address = (ctypes.c_uint8 * 16)(2, 0, *int(sys.argv[2]).to_bytes(2, "big"), 127, 0, 0, 1)
first, second = libc.socket(2, 1, 0), libc.socket(2, 1, 0)
assert connect(first, address, 16) == 0 and write(path, os.O_WRONLY) > 0
kernel = confine.lock()
allowed = []
for text in sys.argv[3:]:
    try:
        exec(text)
        allowed.append(text)
    except (PermissionError, MemoryError, OSError):
        pass
print(allowed)
print(kernel, [
    create(path + b".native", os.O_CREAT | os.O_WRONLY, 0o600),
    write(path, os.O_WRONLY),
    run(b"/bin/true", b"true", None),
    remove(path),
    connect(second, address, 16),
])
"""


def test_a_reader_may_do_nothing_but_read(tmp_path: Path) -> None:
    """Of all these only the reading is let through."""
    wanted = [
        f"open({str(tmp_path / 'x')!r}, 'w')",
        f"open({str(tmp_path / 'x')!r}, 'ab')",
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        f"import os; os.mkdir({str(tmp_path / 'x')!r})",
        f"import os; os.remove({sys.argv[0]!r})",
        f"import os; os.open({str(tmp_path / 'x')!r}, os.O_WRONLY | os.O_CREAT)",
        "import ctypes; ctypes.CDLL(None)",
        "import click",
        "bytearray(1 << 30)",
        f"[open({__file__!r}) for _ in range(100)]",
        f"open({__file__!r}).read()",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cs.__file__).parents[1])}
    (tmp_path / "there").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", CONFINED, tmp_path / "there", str(server.getsockname()[1]), *wanted]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    allowed, by_kernel = done.stdout.splitlines()
    assert allowed == str([wanted[-1]])
    # Nor may native code, where the kernel can see to it: TCP since the fourth version of what it has for that.
    version, _, results = by_kernel.partition(" ")
    if int(version):
        assert json.loads(results)[: 5 if int(version) >= 4 else 4] == [-1] * (5 if int(version) >= 4 else 4)
        assert [path.name for path in tmp_path.iterdir()] == ["there"]


def laughs(depth: int) -> bytes:
    """A list of two lists of two lists, and so on, each of them one in memory."""
    text = b"\x80\x02}X\x01\x00\x00\x00x]q\x00"
    for number in range(depth):
        text += b"](h" + bytes([number]) + b"h" + bytes([number]) + b"eq" + bytes([number + 1])
    return text + b"sX\x04\x00\x00\x00stepK\x01s."


def test_files_that_grow(tmp_path: Path, store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that it is much larger than its file takes neither memory nor time."""
    monkeypatch.setattr(store, "save_streamed", None)
    file = tmp_path / "a.pt"
    refused(lying_tensor(file, (1 << 30, 1 << 9), (0, 0)), store, "repeat the same", cs.FormatError)
    refused(lying_tensor(file, (1 << 40,), (1,)), store, "damaged", cs.IntegrityError)
    refused(lying_tensor(file, (1 << 20,), (1,), elements=1 << 40), store, "damaged", cs.IntegrityError)
    bomb = pickle.dumps({"x": Reduced(bytearray, 1 << 50), "step": 1}, 2)
    refused(archive(file, bomb), store, "memory", cs.FormatError)
    packed = archive(file, pickle.dumps({"x": bytes(1 << 24), "step": 1}, 2), compress=True)
    assert packed.stat().st_size < 1 << 16
    refused(packed, store, "compressed", cs.FormatError)


def test_records_that_say_they_are_larger(tmp_path: Path, store: cs.Store) -> None:
    """An archive whose list of contents lies."""
    torch.save({"w": torch.ones(100), "step": 1}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    data[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt", store, "holds more than|damaged")


def test_work_without_end(tmp_path: Path, store: cs.Store, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key whose hash takes for ever: the reader is given up by its work, and by the clock."""
    nested = b"K\x01" + b"".join(b"\x85q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    archive(tmp_path / "a.pt", b"\x80\x02}" + nested + b"K\x01s.")
    monkeypatch.setattr(sandbox, "cpu_s", 0)
    refused(tmp_path / "a.pt", store, "s of work", cs.FormatError)
    monkeypatch.setattr(sandbox, "cpu_s", 600)
    monkeypatch.setattr(sandbox, "patience_s", 0.2)
    refused(tmp_path / "a.pt", store, "takes longer", cs.FormatError)


def test_torn_files(tmp_path: Path, store: cs.Store) -> None:
    """Cut off anywhere, or with a bit flipped in what a checksum protects."""
    torch.save({"w": torch.arange(1000.0), "v": {"x": 1}, "step": 1}, tmp_path / "whole.pt")
    good = (tmp_path / "whole.pt").read_bytes()
    file = tmp_path / "a.pt"
    for cut in (0, 1, 4, 30, 100, len(good) // 2, len(good) - 200, len(good) - 22, len(good) - 1):
        file.write_bytes(good[:cut])
        refused(file, store, "a.pt")
    for at in (good.index(b"torch._utils"), good.index(torch.arange(1000.0).numpy().tobytes()) + 5):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused(file, store, "damaged in", cs.IntegrityError)
    torch.save({"w": torch.arange(1000.0), "step": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    for cut in (15, 60, 300, len(old) - 2000, len(old) - 1):
        file.write_bytes(old[:cut])
        refused(file, store, "a.pt")


def test_pickles_of_any_bytes(tmp_path: Path, store: cs.Store, full: bool) -> None:
    """Changed at random, behind right checksums or without any: imported or refused, and never anything else."""
    state = {"tensors": {"w": torch.ones(3), "b": torch.ones(3, dtype=torch.bfloat16)}, "values": values(), "step": 1}
    torch.save(state, tmp_path / "whole.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        pickled = whole.read("whole/data.pkl")
        records = [whole.read(name) for name in whole.namelist() if "/data/" in name]
    old, draw = (tmp_path / "old.pt").read_bytes(), random.Random(None if full else 1)
    ends: Counter[str] = Counter()
    for number in range(500 if full else 16):
        data = bytearray(pickled if number % 2 else old)
        for _ in range(draw.choice((1, 1, 3))):
            at = draw.randrange(min(len(data), len(pickled)))
            data[at : at + draw.choice((0, 1, 1, 4))] = draw.randbytes(draw.choice((0, 1, 1, 3)))
        file = tmp_path / "a.pt"
        if number % 2:
            archive(file, bytes(data), *records)
        else:
            file.write_bytes(data)
        try:
            cs.import_from(file, store, step=1, again=True, without_refused=number % 3 == 0)
            store.load()
            ends["imported"] += 1
        except REFUSALS as error:
            ends[type(error).__name__] += 1
    assert len(ends) > 2, ends


def test_files_of_other_kinds(tmp_path: Path, store: cs.Store) -> None:
    """Each is told what it is not."""
    file = tmp_path / "a.pt"
    file.write_bytes(pickle.dumps({"step": 1}))
    refused(file, store, "a pickle that torch.save didn't write", cs.FormatError)
    file.write_bytes(b"hello, world")
    refused(file, store, "no file of torch.save", cs.FormatError)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("x.npy", b"1")
    refused(file, store, r"no data\.pkl", cs.FormatError)
    file.unlink()
    os.mkfifo(file)
    refused(file, store, "no regular file", cs.FormatError)
    # Also where one is put in the place of what was looked at.
    (tmp_path / "link.pt").symlink_to(file)
    with pytest.raises(cs.FormatError, match="is no"):
        cs.import_from(tmp_path / "link.pt", store)


def header(path: Path, fields: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    """A safetensors file with this header."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def row(begin: int, end: int, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES: dict[str, tuple[Any, str]] = {
    "overlapping": ({"a": row(0, 12, [3]), "b": row(8, 16, [2])}, "overlaps"),
    "the same bytes": ({"a": row(0, 16, [4]), "b": row(0, 16, [4])}, "overlaps"),
    "beyond the end": ({"a": row(0, 1 << 20, [1 << 18])}, "was cut off"),
    "a hole": ({"a": row(0, 4, [1]), "b": row(8, 16, [2])}, "hole"),
    "bytes of nobody": ({"a": row(0, 8, [2])}, "belong to no tensor"),
    "backwards": ({"a": row(16, 0, [4])}, "has -16 bytes"),
    "negative": ({"a": row(-16, 0, [4])}, "can't be"),
    "another size": ({"a": row(0, 16, [5])}, "16 bytes"),
    "huge": ({"a": row(0, 16, [1 << 59, 1 << 59, 0])}, "16 bytes"),
    "a number as shape": ({"a": row(0, 16, 4)}, "malformed"),
    "fractions": ({"a": row(0, 16, [4.0])}, "can't be"),
    "unknown type": ({"a": row(0, 16, [4], "F4")}, "type 'F4'"),
    "no object": ([1], "malformed"),
    "no JSON": (b"{", "malformed|no safetensors"),
    "twice": (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{}}', "twice"),
    "no texts": ({"__metadata__": {"a": 1}, "a": row(0, 16, [4])}, "no texts"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "malformed"),
    "no text": (b"{\xff\xff}", "malformed"),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(name: str, tmp_path: Path, store: cs.Store) -> None:
    fields, match = LIES[name]
    refused(header(tmp_path / "a.safetensors", fields), store, match, step=1)


def test_headers_that_are_none(tmp_path: Path, store: cs.Store) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4)}, file)
    good = file.read_bytes()
    for cut in (1, 8, 20, len(good) - 1):
        file.write_bytes(good[:cut])
        refused(file, store, "a.safetensors", step=1)
    for length in (0, 1, 1 << 40, (1 << 64) - 1):
        refused(header(file, {"a": row(0, 16, [4])}, length=length), store, "no safetensors|cut off", step=1)


def test_an_index_that_points_elsewhere(tmp_path: Path, store: cs.Store) -> None:
    """Only files beside the index are a model's parts."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(4)}, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..", "", 7, None):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises((*REFUSALS, cs.NotFoundError)):
            cs.import_from(index, store, step=1)
        assert store.checkpoints() == []


# -- a reader that isn't ours any more ------------------------------------------------------------------------------


def test_a_reader_that_is_killed(tmp_path: Path, store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a tensor: the store is as it was, and the next import works."""
    torch.save({"w": torch.zeros(6 << 20), "step": 1}, tmp_path / "a.pt")
    store.save({"before": 1}, step=0)
    kills: list[int] = []
    read = Reader.read

    def deadly(self: Reader, index: int, offset: int, out: memoryview) -> None:
        if offset and not kills:
            kills.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        read(self, index, offset, out)

    monkeypatch.setattr(Reader, "read", deadly)
    with pytest.raises(cs.StorageError, match="was killed"):
        cs.import_from(tmp_path / "a.pt", store)
    assert kills
    assert [one.step for one in store.checkpoints()] == [0]
    assert store.verify().ok
    assert store.verify().leftovers == []
    assert len(cs.import_from(tmp_path / "a.pt", store).checkpoints) == 1


def _with(answer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**answer, **changes}


NONSENSE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dict": lambda answer: [answer],
    "nothing": lambda answer: {},
    "no tensors": lambda answer: _with(answer, tensors=[]),
    "a tensor of no node": lambda answer: _with(answer, tensors=[*answer["tensors"], ["x", "U8", [1], None, 1]]),
    "twice": lambda answer: _with(answer, tensors=answer["tensors"] * 2),
    "another size": lambda answer: _with(answer, tensors=[["w", "F32", [1 << 40], None, 12]]),
    "another type": lambda answer: _with(answer, tensors=[["w", "XX", [3], None, 12]]),
    "no shape": lambda answer: _with(answer, tensors=[["w", "F32", "3", None, 12]]),
    "an object": lambda answer: _with(answer, nodes={"": {"$": "object", "type": "x", "state": 1}}),
    "a module": lambda answer: _with(answer, nodes={"": {"$": "module", "entries": {}}}),
    "a component": lambda answer: _with(answer, nodes={**answer["nodes"], "more": 1}),
    "no step": lambda answer: _with(answer, told={**answer["told"], "step": -1}),
    "no told": lambda answer: _with(answer, told=None),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_reader_that_lies(name: str, tmp_path: Path, store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is checked before anything is saved."""
    torch.save({"w": torch.ones(3), "step": 1}, tmp_path / "a.pt")
    opened = Reader.open
    lied = []

    def lie(self: Reader, *args: Any, **options: Any) -> Any:
        lied.append(name)
        return NONSENSE[name](opened(self, *args, **options))

    monkeypatch.setattr(Reader, "open", lie)
    refused(tmp_path / "a.pt", store, None)
    assert lied


def test_a_reader_that_talks_nonsense(tmp_path: Path, store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of another kind or length end it."""
    torch.save({"w": torch.ones(3), "step": 1}, tmp_path / "a.pt")
    heads = [(b"B", 12), (b"J", 1 << 40), (b"?", 0), (b"P", 9)]
    for head in heads:
        monkeypatch.setattr(sandboxes.channel, "receive_head", lambda sock, head=head: head)
        refused(tmp_path / "a.pt", store, None, cs.FormatError, cs.StorageError)
