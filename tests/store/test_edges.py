"""What is rare and must be right all the same: limits, signals, scarce memory, clocks, states with loops."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from ckptstore.engine import committer


@pytest.fixture
def store(tmp_path: Path) -> cs.Store:
    return cs.open(tmp_path / "store")


def folder(store: cs.Store) -> Path:
    return Path(store.url.removeprefix("file://"))


def test_plain_data_too_large_to_be_loaded_is_not_acknowledged(
    store: cs.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save whose part a reader would refuse fails, leaves nothing, and the next one succeeds."""
    store.save({"x": 1}, step=1)
    monkeypatch.setattr(committer, "PART_LIMIT", 10_000)
    with pytest.raises(cs.StateError, match="10000 can be loaded again"):
        store.save({"w": torch.ones(3), "text": "x" * 10_001}, step=2)
    assert [c.step for c in store.checkpoints()] == [1]
    assert not store.verify().leftovers
    assert store.save({"x": 2}, step=2).step == 2


def test_a_signal_handler_saves_in_the_midst_of_a_save(store: cs.Store) -> None:
    """A handler that saves while its own thread saves doesn't wait for itself; both checkpoints are good."""
    inner: list[int] = []

    def handler(*_: object) -> None:
        inner.append(store.save({"w": torch.ones(3)}, step=2).step)

    def interrupt(done: int, total: int) -> None:
        if not inner:
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        outer = store.save({"w": torch.ones(40 << 20, dtype=torch.uint8)}, step=1, progress=interrupt)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (outer.step, inner[0]) == (1, 2)
    assert sorted(c.step for c in store.checkpoints()) == sorted([1, *inner])
    assert store.verify().ok


def test_lack_of_memory_is_no_damage(store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """latest doesn't go back to an older checkpoint because the newest doesn't fit into memory now."""
    store.save({"w": torch.ones(3)}, step=1)
    store.save({"w": torch.ones(1 << 10)}, step=2)
    empty, refused = torch.empty, []

    def scarce(shape: Any, **options: Any) -> torch.Tensor:
        if shape != (3,):
            refused.append(shape)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
        return empty(shape, **options)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(torch, "empty", scarce)
        warnings.simplefilter("error")
        with pytest.raises(cs.StateError, match="no memory for the 4096 bytes of 'w'"):
            store.load()
    assert refused
    assert store.load()["w"].shape == (1 << 10,)


def test_an_inference_tensor_is_a_misfit_and_no_damage(store: cs.Store) -> None:
    """A target that torch lets nobody write to is named before anything changes; inside of the mode it is restored."""
    store.save({"v": torch.ones(4), "w": torch.ones(4, 4)}, step=1)
    with torch.inference_mode():
        target = {"v": torch.zeros(4), "w": torch.zeros(4, 8)[:, ::2]}
    with pytest.raises(cs.StateError, match=r"w: .*inference tensor"):
        store.load(into=target)
    assert not target["v"].any()
    with torch.inference_mode():
        store.load(into=target)
        assert target["w"].all()


def test_a_file_from_the_future_ends_no_grace(store: cs.Store) -> None:
    """A foreign file with a wrong time doesn't make prune reclaim what was deleted just now."""
    store.save({"w": 1}, step=1)
    store.save({"w": 2}, step=2)
    stranger = folder(store) / "notes.txt"
    stranger.touch()
    os.utime(stranger, (time.time() + 1e6,) * 2)
    deleted = store.delete("step:1")
    assert not store.prune().reclaimed
    assert store.undelete(deleted.id).id == deleted.id


def test_an_optimizer_that_lists_a_parameter_twice_is_restored(store: cs.Store) -> None:
    """Two heads that share a trunk: what was acknowledged can be loaded, in place and as plain values."""

    def make() -> dict[str, Any]:
        trunk = nn.Linear(4, 4)
        actor, critic = nn.Sequential(trunk, nn.Linear(4, 2)), nn.Sequential(trunk, nn.Linear(4, 1))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], 0.1, momentum=0.9)
        return {"actor": actor, "critic": critic, "optimizer": optimizer}

    state, target = make(), make()
    x = torch.ones(1, 4)
    (state["actor"](x).sum() + state["critic"](x).sum()).backward()
    state["optimizer"].step()
    store.save(state, step=1)
    store.load(into=target)
    for mine, other in zip(state["optimizer"].param_groups, target["optimizer"].param_groups, strict=True):
        for one, two in zip(mine["params"], other["params"], strict=True):
            momenta = state["optimizer"].state[one], target["optimizer"].state[two]
            assert torch.equal(momenta[0]["momentum_buffer"], momenta[1]["momentum_buffer"])
            assert torch.equal(one, two)
    names = store.load()["optimizer"]["groups"][0]["params"]
    assert len(set(names)) == len(names) == 8


def test_more_files_than_a_process_may_open_are_verified(store: cs.Store) -> None:
    """A checkpoint of many components needs one open file at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 40
    store.save({f"c{number}": {"w": torch.ones(2000)} for number in range(60)}, step=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        assert store.verify().ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sampling_leaves_the_runs_random_numbers_alone(store: cs.Store) -> None:
    """A run that verifies a sample draws the same random numbers as one that doesn't."""
    store.save({"w": torch.ones(3)}, step=1)
    before = random.getstate()
    store.verify(sample=0.5)
    assert random.getstate() == before


@pytest.mark.parametrize(
    "fields", [{"metrics": {"x": 10**400}}, {"metrics": {1: 2.0}}, {"reasons": [1]}], ids=["huge", "name", "reason"]
)
def test_odd_facts_are_state_errors(store: cs.Store, fields: dict[str, Any]) -> None:
    """Numbers beyond floats and names that are no text are refused by an error of ours."""
    with pytest.raises(cs.StateError):
        store.save({}, step=1, **fields)


def test_a_newest_commit_record_that_is_damaged_was_skipped(store: cs.Store) -> None:
    """latest says by warning and in .skipped that it went back, also where the commit record itself is bad."""
    store.save({"w": 1}, step=1)
    bad = store.save({"w": 2}, step=2)
    store.hold(bad.id, "paper")
    record = folder(store) / "commits" / f"{bad.id}.json"
    record.write_bytes(record.read_bytes().replace(b'"commit"', b'"commix"'))
    fresh = cs.open(store.url)
    with pytest.warns(cs.FallbackWarning, match=bad.id):
        loaded = fresh.load(into={"w": 0})
    assert (loaded.checkpoint.step, list(loaded.skipped)) == (1, [bad.id])
    for selector in ("paper", "step:2", bad.id):
        with pytest.warns(cs.DamageWarning), pytest.raises(cs.IntegrityError, match="seal"):
            fresh.load(selector)


def test_shared_writers_follow_the_newest_number(store: cs.Store) -> None:
    """Of two that began at once each may have claimed a number; what either saves next is latest."""
    with cs.open(store.url, shared=True) as first, cs.open(store.url) as claimed_next:
        first.save({"w": 1}, step=1)
        claimed_next.save({"w": 2}, step=2)
        saved = first.save({"w": 3}, step=3)
        assert first.resolve().id == saved.id


def test_what_only_leaves_out_stays(store: cs.Store) -> None:
    """Elements of tuples and lists that were not asked for keep their values and their places."""
    store.save({"t": (1, 2, 3), "l": [1, 2, 3]}, step=1)
    target = {"t": (7, 8, 9), "l": [7, 8, 9, 10]}
    store.load(into=target, only=["t/1", "l/1"])
    assert target == {"t": (7, 2, 9), "l": [7, 2, 9, 10]}


def test_an_optimizer_alone_is_matched_by_the_names_of_the_targets_modules(store: cs.Store) -> None:
    """With only= the optimizer's state doesn't go to the parameter at the same place but to that of the same name."""

    def make(order: list[str]) -> dict[str, Any]:
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(3)) for name in ("a", "b")})
        return {"model": model, "optimizer": torch.optim.SGD([model[name] for name in order], 0.1, momentum=0.9)}

    state, target = make(["a", "b"]), make(["b", "a"])
    for number, name in enumerate(("a", "b")):
        state["model"][name].grad = torch.full((3,), float(number))
    state["optimizer"].step()
    store.save(state, step=1)
    store.load(into=target, only=["optimizer/*"])
    for number, name in enumerate(("a", "b")):
        buffer = target["optimizer"].state[target["model"][name]]["momentum_buffer"]
        assert buffer.tolist() == [number] * 3


def test_a_target_that_stands_twice_spoils_no_other(store: cs.Store) -> None:
    """A tensor shared with one that is overwritten by another value comes in as it was saved."""
    one, two = torch.ones(4), torch.full((4,), 2.0)
    store.save({"a": one, "b": two, "c": one}, step=1)
    alias = torch.zeros(4)
    target = {"a": alias, "b": alias, "c": torch.zeros(4)}
    store.load(into=target)
    assert torch.equal(target["c"], one)


def test_odd_and_long_names_of_tensors(store: cs.Store) -> None:
    """A key that is reserved in the file, or longer than its table takes, is stored all the same."""
    state = {"m": {"__metadata__": torch.ones(1), "x" * 5000: torch.ones(2), "x" * 5001: torch.ones(3)}}
    store.save(state, step=1)
    found = store.load()["m"]
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in state["m"].items()}


def test_extra_state_that_fails_is_named(store: cs.Store) -> None:
    """What a module's own code raises becomes a StateError that says where."""

    class Broken(nn.Module):
        def get_extra_state(self) -> object:
            raise KeyError("boom")

    with pytest.raises(cs.StateError, match="boom") as caught:
        store.save({"net": Broken()}, step=1)
    assert caught.value.path == "net"


def test_a_machine_without_room_for_threads_still_saves_and_loads(
    store: cs.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started, the calling one does all the work."""
    refused = []

    def start(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    store.save({"w": torch.ones(40 << 20, dtype=torch.uint8)}, step=1)
    assert store.load()["w"].all()
    assert refused


def test_a_record_that_grows_over_its_limit_leaves_nothing(store: cs.Store) -> None:
    """At every length of the reasons a save succeeds, is refused, or fails and removes what it wrote."""
    weights = torch.ones(5_000_000)
    failed = []
    for length in range(628, 652):
        try:
            store.save({"w": weights}, step=length, reasons=["x" * 1000] * 15 + ["z" * length])
        except cs.CheckpointError as error:
            failed.append(error.code)
    assert not store.verify().leftovers
    assert {"save_failed", "format"} <= set(failed)


def test_damage_is_not_handed_on_by_borrowing(store_path: Path) -> None:
    """A run that resumed past a damaged checkpoint saves its step again, and writes what it could have borrowed."""
    frozen = torch.nn.Linear(300, 300).requires_grad_(False)
    state = {"frozen": frozen, "values": torch.arange(10_000)}
    with cs.open(store_path) as store:
        first = store.save(state, step=1)
    damaged = sorted((store_path / "checkpoints" / first.id).glob("*.safetensors"))
    assert len(damaged) == 2
    for file in damaged:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with cs.open(store_path) as store:
        again = store.save(state, step=1)
        assert (again.borrowed_bytes, list(again.record.lenders)) == (0, [])
        assert store.verify(again.id).ok
    with cs.open(store_path) as store:
        # What is whole is borrowed, by a new process, too.
        assert store.save(state, step=1).borrowed_bytes == again.stored_bytes
