"""Averages beside those of torch, bit for bit, and what becomes of all that is no weight."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import ckptstore as cs
from ckptstore.engine.tensorreader import CACHE_BYTES
from ckptstore.policy.kinds import kinds
from ckptstore.tools.parents import chosen
from tests.ranks import golden

_count = itertools.count()


def memory() -> str:
    """A place of its own."""
    return f"memory://averages-{next(_count)}"


class Net(nn.Module):
    """With a tied weight, statistics, a counter, and positions."""

    positions: torch.Tensor

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, width)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(width))

    def train_a_bit(self) -> None:
        self.norm(torch.randn(8, self.norm.num_features))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter))


def trained(store: cs.Store, count: int) -> list[Net]:
    """Save a net at steps 10, 20, …, with its optimizer; what it was then."""
    net, saved = Net(), []
    optimizer = torch.optim.Adam(net.parameters())
    for number in range(1, count + 1):
        net.train_a_bit()
        loss = abs(number - 3) + number / 100
        state = {"model": net, "optimizer": optimizer, "lr": 0.1 / number}
        store.save(state, step=10 * number, epoch=number, metrics={"val_loss": loss})
        saved.append(copy.deepcopy(net))
    return saved


def check_equal(found: dict[str, torch.Tensor], expected: nn.Module) -> None:
    wanted = expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("ema", [None, 0.9, 0.25])
def test_it_is_what_torch_makes(ema: float | None) -> None:
    """Bit for bit, with what is no weight the newest's; and what is saved is a checkpoint like any other."""
    average = get_swa_multi_avg_fn() if ema is None else get_ema_multi_avg_fn(ema)
    with cs.open(memory()) as store, cs.open(memory()) as target:
        nets = trained(store, 5)
        theirs = AveragedModel(nets[0], multi_avg_fn=average)
        for number, net in enumerate(nets):
            # Statistics are averaged like weights; torch would average positions, too, if it were asked to.
            for name in ("running_mean", "running_var"):
                own, share = getattr(net.norm, name), 1 / (number + 1) if ema is None else 1 - ema
                getattr(nets[0].norm, name).copy_(own if not number else getattr(nets[0].norm, name).lerp(own, share))
            theirs.update_parameters(net)
        theirs.module.norm.running_mean = nets[0].norm.running_mean
        theirs.module.norm.running_var = nets[0].norm.running_var

        made = cs.average(store, last=5, ema=ema, target=target)

        parents = store.checkpoints()
        assert (made.step, made.epoch, made.metrics) == (50, 5, {})
        assert made.parameters == parents[-1].parameters
        [why] = made.reasons
        assert why.startswith("average of" if ema is None else f"exponential average ({ema}) of")
        assert why.endswith(f"{', '.join(parent.id for parent in parents)}, from {store.url}")
        state = target.load("latest")
        assert list(state) == ["model"]
        check_equal(state["model"], theirs.module)
        assert state["model"]["embed.weight"] is state["model"]["head.weight"]
        target.load("latest", into={"model": Net()})
        assert target.verify().ok
        assert [c.id for c in store.checkpoints()] == [c.id for c in parents]


def test_many_parents_are_all_named() -> None:
    """In as many reasons as it takes; where there are very many, by the beginnings of their ids."""
    with cs.open(memory()) as store, cs.open(memory()) as target:
        ids = [store.save({"model": {"w": torch.full((3,), float(step))}}, step=step).id for step in range(210)]
        for count, name in ((150, ids), (210, ["-".join(id.split("-")[:2]) for id in ids])):
            made = cs.average(store, ids[:count], target=target)
            assert len(made.reasons) > 1
            assert kinds(made.reasons) == ["averages"]
            assert all(name[number] in " ".join(made.reasons) for number in range(count))
            assert float(target.load("latest")["model"]["w"][0]) == pytest.approx((count - 1) / 2)
        # Whose weights as numbers would be beyond all bounds.
        cs.average(store, ids, ema=1e-9, target=target)
        assert float(target.load("latest")["model"]["w"][0]) == pytest.approx(209)


def floats(dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    width = 16 if dtype.itemsize <= 2 else 32
    values = st.lists(st.floats(-100, 100, width=width), min_size=3, max_size=3)
    return values.map(lambda row: torch.tensor(row, dtype=torch.float64).to(dtype))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@given(st.data())
def test_weights_count_by_their_ratios(data: st.DataObject) -> None:
    """Beside the sum in fp64, rounded once: as near as fp32, or fp64, can be."""
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = data.draw(st.lists(floats(dtype), min_size=2, max_size=5))
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(tensors), max_size=len(tensors)))
    with cs.open(memory()) as store, cs.open(memory()) as target:
        ids = [store.save({"model": {"w": tensor}}, step=step).id for step, tensor in enumerate(tensors)]
        order = data.draw(st.permutations(range(len(ids))))
        made = cs.average(store, [ids[n] for n in order], weights=[weights[n] for n in order], target=target)
        found = target.load("latest")["model"]["w"]
    exact = sum(w * t.double() for w, t in zip(weights, tensors, strict=True)) / sum(weights)
    largest = max(float(tensor.double().abs().max()) for tensor in tensors)
    wide = 2.0**-52 if dtype is torch.float64 else 2.0**-23
    # A few roundings in between, and half a step of the type itself.
    room = 4 * len(tensors) * wide * largest + torch.finfo(dtype).eps * exact.abs()
    assert found.dtype is dtype
    assert bool(((found.double() - exact).abs() <= room + torch.finfo(dtype).tiny).all())
    assert made.reasons[0].startswith(f"weighted average of {ids[0]} (")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128])
def test_the_average_of_equal_ones_is_equal(dtype: torch.dtype) -> None:
    tensor = torch.randn(100_000, dtype=torch.complex128 if dtype.is_complex else torch.float32).to(dtype)
    with cs.open(memory()) as store, cs.open(memory()) as target:
        for step in range(3):
            store.save({"model": {"w": tensor}}, step=step)
        for options in ({}, {"weights": [1, 2, 4]}, {"ema": 0.7}):
            cs.average(store, last=3, target=target, **options)  # type: ignore[arg-type]
            found = target.load("latest")["model"]["w"]
            assert found.dtype is dtype
            # As numbers: -0.0 becomes 0.0.
            wide = torch.complex128 if dtype.is_complex else torch.float64
            assert torch.equal(found.to(wide), tensor.to(wide))


def test_complex_numbers_have_a_mean() -> None:
    rows = [torch.randn(70_000, 3, dtype=torch.complex64) for _ in range(2)]
    with cs.open(memory()) as store, cs.open(memory()) as target:
        for step, row in enumerate(rows):
            store.save({"model": {"a": row, "b": row.to(torch.complex128)}}, step=step)
        cs.average(store, last=2, target=target)
        found = target.load("latest")["model"]
    torch.testing.assert_close(found["a"], (rows[0] + rows[1]) / 2)
    torch.testing.assert_close(found["b"], (rows[0].to(torch.complex128) + rows[1]) / 2)


def test_a_wider_parent_has_all_added_up_in_its_type_and_dtype_rounds_the_result() -> None:
    """Also where there are more elements than in a block, and other blocks than in the parents."""
    wide, narrow = torch.randn(2_200_001, dtype=torch.float64), torch.randn(2_200_001).bfloat16()
    with cs.open(memory(), compression="zstd") as store, cs.open(memory()) as target:
        store.save({"model": {"w": wide, "n": torch.tensor([1])}}, step=1)
        store.save({"model": {"w": narrow, "n": torch.tensor([2])}}, step=2)
        exact = torch.lerp(wide, narrow.double(), 0.5)
        for dtype, expected in ((None, torch.bfloat16), ("fp32", torch.float32), (torch.float16, torch.float16)):
            cs.average(store, last=2, target=target, dtype=dtype)
            found = target.load("latest")["model"]
            assert torch.equal(found["w"], exact.to(expected))
            assert torch.equal(found["n"], torch.tensor([2]))


def test_only_takes_a_part_and_what_is_no_weight_is_the_newest_s() -> None:
    with cs.open(memory()) as store, cs.open(memory()) as target:
        trained(store, 3)
        cs.average(store, ["latest", "step:10"], only=["optimizer", "lr"], target=target)
        state = target.load("latest")
        assert list(state) == ["optimizer", "lr"]
        assert state["lr"] == 0.1 / 3
        assert target.resolve().parameters == 0


def test_without_modules_an_entry_called_model_is_averaged() -> None:
    with cs.open(memory()) as store, cs.open(memory()) as target:
        for step in range(2):
            store.save({"model": {"w": torch.tensor([float(step)])}, "other": torch.zeros(1)}, step=step)
        cs.average(store, last=2, target=target)
        assert target.load("latest") == {"model": {"w": torch.tensor([0.5])}}
        for step in range(2):
            store.save({"weights": torch.zeros(1), "lr": 1}, step=step)
        with pytest.raises(cs.StateError, match="which part is the weights: it has 'weights', 'lr'"):
            cs.average(store, last=2, target=target)


def test_modules_are_found_in_dicts_and_lists() -> None:
    with cs.open(memory()) as store, cs.open(memory()) as target:
        for step in range(2):
            nets = [nn.Linear(2, 2), {"inner": nn.Linear(2, 2), "lr": 3}]
            store.save({"nets": nets, 7: nn.Linear(1, 1), "x": (1, nn.Linear(1, 1))}, step=step)
        cs.average(store, last=2, target=target)
        state = target.load("latest")
    assert set(state) == {"nets", 7, "x"}
    assert [list(state["nets"][0]), list(state["nets"][1]), len(state["x"])] == [["weight", "bias"], ["inner"], 1]


def test_all_misfits_are_named() -> None:
    with cs.open(memory()) as store:
        store.save({"model": {"a": torch.zeros(2), "b": torch.zeros(2), "old": torch.zeros(1)}}, step=1)
        store.save({"model": {"a": torch.zeros(3), "b": torch.zeros(2).int(), "new": torch.zeros(1)}}, step=2)
        with pytest.raises(cs.StateError) as caught:
            cs.average(store, last=2, target=memory())
        ids = [c.id for c in store.checkpoints()]
    for misfit in (
        f"model/a: [2] instead of [3] in {ids[0]}",
        f"model/b: numbers instead of I32 in {ids[0]}",
        f"model/new: missing in {ids[0]}",
        f"model/old: only in {ids[0]}",
    ):
        assert misfit in str(caught.value)


WRONG: list[tuple[dict[str, Any], type[cs.CheckpointError], str]] = [
    ({}, cs.FormatError, "say which checkpoints"),
    ({"last": 2, "best": "val_loss:2"}, cs.FormatError, "say which checkpoints"),
    ({"last": 1}, cs.FormatError, "at least two"),
    ({"selectors": ["latest"]}, cs.NotFoundError, "at least two checkpoints, and these are 1"),
    ({"selectors": "latest"}, cs.FormatError, "must be a list"),
    ({"selectors": ["latest", "step:20"]}, cs.FormatError, "given twice"),
    ({"selectors": ["latest", "step:70"]}, cs.NotFoundError, "step:70"),
    ({"best": "val_loss"}, cs.FormatError, "val_loss:3"),
    ({"best": "nothing:3"}, cs.NotFoundError, "no checkpoint has metric 'nothing'"),
    ({"last": 2, "weights": [1]}, cs.FormatError, "1 weights for 2"),
    ({"last": 2, "weights": [1, -1]}, cs.FormatError, "positive numbers"),
    ({"last": 2, "weights": [1, 1], "ema": 0.5}, cs.FormatError, "can't both"),
    ({"last": 2, "ema": 1}, cs.FormatError, "between 0 and 1"),
    ({"last": 2, "dtype": "int8"}, cs.FormatError, "floating-point"),
    ({"last": 2, "only": ["nothing/*"]}, cs.StateError, "matches nothing"),
    ({"last": 2, "only": "model"}, cs.StateError, "must be a list"),
]


def test_wrong_use_is_told_before_anything_is_made(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with cs.open(memory()) as store:
        trained(store, 2)
        for options, error, words in WRONG:
            with pytest.raises(error, match=words):
                cs.average(store, target=target, **options)
            assert not list(target.rglob("*.*"))
        with pytest.raises(cs.FormatError, match="is where the checkpoints are"):
            cs.average(store, last=2, target=store.url)


def test_the_best_are_those_that_best_names() -> None:
    with cs.open(memory()) as store:
        trained(store, 6)
        assert [c.step for c in chosen(store, best="val_loss:3")] == [20, 30, 40]
        assert [c.step for c in chosen(store, best="val_loss:max:2")] == [50, 60]
        assert [c.step for c in chosen(store, best="val_loss:99")] == [10, 20, 30, 40, 50, 60]
        assert [c.step for c in chosen(store, last=99)] == [10, 20, 30, 40, 50, 60]


def test_here_it_is_the_latest_and_a_run_that_saves_there_is_told() -> None:
    place = memory()
    with cs.open(place) as run, cs.open(place) as tool:
        trained(run, 2)
        made = cs.average(tool, last=2)
        assert run.resolve().id == made.id
        assert "from" not in made.reasons[0]
        with pytest.raises(cs.StaleWriterError):
            run.save({"x": 1}, step=30)


def test_many_ranks_shards_are_averaged_as_whole_tensors() -> None:
    with cs.open(golden.PLACE, read_only=True, ranks="one") as store, cs.open(memory()) as target:
        whole = store.load("latest")["model"]
        with cs.open(memory()) as copies:
            # A second one in the same store, of which this is a copy: there is only one in the golden one.
            store.copy(copies.url)
            newer = {name: tensor + 1 for name, tensor in whole.items()}
            copies.save({"model": newer}, step=99)
            cs.average(copies, last=2, only=["model"], target=target)
        found = target.load("latest")["model"]
    assert list(found) == list(whole)
    for name, tensor in whole.items():
        assert torch.equal(
            found[name], torch.lerp(tensor, newer[name], 0.5) if tensor.is_floating_point() else newer[name]
        )


def test_a_damaged_parent_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with cs.open(tmp_path / "a") as store:
        saved = [store.save({"model": {"w": torch.randn(100_000)}}, step=step) for step in range(3)]
        path = tmp_path / "a" / "checkpoints" / saved[1].id / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(cs.IntegrityError, match=saved[1].id) as caught:
            cs.average(store, last=3, target=tmp_path / "b")
        assert caught.value.id == saved[1].id
    with cs.open(tmp_path / "b", read_only=True) as target:
        assert not target.checkpoints()
        assert not target.verify().leftovers


KILLED = """
import os, sys
import ckptstore
from ckptstore.tools.merging import Mean
fill, calls = Mean._fill, []
def dying(self, *args):
    calls.append(1)
    if len(calls) == 3:
        print("in the midst", flush=True)
        os.kill(os.getpid(), 9)
    fill(self, *args)
Mean._fill = dying
with ckptstore.open(sys.argv[1], read_only=True) as store, ckptstore.open(sys.argv[2], threads=1) as target:
    ckptstore.average(store, last=2, target=target)
"""


def test_killed_in_the_midst_nothing_is_visible(tmp_path: Path) -> None:
    with cs.open(tmp_path / "a") as store:
        for step in range(2):
            store.save({"model": {"w": torch.full((9_000_000,), float(step))}}, step=step)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-9, "in the midst\n")
    with cs.open(tmp_path / "b") as target:
        assert not target.checkpoints()
        assert target.verify().leftovers
        with cs.open(tmp_path / "a", read_only=True) as store:
            made = cs.average(store, last=2, target=target)
        assert [c.id for c in target.checkpoints()] == [made.id]


def test_memory_does_not_grow_with_the_number_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a block of each thread is held of all parents together, besides the cache."""
    from ckptstore.tools import average as module
    from ckptstore.tools.merging import Mean

    caches: list[Any] = []
    cache = module.BlockCache
    monkeypatch.setattr(module, "BlockCache", lambda: caches.append(cache(2 << 24)) or caches[-1])
    wide = Mean._wide
    rooms: list[int] = []

    def seen(self: Mean, count: int, dtype: torch.dtype) -> torch.Tensor:
        rooms.append(count * dtype.itemsize)
        return wide(self, count, dtype)

    monkeypatch.setattr(Mean, "_wide", seen)
    with cs.open(memory()) as store, cs.open(memory()) as target:
        for step in range(6):
            store.save({"model": {"w": torch.full((9_000_000,), float(step)).bfloat16()}}, step=step)
        tracemalloc.start()
        cs.average(store, last=6, target=target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert torch.equal(target.load("latest")["model"]["w"], torch.full((9_000_000,), 2.5).bfloat16())
    assert len(caches) == 1
    assert 0 < max(rooms) <= 2 << 24
    # The target itself is in memory.
    assert peak < 18_000_000 + CACHE_BYTES // 4


class Scored:
    """A score of the mean of the weights, whose best is 2."""

    def __init__(self, sign: int = 1) -> None:
        self.sign, self.seen = sign, []  # type: ignore[var-annotated]

    def __call__(self, state: Any) -> float:
        value = float(state["model"]["w"].mean())
        self.seen.append(value)
        return -self.sign * abs(value - 2)


def soup(values: Sequence[float], score: Any, **options: Any) -> tuple[float, cs.Checkpoint, list[str]]:
    with cs.open(memory()) as store, cs.open(memory()) as target:
        ids = [
            store.save({"model": {"w": torch.full((4,), value), "n": step}}, step=step).id
            for step, value in enumerate(values)
        ]
        made = cs.greedy_soup(store, ids, score, target=target, **options)
        return float(target.load("latest")["model"]["w"][0]), made, ids


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_soup_takes_what_makes_it_no_worse(mode: str) -> None:
    """1.5 is the best by itself; 3 makes it 2.25, which is better; 0 and 9 make it worse, and nan nothing at all."""
    score = Scored(1 if mode == "max" else -1)
    value, made, ids = soup([0.0, 1.5, 9.0, 3.0, float("nan")], score, mode=mode)
    assert value == 2.25
    assert 2.25 in score.seen
    assert made.step == 3
    assert made.reasons[0].startswith(f"greedy soup, average of {ids[1]}, {ids[3]}, from")


def test_a_soup_of_equally_good_ones_takes_all() -> None:
    value, made, ids = soup([1.0, 2.0, 3.0], lambda state: 0)
    assert value == 2.0
    assert all(id in made.reasons[0] for id in ids)


def test_a_soup_needs_a_score() -> None:
    with pytest.raises(cs.FormatError, match="a function that scores"):
        soup([1.0, 2.0], None)
    with pytest.raises(ZeroDivisionError):
        soup([1.0, 2.0], lambda state: 1 / 0)
