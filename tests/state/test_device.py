"""The path of CUDA tensors, its logic only: a CPU stands in for the device and notes what it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.state import device, encode
from ckptstore.state.device import DeviceReader


class FakeCuda:
    """Streams and events that only write down in which order they were used."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: FakeStream = FakeStream(self, "training")
        self.names = iter(f"event {n}" for n in range(100_000))

    def Event(self) -> FakeEvent:
        return FakeEvent(self, next(self.names))

    def Stream(self, _: object) -> FakeStream:
        return FakeStream(self, "side")

    def current_stream(self, _: object) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.name}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record(self, stream: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} after {stream.name}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.name}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(device, "cuda", fake)
    monkeypatch.setattr(device, "_side_streams", {})
    monkeypatch.setattr(device, "_pinned", lambda count: torch.empty(count, dtype=torch.uint8))
    return fake


def test_reading_waits_for_what_was_queued_and_only_on_its_own_stream(fake: FakeCuda) -> None:
    """The order: the training stream's event, waited for by the side stream; the host waits for the copy alone."""
    tensor = torch.arange(1000, dtype=torch.bfloat16).reshape(10, 100)
    reader = DeviceReader(torch.device("cpu"))
    out = bytearray(300)
    reader.read_into(tensor, 100, memoryview(out))
    assert out == tensor.view(torch.uint8).numpy().tobytes()[100:400]
    assert fake.log == [
        "event 0 after training",
        "side waits for event 0",
        "event 1 after side",
        "host waits for event 1",
    ]
    assert fake.current.name == "training"


@pytest.mark.parametrize("mode", ["sync", "async", "overlapped"])
def test_saves_read_the_device_in_place(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """All modes go through the reader, are exact, and the fence holds a step back until the device was read."""
    readers: dict[str, DeviceReader] = {}

    def reader(_: object, value: torch.Tensor) -> DeviceReader:
        if "x" not in readers:
            readers["x"] = DeviceReader(value.device)
        return readers["x"]

    monkeypatch.setattr(encode.Encoder, "_reader", reader)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300))
    model[1].weight.data = model[1].weight.data.t()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with cs.open(f"memory://device-{mode}") as store:
            handle = store.save({"model": model, "optimizer": optimizer}, step=1, mode=mode)
            optimizer.step()
            if mode != "sync":
                handle.result()
            saved = store.load(only=["model/*"])["model"]
        assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert any(line.startswith("host waits") for line in fake.log)
    assert sum("after training" in line for line in fake.log) == 1
