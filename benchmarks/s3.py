"""Saves to and loads from a bucket beside all other ways to move the bytes, on real servers on this machine.

Plain clients are measured with the number of requests at a time that is best for each, found beforehand. The server is
begun anew each round, so that nothing which was removed is cleared up while somebody is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

import ckptstore as cs
from benchmarks import ceph
from benchmarks.rounds import settle, timed
from benchmarks.s3clients import CLIENTS, NEEDS_ONE, Place
from benchmarks.tensors import gpt2_adamw
from ckptstore.format import layout
from ckptstore.format.records import seal
from ckptstore.storage.s3 import S3Storage
from ckptstore.tools.subjects import drop_cache
from ckptstore.tools.turns import Tell, turns
from tests.s3.latency import Latency
from tests.s3.seaweed import Seaweed, binary

IN_FLIGHT = (2, 4, 8)
TRIED_BYTES = 256 << 20
"""To find the best of these."""
WARM_BYTES = 20 << 20
"""Moved by everybody before the clock runs: what is imported, and what a server sets up, costs nobody."""
LISTED = 1000
DELAY_S = 0.02


class Server(Protocol):
    """Of S3, with its data in a folder."""

    folder: Path

    @property
    def endpoint(self) -> str: ...
    @property
    def options(self) -> dict[str, Any]: ...
    def start(self) -> None: ...
    def kill(self) -> None: ...
    def bucket(self) -> str: ...


SERVERS: dict[str, tuple[Callable[[Path], Server], tuple[str, ...]]] = {
    "seaweedfs": (Seaweed, ("save", "load")),
    "ceph": (ceph.Ceph, ("save",)),
}
"""How each is made, and what is measured with it."""


def installed() -> tuple[str, ...]:
    """The servers that are here."""
    there = {"seaweedfs": binary() is not None, "ceph": ceph.installed()}
    return tuple(name for name, is_there in there.items() if is_there)


def measure(
    folder: str,
    rounds: int,
    *,
    make: Callable[[], dict[str, torch.Tensor]] = gpt2_adamw,
    names: Sequence[str] | None = None,
    clients: Sequence[str] = tuple(CLIENTS),
    in_flight: Sequence[int] = IN_FLIGHT,
    tried_bytes: int = TRIED_BYTES,
    listed: int = LISTED,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Seconds of each round by server, verb and client, and with SeaweedFS: requests, listing and memory."""
    tensors = make()
    size = sum(tensor.nbytes for tensor in tensors.values())
    data = os.urandom(size)
    found: dict[str, Any] = {"bytes": size, "servers": {}}
    for name in installed() if names is None else names:
        begin = partial(_running, name, folder)
        best = _best(begin, SERVERS[name][1], clients, in_flight, tried_bytes)
        times = {verb: {client: [] for client in clients} for verb in SERVERS[name][1]}
        for number in range(rounds):
            with begin() as server:
                place = Place(server.options, server.bucket(), tensors, data)
                _round(server, place, number, best, times, tell)
        found["servers"][name] = {"in_flight": best, **times}
    if "seaweedfs" in (installed() if names is None else names):
        with _running("seaweedfs", folder) as server:
            found["requests"] = requests(server, tensors)
            found["listing"] = listing(server, listed, rounds)
            found["memory"] = _memory(server, rounds, small=make is not gpt2_adamw)
    return found


@contextmanager
def _running(name: str, folder: str) -> Iterator[Server]:
    """The server, until the block is left; nothing of its data stays."""
    place = Path(tempfile.mkdtemp(prefix=name, dir=folder))
    server = SERVERS[name][0](place / "server")
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(place, ignore_errors=True)


def _best(
    begin: Callable[[], Any], verbs: Sequence[str], clients: Sequence[str], in_flight: Sequence[int], tried_bytes: int
) -> dict[str, dict[str, int]]:
    """The number of requests at a time with which each client is fastest, by verb."""
    best: dict[str, dict[str, int]] = {verb: {} for verb in verbs}
    with begin() as server:
        warm_bytes = min(WARM_BYTES, tried_bytes)
        small = {"tensor": torch.randn(warm_bytes // 4)}
        place = Place(server.options, server.bucket(), small, os.urandom(warm_bytes))
        for client in clients:
            CLIENTS[client]().save(place, f"{client}-warm", 2)
            CLIENTS[client]().load(place, f"{client}-warm", 2)
        tried = Place(server.options, place.bucket, small, os.urandom(tried_bytes))
        for client in (name for name in clients if name not in NEEDS_ONE):
            times: dict[str, dict[int, list[float]]] = {verb: {n: [] for n in in_flight} for verb in verbs}
            for turn, n in ((turn, n) for turn in range(2) for n in in_flight):
                for verb in verbs:
                    act = getattr(CLIENTS[client](), verb)
                    times[verb][n].append(timed(partial(act, tried, f"{client}-{n}-{turn}", n)))
            for verb in verbs:
                best[verb][client] = min(in_flight, key=lambda n: min(times[verb][n]))
    return best


def _round(
    server: Server,
    place: Place,
    number: int,
    best: dict[str, dict[str, int]],
    times: dict[str, dict[str, list[float]]],
    tell: Tell | None,
) -> None:
    """Everybody saves, and then everybody loads what it saved, from a cold page cache."""
    for verb, found in times.items():
        order = list(turns(list(found), number + 1))[number * len(found) :]
        for at, client in enumerate(order):
            if tell is not None:
                tell(f"{type(server).__name__}: {verb} {client}", number * len(order) + at, (number + 1) * len(order))
            settle()
            if verb == "load":
                drop_cache(str(server.folder))
            act = getattr(CLIENTS[client](), verb)
            found[client].append(timed(partial(act, place, client, best[verb].get(client, 1))))


def requests(server: Server, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    """How many requests of each kind a second save of a store takes, and loading that whole, or one tensor of it."""
    found = {}
    url = f"s3://{server.bucket()}/counted"
    one = min(tensors, key=lambda name: abs(tensors[name].nbytes - 2e6))
    with Latency(server.endpoint) as way:
        options = way.options(server.options)
        with cs.open(url, storage_options=options) as store:
            store.save({"x": 1}, step=0)
            way.forget()
            store.save(tensors, step=1)
            found["save"] = dict(way.kinds())
        for name, only in (("load", None), ("one", [one])):
            with cs.open(url, storage_options=options, read_only=True) as store:
                store.resolve()
                way.forget()
                store.load(only=only)
                found[name] = dict(way.kinds()) | {"bytes": sum(passed.got for passed in way.passed)}
    return found


def listing(server: Server, checkpoints: int, rounds: int) -> dict[str, Any]:
    """Seconds to list a store from nothing, by a way that delays each request."""
    bucket = server.bucket()
    url = f"s3://{bucket}/listed"
    with cs.open(url, storage_options=server.options) as store:
        first = store.save({"x": 1}, step=0)
    storage = S3Storage(bucket, "listed", server.options)

    def add(seq: int) -> None:
        id = layout.new_id(1, seq, seq)
        record = first.record.model_copy(update={"id": str(id), "step": id.step})
        storage.create(layout.commit_key(id), seal(record))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(add, range(2, checkpoints + 1)))
    seconds = []
    with Latency(server.endpoint, DELAY_S) as way:
        for _ in range(rounds):
            way.forget()
            with cs.open(url, storage_options=way.options(server.options), read_only=True) as store:
                seconds.append(timed(lambda store=store: store.checkpoints()))  # type: ignore[misc]
        requests = dict(way.kinds())
    return {"checkpoints": checkpoints, "delay_s": DELAY_S, "seconds": seconds, "requests": requests}


def _memory(server: Server, rounds: int, *, small: bool) -> dict[str, list[int]]:
    """Peak bytes of a process beyond what it had, and for a load beyond the state too, one number a round."""
    found: dict[str, list[int]] = {"save_bytes": [], "load_bytes": []}
    for number in range(min(rounds, 3)):
        asked = {"bucket": server.bucket(), "name": f"memory-{number}", "options": server.options, "small": small}
        command = [sys.executable, "-m", "benchmarks.s3memory", json.dumps(asked)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
        for key, value in json.loads(done.stdout).items():
            found[key].append(value)
    return found
