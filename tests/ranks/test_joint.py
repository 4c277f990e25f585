"""What several ranks save together and get back: threads stand in for them, with a board and a storage in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptstore as cs
from ckptstore.engine.crew import Crew
from ckptstore.store import Store
from tests.ranks.boards import boards, on_all

URL = "memory://"


class Fleet:
    """Ranks that share a place."""

    def __init__(self, size: int, place: str, **options: Any) -> None:
        self.size = size
        self.stores: list[Store] = []
        for board in boards(size):
            store = cs.open(place, **options)
            store._crew = Crew(board, timeout_s=20, folder=place)
            self.stores.append(store)

    def all(self, run: Callable[[Store, int], Any]) -> list[Any]:
        """What ``run`` gives on each rank; the first error of one is raised."""
        found = on_all(self.size, lambda rank: run(self.stores[rank], rank))
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return found

    def close(self) -> None:
        for store in self.stores:
            store.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Any:
    made: list[Fleet] = []

    def make(size: int, **options: Any) -> Fleet:
        made.append(Fleet(size, str(tmp_path / "store"), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_differs_is_saved_for_each(fleet: Any) -> None:
    four = fleet(4)

    def state(rank: int) -> dict[str, Any]:
        norm = nn.BatchNorm1d(3)
        norm.running_mean.fill_(rank)  # type: ignore[union-attr]
        with torch.no_grad():
            norm.weight.fill_(7)
        return {"norm": norm, "mine": {"list": [rank, rank], "bytes": bytes([rank]) * 3000, "only": {f"r{rank}": rank}}}

    four.all(lambda store, rank: store.save(state(rank), step=1))

    def load(store: Store, rank: int) -> Any:
        target = state(9)
        target["mine"] = {"list": [], "bytes": b"", "only": {}}
        store.load(into=target)
        return target["norm"].running_mean[0].item(), target["norm"].weight[0].item(), target["mine"]

    for rank, (mean, weight, mine) in enumerate(four.all(load)):
        assert (mean, weight) == (rank, 7)
        assert mine == {"list": [rank, rank], "bytes": bytes([rank]) * 3000, "only": {f"r{rank}": rank}}
    together = four.stores[0].load()
    assert together["mine"]["only"] == {"r0": 0, "r1": 1, "r2": 2, "r3": 3}
    assert together["norm"]["weight"][0] == 7
    with pytest.raises(cs.NotFoundError, match="has nothing of rank 4"):
        four.stores[0].load(rank=4)
    with pytest.raises(cs.FormatError, match="rank=1: only for loading without into="):
        four.stores[0].load(into={}, rank=1)  # type: ignore[call-overload]


def stages(first: int, count: int, seed: int) -> nn.ModuleDict:
    """Some layers of a model that is spread over stages."""
    torch.manual_seed(seed)
    return nn.ModuleDict({f"layer{number}": nn.Linear(4, 4) for number in range(first, first + count)})


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_pipeline_stages_go_to_any_number_of_stages(ranks: int, fleet: Any) -> None:
    """Four stages of three layers each: every layer is on one rank, optimizer state too."""
    models = [stages(3 * rank, 3, rank) for rank in range(4)]
    optimizers = [trained(model) for model in models]
    four = fleet(4)
    four.all(lambda store, rank: store.save({"model": models[rank], "optimizer": optimizers[rank], "n": 1}, step=1))

    def load(store: Store, rank: int) -> Any:
        model = stages(12 // ranks * rank, 12 // ranks, 99)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        store.load(into={"model": model, "optimizer": optimizer, "n": 0})
        return model, optimizer

    other = fleet(ranks) if ranks > 1 else None
    found = other.all(load) if other is not None else [load(_alone(four), 0)]
    for model, optimizer in found:
        assert optimizer.param_groups[0]["lr"] == 0.1
        for name, layer in model.items():
            number = int(name.removeprefix("layer"))
            saved, state = models[number // 3][name], optimizers[number // 3].state
            assert torch.equal(layer.weight, saved.weight)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[layer.weight][key], state[saved.weight][key])


def _alone(fleet: Fleet) -> Store:
    return cs.open(fleet.stores[0].url.removeprefix("file://"), ranks="one")


def test_what_no_stage_takes_is_unexpected(fleet: Any) -> None:
    models = [stages(3 * rank, 3, rank) for rank in range(2)]
    two = fleet(2)
    two.all(lambda store, rank: store.save({"model": models[rank]}, step=1))
    three = fleet(3)

    def load(store: Store, rank: int) -> Any:
        return store.load(into={"model": stages(rank, 1, 5)})

    found = on_all(3, lambda rank: load(three.stores[rank], rank))
    for error in found:
        assert isinstance(error, cs.StateError)
        assert "unexpected: model/layer3.bias, model/layer3.weight" in str(error)
        assert "layer2" not in str(error)


def test_stages_that_call_their_layers_alike_keep_their_own(fleet: Any) -> None:
    """DCP saves one of them in the place of all."""
    models = [nn.Linear(30, 30) for _ in range(3)]
    three = fleet(3)
    three.all(lambda store, rank: store.save({"model": models[rank]}, step=1))
    fresh = [nn.Linear(30, 30) for _ in range(3)]
    three.all(lambda store, rank: store.load(into={"model": fresh[rank]}))
    for before, after in zip(models, fresh, strict=True):
        assert torch.equal(before.weight, after.weight)
    assert three.stores[0].resolve().tensors == 6


def test_large_replicas_are_cut_and_come_back(fleet: Any) -> None:
    """Rows of one tensor are written by several ranks, overlapped with the next step, whose values don't get in."""
    weight = torch.arange(3 * (1 << 23), dtype=torch.float32).reshape(-1, 1024)
    copies = [torch.nn.Parameter(weight.clone()) for _ in range(3)]
    three = fleet(3)

    def save(store: Store, rank: int) -> Any:
        parameter = copies[rank]
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        handle = store.save({"w": parameter, "o": optimizer}, step=1, mode="overlapped")
        assert handle.mode == "overlapped"
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return handle.result()

    three.all(save)
    contents = three.stores[0].contents(three.stores[0].resolve())
    sizes = [sum(file.stored_bytes for file in part.files) for part in contents.parts]
    assert max(sizes) < 1.13 * sum(sizes) / 3
    assert sum(sizes) < 1.01 * weight.nbytes
    state = three.stores[0].load()
    assert torch.equal(state["w"], weight)


def test_what_is_frozen_is_borrowed_by_each_rank(fleet: Any, tmp_path: Path) -> None:
    """In the same process, and by the next one."""
    base = nn.Linear(3000, 3000)
    base.requires_grad_(False)

    def state(rank: int, step: int) -> dict[str, Any]:
        return {"base": base, "head": torch.full((10,), float(step)), "mine": rank}

    two = fleet(2)
    firsts, (second, _) = (two.all(lambda store, rank, s=s: store.save(state(rank, s), step=s)) for s in (1, 2))
    first = firsts[0]
    # One record, with the times of rank 0.
    assert firsts[1].timing == first.timing
    assert first.timing is not None
    assert first.timing.save_s == first.timing.stall_s
    assert first.borrowed_bytes == 0
    assert second.borrowed_bytes >= 36_000_000
    again = fleet(2)
    third = again.all(lambda store, rank: store.save(state(rank, 3), step=3))[0]
    assert third.borrowed_bytes == second.borrowed_bytes
    assert {first.id} == set(third.record.lenders)
    again.stores[0].delete(first.id, reclaim=True)
    assert again.stores[0].verify().ok
    assert torch.equal(again.stores[0].load()["base"]["weight"], base.weight)


def test_backups_and_rules_are_rank_0s_business(fleet: Any, tmp_path: Path) -> None:
    backup = str(tmp_path / "backup")
    two = fleet(2, backup=backup, durable="backup", keep=cs.last(1))
    for step in (1, 2, 3):
        two.all(lambda store, rank, step=step: store.save({"x": torch.full((4,), float(rank))}, step=step))
        with cs.open(backup, read_only=True, ranks="one") as copy:
            assert copy.resolve().step == step
            assert copy.verify().ok
    two.close()
    with cs.open(tmp_path / "store", ranks="one") as store:
        assert [c.step for c in store.checkpoints()] == [3]


def test_damage_seen_by_one_sends_all_to_the_checkpoint_before(fleet: Any, tmp_path: Path) -> None:
    three = fleet(3)
    for step in (1, 2):
        three.all(lambda store, rank, step=step: store.save({"mine": torch.full((9,), 10.0 * step + rank)}, step=step))
    newest = three.stores[0].resolve()
    path = tmp_path / "store" / "checkpoints" / newest.id / "state-r00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    def load(store: Store, rank: int) -> Any:
        target = {"mine": torch.zeros(9)}
        loaded = store.load(into=target)
        return loaded.checkpoint.step, target["mine"][0].item(), list(loaded.skipped)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = three.all(load)
    assert found == [(1, 10.0 + rank, [newest.id]) for rank in range(3)]
    assert any(issubclass(one.category, cs.FallbackWarning) for one in told)
    errors = on_all(3, lambda rank: three.stores[rank].load("step:2", into={"mine": torch.zeros(9)}))
    assert [type(error) for error in errors] == [cs.IntegrityError] * 3


def test_what_does_not_fit_one_rank_fails_on_all(fleet: Any) -> None:
    two = fleet(2)
    two.all(lambda store, rank: store.save({"w": torch.zeros(4)}, step=1))
    targets = [{"w": torch.ones(4)}, {"w": torch.ones(5)}]
    errors = on_all(2, lambda rank: two.stores[rank].load(into=targets[rank]))
    assert [type(error) for error in errors] == [cs.StateError] * 2
    assert "saved F32 [4], target F32 [5]" in str(errors[0])
    assert torch.equal(targets[0]["w"], torch.ones(4)), "something was changed"


def test_there_is_nothing_to_load(fleet: Any) -> None:
    two = fleet(2)
    two.all(lambda store, rank: store.save({"w": 1}, step=1))
    two.stores[0].delete("latest", reclaim=True)
    errors = on_all(2, lambda rank: two.stores[rank].load(into={"w": 0}))
    assert [type(error) for error in errors] == [cs.NoCheckpointError] * 2


def test_a_busy_save_is_skipped_by_all_or_none(fleet: Any) -> None:
    two = fleet(2)

    def save(store: Store, rank: int) -> Any:
        first = store.save({"x": torch.zeros(1 << 20)}, step=1, mode="async")
        second = store.save({"x": torch.zeros(4)}, step=2, mode="async", when_busy="skip")
        first.wait()
        if second is not None:
            second.wait()
        return second is None

    assert len(set(two.all(save))) == 1


def test_only_what_changed_is_agreed_upon_again(fleet: Any) -> None:
    """The second message has no table, and the answer no task; another tensor, and they have."""
    two = fleet(2)
    sent: list[Any] = []
    for store in two.stores:
        real = store._crew.exchange  # type: ignore[union-attr]

        def exchange(what: str, message: Any, decide: Any, *, error: Any = None, real: Any = real) -> Any:
            answer = real(what, message, decide, error=error)
            if what == "a save":
                sent.append((message["table"] is not None, answer["task"] is not None))
            return answer

        store._crew.exchange = exchange  # type: ignore[union-attr, method-assign]
    for step, names in enumerate(["a", "a", "ab", "ab"], 1):
        two.all(
            lambda store, rank, step=step, names=names: store.save(
                {n: torch.full((5,), step) for n in names}, step=step
            )
        )
    assert sent == [(True, True)] * 2 + [(False, False)] * 2 + [(True, True)] * 2 + [(False, False)] * 2
    # What was the same is another one now: agreed upon anew, though the tables are the same.
    two.all(lambda store, rank: store.save({n: torch.full((5,), rank) for n in "ab"}, step=9))
    assert sent[-2:] == [(False, True)] * 2
    loaded = [two.stores[0].load(rank=rank)["a"][0].item() for rank in range(2)]
    assert loaded == [0, 1]


def test_rolling_back_and_copying_what_ranks_have_saved(fleet: Any, tmp_path: Path) -> None:
    three = fleet(3)
    for step in (1, 2):
        three.all(lambda store, rank, step=step: store.save({"mine": torch.full((9,), 10.0 * step + rank)}, step=step))
    with cs.open(tmp_path / "store", ranks="one") as store:
        store.rollback("step:1")
        store.copy(tmp_path / "copy", ["latest"])
        assert store.verify().ok
    again = fleet(3)

    def load(store: Store, rank: int) -> float:
        target = {"mine": torch.zeros(9)}
        store.load(into=target)
        return target["mine"][0].item()

    assert again.all(load) == [10.0, 11.0, 12.0]
    with cs.open(tmp_path / "copy", ranks="one") as copy:
        assert copy.verify().ok
        assert copy.load(rank=2)["mine"][0] == 12
