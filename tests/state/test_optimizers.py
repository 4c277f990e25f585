"""Optimizers and schedulers: training goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedules

from ckptstore.errors import StateError
from tests.state.memory import Saved, bits, load, load_into, same, save

Make = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda p: optim.SGD(p, 0.1),
    "adam": lambda p: optim.Adam(p, 0.01),
    "adam amsgrad": lambda p: optim.Adam(p, 0.01, amsgrad=True),
    "adamw foreach": lambda p: optim.AdamW(p, 0.01, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, 0.01, fused=True),
    "adamw plain": lambda p: optim.AdamW(p, 0.01, capturable=False, foreach=False),
    "adamw tensor lr": lambda p: optim.AdamW(p, torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: optim.Adagrad(p, 0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p),
    "asgd": lambda p: optim.ASGD(p),
    "rprop": lambda p: optim.Rprop(p),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "nadam": lambda p: optim.NAdam(p),
    "radam": lambda p: optim.RAdam(p),
    "lbfgs": lambda p: optim.LBFGS(p, max_iter=4, history_size=3),
}
if hasattr(optim, "Adafactor"):
    OPTIMIZERS["adafactor"] = lambda p: optim.Adafactor(p)


def model(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def train(net: nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator).to(next(net.parameters()).dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def weights(net: nn.Module) -> bytes:
    return b"".join(bits(value) for value in net.state_dict().values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    """In a fresh process's objects, and rolled back in the very same ones, whose memory stays."""
    if name == "lbfgs" and dtype != torch.float32:
        dtype = torch.float64
    net = model(0, dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, range(3))
    saved = save({"optimizer": optimizer, "model": net})
    train(net, optimizer, range(3, 6))
    expected = weights(net)

    fresh = model(1, dtype)
    resumed = OPTIMIZERS[name](fresh.parameters())
    load_into(saved, {"optimizer": resumed, "model": fresh})
    train(fresh, resumed, range(3, 6))
    assert weights(fresh) == expected

    places = {id(p): {k: v.data_ptr() for k, v in s.items() if torch.is_tensor(v)} for p, s in optimizer.state.items()}
    load_into(saved, {"optimizer": optimizer, "model": net})
    if name != "lbfgs":
        for p, s in optimizer.state.items():
            assert places[id(p)] == {k: v.data_ptr() for k, v in s.items() if torch.is_tensor(v)}
    train(net, optimizer, range(3, 6))
    assert weights(net) == expected


def test_step_zero_brings_back_an_empty_optimizer() -> None:
    """State of later steps goes."""
    net = model(0)
    optimizer = optim.AdamW(net.parameters())
    saved = save({"model": net, "optimizer": optimizer})
    train(net, optimizer, range(2))
    assert optimizer.state
    load_into(saved, {"model": net, "optimizer": optimizer})
    assert not optimizer.state
    assert same(dict(net.state_dict()), dict(model(0).state_dict()))


def test_fp32_state_of_bf16_parameters_stays_fp32() -> None:
    """torch's own load_state_dict would round it."""
    net = model(0, torch.bfloat16)
    optimizer = optim.SGD(net.parameters(), 0.1)
    for parameter in net.parameters():
        optimizer.state[parameter]["master"] = torch.randn(parameter.shape)
    fresh = optim.SGD(model(1, torch.bfloat16).parameters(), 0.1)
    load_into(save({"optimizer": optimizer}), {"optimizer": fresh})
    for mine, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert same(mine, theirs)
        assert theirs["master"].dtype == torch.float32


def test_names_are_those_of_the_modules() -> None:
    """Tied parameters by their first name; what no module owns, by its place."""
    net = model(0)
    free = nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([{"params": net.parameters()}, {"params": [free], "lr": 0.5}], 0.1, momentum=0.9)
    free.grad = torch.ones(2)
    train(net, optimizer, range(1))
    saved = save({"optimizer": optimizer, "nested": {"model": net}})
    assert "optimizer/state/nested/model/0.weight/momentum_buffer" in saved.data
    plain = load(saved)["optimizer"]
    assert plain["groups"][0]["params"][0] == "nested/model/0.weight"
    assert plain["groups"][1] == {**plain["groups"][1], "lr": 0.5, "params": ["#1.0"]}
    assert set(plain["state"]["nested/model/0.weight"]) == {"momentum_buffer"}


def test_parameters_in_another_order_are_matched_by_name() -> None:
    """A rebuilt optimizer may list them differently."""
    source, target = model(0), model(1)
    optimizer = optim.Adam(source.named_parameters())
    train(source, optimizer, range(2))
    other = optim.Adam(list(target.named_parameters())[::-1])
    load_into(save({"model": source, "optimizer": optimizer}), {"model": target, "optimizer": other})
    for mine, theirs in zip(source.parameters(), target.parameters(), strict=True):
        assert same(optimizer.state[mine], other.state[theirs])
    assert other.param_groups[0]["param_names"][0] == "2.bias"


def test_without_modules_they_are_matched_by_position() -> None:
    """Where shapes agree."""
    source, target = model(0), model(1)
    optimizer, other = optim.Adam(source.parameters()), optim.Adam(target.parameters())
    train(source, optimizer, range(2))
    load_into(save({"optimizer": optimizer}), {"optimizer": other})
    assert same(list(optimizer.state.values()), list(other.state.values()))
    turned = optim.Adam(list(target.parameters())[::-1])
    with pytest.raises(StateError, match=r"optimizer/state/#0.0: saved \[8, 4\], target \[1\]"):
        load_into(save({"optimizer": optimizer}), {"optimizer": turned})


def test_other_groups_or_parameters_are_refused() -> None:
    """Also where strict is off."""
    net = model(0)
    saved = save({"o": optim.SGD(net.parameters(), 0.1)})
    with pytest.raises(StateError, match="1 parameter groups and the target has 2") as caught:
        load_into(saved, {"o": optim.SGD([{"params": [p]} for p in list(net.parameters())[:2]], 0.1)}, strict=False)
    assert caught.value.path == "o"
    with pytest.raises(StateError, match="4 parameters and the target has 3"):
        load_into(saved, {"o": optim.SGD(list(net.parameters())[:3], 0.1)}, strict=False)


def test_options_come_back_and_tensor_lr_keeps_its_memory() -> None:
    """Whichever of the two sides has a tensor."""
    net = model(0)
    saved = save({"o": optim.AdamW(net.parameters(), 0.25, betas=(0.5, 0.75))})
    rate = torch.tensor(0.1)
    target = optim.AdamW(net.parameters(), rate, foreach=False)
    load_into(saved, {"o": target})
    assert target.param_groups[0]["lr"] is rate
    assert rate == 0.25
    assert target.param_groups[0]["betas"] == (0.5, 0.75)
    back = optim.AdamW(net.parameters(), 0.1)
    load_into(save({"o": target}), {"o": back})
    assert torch.is_tensor(back.param_groups[0]["lr"])


def test_part_of_an_optimizer() -> None:
    """The rest keeps what it has."""
    net = model(0)
    optimizer = optim.Adam(net.parameters(), 0.5)
    train(net, optimizer, range(1))
    saved = save({"model": net, "o": optimizer})
    fresh = optim.Adam(net.parameters(), 0.1)
    restoration = load_into(saved, {"model": net, "o": fresh}, only=["o/state/model/0.*"])
    assert all("model/0." in name for name in restoration.wanted)
    assert len(fresh.state) == 2
    assert fresh.param_groups[0]["lr"] == 0.1
    assert list(load(saved, only=["o/groups/0/lr"])["o"]["groups"][0]) == ["lr", "params"]


class Own(optim.SGD):
    def state_dict(self) -> Any:
        return {"mine": super().state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict["mine"])


def test_optimizers_with_their_own_methods_use_them() -> None:
    """Overridden, and with a hook."""
    net, other = model(0), model(0)
    optimizer, target = Own(net.parameters(), 0.1, momentum=0.9), Own(other.parameters(), 0.2, momentum=0.1)
    train(net, optimizer, range(2))
    load_into(save({"m": net, "o": optimizer}), {"m": other, "o": target})
    assert same(list(optimizer.state.values()), list(target.state.values()))
    assert target.param_groups[0]["lr"] == 0.1
    hooked = optim.SGD(net.parameters(), 0.1)
    calls: list[int] = []
    hooked.register_state_dict_post_hook(lambda opt, state: calls.append(1))
    saved = save({"o": hooked})
    assert calls == [1]
    load_into(saved, {"o": optim.SGD(other.parameters(), 0.3)})


def test_state_of_a_stranger_is_refused_and_other_state_is_kept() -> None:
    """torch allows state under any key."""
    net = model(0)
    optimizer = optim.SGD(net.parameters(), 0.1)
    optimizer.state["global"] = {"seen": 3}  # type: ignore[index]
    target = optim.SGD(net.parameters(), 0.1)
    load_into(save({"o": optimizer}), {"o": target})
    assert target.state["global"] == {"seen": 3}  # type: ignore[index]
    optimizer.state[torch.zeros(1)] = {"x": 1}
    with pytest.raises(StateError, match="none of its groups"):
        save({"o": optimizer})


def rate_function(step: int) -> float:
    return 0.9**step


SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: schedules.StepLR(o, 2),
    "multistep": lambda o: schedules.MultiStepLR(o, [1, 3, 3]),
    "lambda": lambda o: schedules.LambdaLR(o, rate_function),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 7),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2, 2),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.5, 20),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "polynomial": lambda o: schedules.PolynomialLR(o, 9),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:The epoch parameter")
def test_schedules_go_on(name: str) -> None:
    """Same learning rates as without the stop."""

    def build() -> tuple[optim.Optimizer, Any]:
        optimizer = optim.SGD([nn.Parameter(torch.ones(1))], 0.1, momentum=0.9)
        return optimizer, SCHEDULES[name](optimizer)

    def run(optimizer: optim.Optimizer, schedule: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            optimizer.step()
            schedule.step(1.0 + step) if name == "plateau" else schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, schedule = build()
    run(optimizer, schedule, range(4))
    saved = save({"s": schedule, "o": optimizer})
    expected = run(optimizer, schedule, range(4, 12))
    fresh, resumed = build()
    load_into(saved, {"s": resumed, "o": fresh})
    assert run(fresh, resumed, range(4, 12)) == expected
    assert same(load(saved)["s"], json_free(saved))


def json_free(saved: Saved) -> Any:
    """The plain state of the schedule, loaded for itself."""
    return load(saved, only=["s"])["s"]


def test_grad_scaler() -> None:
    """An object that is neither module nor optimizer."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    target = torch.amp.GradScaler("cpu")
    load_into(save({"scaler": scaler}), {"scaler": target})
    assert target.get_scale() == 8.0
    assert json.loads(save({"scaler": scaler}).text)["scaler"]["type"].endswith("GradScaler")


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), lambda m: torch.optim.Adam(m.parameters())),
        (
            lambda m: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(m.parameters(), lr=0.1), 3),
            lambda m: torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(m.parameters(), lr=0.1), 3),
        ),
    ],
)
def test_another_class_is_a_mismatch(saved: Any, target: Any) -> None:
    """Another optimizer or scheduler would take the values without a word and fail at its next step."""
    model = torch.nn.Linear(2, 2)
    stored = save({"o": saved(model)})
    with pytest.raises(StateError, match=r"o: saved torch\.optim.*, target torch\.optim"):
        load_into(stored, {"o": target(model)})
