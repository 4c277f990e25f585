"""A store in a bucket behind a bad network: run in a network namespace of its own, where it makes the network bad.

    unshare --net python -m tests.s3.network CONDITION FOLDER

Prints one JSON document: what was saved, loaded and verified, and how often the fault fired.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import ckptstore as cs
from tests.s3.seaweed import Seaweed

BYTES = 34 << 20
"""Two blocks of 16 MiB and a bit, so that parts are in flight together."""
ROUNDS = 5
"""At most so many, until the fault has fired."""

LOSS = ["-m", "statistic", "--mode", "random", "--probability"]


def shell(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def limit(port: int, rate: str) -> None:
    """What goes to and from ``port`` shares ``rate``; the server's own traffic doesn't."""
    shell(*"tc qdisc add dev lo root handle 1: htb default 20 r2q 1000".split())
    shell(*f"tc class add dev lo parent 1: classid 1:10 htb rate {rate} burst 128k".split())
    shell(*"tc class add dev lo parent 1: classid 1:20 htb rate 100gbit burst 1m".split())
    for side in ("--dport", "--sport"):
        rule = ["-p", "tcp", side, str(port), "-j", "CLASSIFY", "--set-class", "1:10"]
        shell("iptables", "-t", "mangle", "-A", "POSTROUTING", *rule)


def lose(port: int, share: str) -> None:
    """Drop ``share`` of the packets in both directions."""
    for side in ("--dport", "--sport"):
        shell("iptables", "-A", "INPUT", "-p", "tcp", side, str(port), *LOSS, share, "-j", "DROP")


def reset(port: int, share: str) -> None:
    """Answer ``share`` of the packets to the server with a reset."""
    rule = ["-p", "tcp", "--dport", str(port), *LOSS, share, "-j", "REJECT", "--reject-with", "tcp-reset"]
    shell("iptables", "-A", "INPUT", *rule)


def rule_hits() -> int:
    """Packets that were dropped or answered with a reset."""
    lines = shell("iptables", "-L", "INPUT", "-n", "-v", "-x").splitlines()
    return sum(int(line.split()[0]) for line in lines if " DROP " in line or " REJECT " in line)


def throttled() -> int:
    """Packets that had to wait."""
    words = shell("tc", "-s", "class", "show", "dev", "lo", "classid", "1:10").replace(",", " ").split()
    return int(words[words.index("overlimits") + 1])


class Proxy:
    """Passes everything on, each way ``delay_s`` later."""

    def __init__(self, port: int, delay_s: float) -> None:
        self.target, self.delay_s, self.delayed = port, delay_s, 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.port: int = self.server.sockets[0].getsockname()[1]
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self.carry(reader, far_writer), self.carry(far_reader, writer))

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self.delayed += 1
            self.loop.call_later(self.delay_s, writer.write, data)
        self.loop.call_later(self.delay_s, writer.close)


def exercise(options: dict[str, Any], url: str, seed: int) -> dict[str, Any]:
    """Save, load and verify; what came of it, and the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    state = {"model": {"w": torch.randn(BYTES // 4, generator=generator)}, "step": seed}
    began = time.perf_counter()
    with cs.open(url, storage_options=options) as store:
        handle = store.save(state, step=seed, mode="async")
        saved = handle.result()
        saved_s = time.perf_counter() - began
    with cs.open(url, storage_options=options, read_only=True) as store:
        began = time.perf_counter()
        loaded = store.load(saved.id)
        loaded_s = time.perf_counter() - began
        return {
            "same": torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["step"] == seed,
            "good": store.verify(saved.id).ok,
            "save_s": saved_s,
            "load_s": loaded_s,
        }


def run(condition: str, folder: Path) -> dict[str, Any]:
    shell(*"ip link set lo up mtu 1500".split())
    server = Seaweed(folder)
    server.start()
    try:
        bucket, port = server.bucket(), int(server.endpoint.rpartition(":")[2])
        name, _, value = condition.partition("=")
        options, fired = server.options, rule_hits
        if name == "rate":
            limit(port, value)
            fired = throttled
        elif name == "loss":
            lose(port, value)
        elif name == "resets":
            reset(port, value)
        elif name == "latency":
            proxy = Proxy(port, float(value) / 2)
            options, fired = options | {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}, lambda: proxy.delayed
        rounds: list[dict[str, Any]] = []
        while not rounds or (not fired() and len(rounds) < ROUNDS):
            rounds.append(exercise(options, f"s3://{bucket}/runs", len(rounds) + 1))
        with cs.open(f"s3://{bucket}/runs", storage_options=options) as store:
            listed = [checkpoint.step for checkpoint in store.checkpoints()]
        return {"rounds": rounds, "listed": listed, "fired": fired()}
    finally:
        server.kill()


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
