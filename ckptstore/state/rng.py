"""Random state: of the whole process (``RNG``) and of single generators, as plain values and back."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.state.values import TAG, Json

if TYPE_CHECKING:
    from ckptstore.state.encode import Encoder

_BIT_GENERATORS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}
_PYTHON_WORDS = 625
_PYTHON_VERSION = 3
_TWISTER_WORDS = 624
_PHILOX_WORDS = 4


class RNG:
    """The random state of this process: Python's ``random``, NumPy's global one, torch's CPU and CUDA generators.

    Put one into the state to save them; restoring it is the last thing that a load does.
    """

    def state_dict(self) -> dict[str, Any]:
        """All of it, as arrays, tensors and numbers."""
        cuda = {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in range(_cuda_devices())}
        return {
            "python": python_state(random),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": cuda,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all that ``state`` has. States of CUDA devices that aren't here are left out, with a warning."""
        if "python" in state:
            set_python_state(random, state["python"])
        if "numpy" in state:
            np.random.set_state(_checked(state["numpy"]))
        if "torch" in state:
            torch.set_rng_state(state["torch"])
        here = {f"cuda:{index}" for index in range(_cuda_devices())}
        cuda = state.get("cuda", {})
        for name in cuda.keys() & here:
            torch.cuda.set_rng_state(cuda[name], name)
        if absent := sorted(cuda.keys() - here):
            warnings.warn(
                f"the checkpoint has random states of {', '.join(absent)}, which this machine lacks: random numbers "
                "there won't continue where they were",
                stacklevel=2,
            )


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def python_state(source: Any) -> dict[str, Any]:
    """The state of the ``random`` module or of a ``random.Random``, its 625 words as an array."""
    version, words, gauss = source.getstate()
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def set_python_state(target: Any, state: dict[str, Any]) -> None:
    """The inverse of ``python_state``."""
    words, gauss = state["words"], state["gauss"]
    if state["version"] != _PYTHON_VERSION or words.shape != (_PYTHON_WORDS,) or words.dtype != np.uint32:
        raise FormatError("it isn't the state of a generator of Python 3's")
    if gauss is not None and type(gauss) is not float:
        raise FormatError("its pending number is no float")
    target.setstate((_PYTHON_VERSION, tuple(words.tolist()), gauss))


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """A NumPy state with the bounds checked that NumPy's own C code trusts."""
    name, inner = state["bit_generator"], state["state"]
    if name not in _BIT_GENERATORS:
        raise FormatError(f"{name!r} is no bit generator of NumPy's")
    if name == "MT19937":
        _check_words(inner["key"], _TWISTER_WORDS)
        _check_position(inner["pos"], _TWISTER_WORDS)
    elif name == "Philox":
        _check_words(inner["counter"], _PHILOX_WORDS)
        _check_words(inner["key"], _PHILOX_WORDS // 2)
        _check_words(state["buffer"], _PHILOX_WORDS)
        _check_position(state["buffer_pos"], _PHILOX_WORDS)
    elif name == "SFC64":
        _check_words(inner["state"], 4)
    return state


def _check_words(words: object, count: int) -> None:
    if not isinstance(words, np.ndarray) or words.shape != (count,) or words.dtype.kind != "u":
        raise FormatError(f"its key must be {count} unsigned words")


def _check_position(position: object, limit: int) -> None:
    if type(position) is not int or not 0 <= position <= limit:
        raise FormatError(f"its position must be between 0 and {limit}")


def _set_torch(target: torch.Generator, state: torch.Tensor) -> None:
    target.set_state(state)


def _set_numpy(target: np.random.Generator, state: dict[str, Any]) -> None:
    target.bit_generator.state = _checked(state)


def _set_legacy(target: np.random.RandomState, state: dict[str, Any]) -> None:
    target.set_state(_checked(state))


_GETTERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    RNG: ("rng", RNG.state_dict),
    torch.Generator: ("torch_generator", torch.Generator.get_state),
    np.random.Generator: ("numpy_generator", lambda value: value.bit_generator.state),
    np.random.RandomState: ("numpy_random_state", lambda value: value.get_state(legacy=False)),
    random.Random: ("python_random", python_state),
}
_SETTERS: dict[str, Callable[[Any, Any], None]] = {
    "rng": RNG.load_state_dict,
    "torch_generator": _set_torch,
    "numpy_generator": _set_numpy,
    "numpy_random_state": _set_legacy,
    "python_random": set_python_state,
}
GENERATORS: dict[str, type] = {kind: cls for cls, (kind, _) in _GETTERS.items()}
"""Kind of node → class of the generator."""


def state_of(value: object) -> tuple[str, Any] | None:
    """Kind and state of a generator that ``set_state`` can put back; None for anything else."""
    if type(value) not in _GETTERS:
        return None
    bits = getattr(value, "bit_generator", None)
    if bits is not None and _BIT_GENERATORS.get(type(bits).__name__) is not type(bits):
        return None
    kind, getter = _GETTERS[type(value)]
    return kind, getter(value)


def encoder_of(cls: type) -> Callable[[Encoder, Any, str], Json]:
    """What makes the node of a generator of this class."""
    kind, getter = _GETTERS[cls]

    def encode(encoder: Encoder, value: Any, path: str) -> Json:
        bits = getattr(value, "bit_generator", None)
        if bits is not None and _BIT_GENERATORS.get(type(bits).__name__) is not type(bits):
            raise StateError(
                f"the generator at {path!r} uses a {type(bits).__name__}, which isn't NumPy's own and can't be stored: "
                f"use one of {', '.join(_BIT_GENERATORS)}, or register its type",
                path=path,
            )
        node: dict[str, Json] = {TAG: kind, "state": encoder.encode(getter(value), path)}
        if cls is torch.Generator:
            node["device"] = str(value.device)
        return node

    return encode


def set_state(kind: str, target: Any, state: Any, path: str) -> None:
    """Put a loaded state into a generator.

    Raises:
        StateError: it doesn't fit, as that of another kind of device.
        FormatError: it is malformed.
    """
    try:
        _SETTERS[kind](target, state)
    except FormatError as error:
        raise FormatError(f"the random state at {path!r} is malformed: {error}") from error
    except Exception as error:
        raise StateError(f"the random state at {path!r} doesn't fit: {error}", path=path) from error


def derive(kind: str, target: Any, number: int) -> None:
    """Let a generator whose state was just restored go another way, which ``number`` determines."""
    drawn = int(_DRAWS[kind](target))
    seed = random.Random(f"{drawn}/{number}").getrandbits(63)
    _SEEDS[kind](target, seed)


def _seed_all(target: RNG, seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _seed_numpy(target: np.random.Generator, seed: int) -> None:
    target.bit_generator.state = type(target.bit_generator)(seed).state


_DRAWS: dict[str, Callable[[Any], Any]] = {
    "rng": lambda target: torch.randint(2**62, ()),
    "torch_generator": lambda target: torch.randint(2**62, (), generator=target, device=target.device),
    "numpy_generator": lambda target: target.integers(2**62),
    "numpy_random_state": lambda target: target.randint(2**31),
    "python_random": lambda target: target.getrandbits(62),
}
_SEEDS: dict[str, Callable[[Any, int], object]] = {
    "rng": _seed_all,
    "torch_generator": lambda target, seed: target.manual_seed(seed),
    "numpy_generator": _seed_numpy,
    "numpy_random_state": lambda target, seed: target.seed(seed % 2**32),
    "python_random": lambda target, seed: target.seed(seed),
}


def make(kind: str, state: Any, device: object, path: str) -> Any:
    """A generator with a loaded state; just the state for the whole process's and for other devices."""
    if kind == "rng" or (kind == "torch_generator" and device != "cpu"):
        return state
    if kind in ("numpy_generator", "numpy_random_state"):
        name = state.get("bit_generator") if isinstance(state, dict) else None
        if not isinstance(name, str) or name not in _BIT_GENERATORS:
            raise FormatError(f"the random state at {path!r} is of no bit generator of NumPy's")
        target = GENERATORS[kind](_BIT_GENERATORS[name]())
    else:
        target = GENERATORS[kind]()
    set_state(kind, target, state, path)
    return target
