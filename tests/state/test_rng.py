"""Random state: the next numbers are the same."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state import RNG, restore_into
from tests.state.memory import fill, load, load_into, save


def draw() -> tuple[Any, ...]:
    pairs = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())
    return (*pairs, torch.rand(1).item(), torch.randn(1).item())


def test_process_state_comes_back() -> None:
    """All generators, with a pending Gaussian in each."""
    draw()
    saved = save({"rng": RNG()})
    assert {"rng/python/words", "rng/numpy/state/key", "rng/torch"} <= saved.data.keys()
    assert len(saved.text) < 1000, "words are arrays"
    expected = draw()
    load_into(saved, {"rng": RNG()})
    assert draw() == expected
    RNG().load_state_dict(load(saved)["rng"])
    assert draw() == expected


class Drawing:
    """Uses random numbers while it loads, as data loaders do."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        draw()


def test_process_state_is_restored_last() -> None:
    """Wherever it stands in the state."""
    saved = save({"rng": RNG(), "drawing": Drawing()})
    expected = draw()
    load_into(saved, {"rng": RNG(), "drawing": Drawing()})
    assert draw() == expected


def test_devices_that_are_not_here_are_named() -> None:
    """The rest is restored."""
    state = RNG().state_dict() | {"cuda": {"cuda:77": torch.zeros(16, dtype=torch.uint8)}}
    expected = draw()
    with pytest.warns(UserWarning, match="cuda:77"):
        RNG().load_state_dict(state)
    assert draw() == expected


GENERATORS = [
    torch.Generator,
    random.Random,
    np.random.RandomState,
    *(
        lambda kind=kind: np.random.Generator(kind(3))  # type: ignore[misc]
        for kind in (
            np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64,
        )
    ),
]  # fmt: skip


def numbers(generator: Any) -> list[float]:
    if isinstance(generator, torch.Generator):
        return torch.randn(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(3)]
    return [float(generator.standard_normal()) for _ in range(3)]


@pytest.mark.parametrize("make", GENERATORS)
def test_single_generators(make: Any) -> None:
    """Plain and in place."""
    generator = make()
    numbers(generator)
    saved = save({"g": generator})
    expected = numbers(generator)
    assert numbers(load(saved)["g"]) == expected
    target = make()
    load_into(saved, {"g": target})
    assert numbers(target) == expected


def test_foreign_bit_generator_is_refused() -> None:
    """Nothing could make one when loading."""

    class Mine(np.random.PCG64):
        pass

    with pytest.raises(StateError, match="register its type") as caught:
        save({"g": np.random.Generator(Mine(1))})
    assert caught.value.path == "g"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"pos": 623', '"pos": 100000000'),
        ('"pos": 623', '"pos": -1'),
        ('"buffer_pos": 4', '"buffer_pos": 5'),
        ('"bit_generator": "MT19937"', '"bit_generator": "SeedSequence"'),
        ('"version": 3', '"version": 4'),
    ],
)
def test_hostile_positions_never_reach_c_code(old: str, new: str) -> None:
    """NumPy reads outside of its buffers with them."""
    saved = save(
        [np.random.Generator(np.random.MT19937(1)), np.random.Generator(np.random.Philox(1)), random.Random(1)]
    )
    assert old in saved.text
    saved.text = saved.text.replace(old, new)
    with pytest.raises(FormatError):
        load(saved)


def test_state_of_another_generator_does_not_fit() -> None:
    """With the path."""
    target = np.random.Generator(np.random.PCG64(1))
    saved = save({"g": np.random.Generator(np.random.MT19937(1))})
    with pytest.raises(StateError, match="doesn't fit") as caught:
        load_into(saved, {"g": target})
    assert caught.value.path == "g"


def test_nothing_is_drawn_or_set_before_finish() -> None:
    """Planning leaves the process alone."""
    saved = save({"rng": RNG()})
    random.random()
    before = random.getstate()
    restoration = restore_into(saved.tree, saved.specs, {"rng": RNG()})
    assert random.getstate() == before
    fill(restoration, saved)
    assert random.getstate() != before
