"""The saved position in one source, checked: the checkpoint may have been made or edited elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

from ckptstore.errors import FormatError

KINDS = ("plain", "state", "indices")
MAX_RANKS = 1 << 20
SAMPLERS = ("distributed", "sequential", "random")


class Position(NamedTuple):
    """Where a source stood: completed passes of the epoch, the running one, and what the next one needs.

    Attributes:
        ranks: the running passes of all ranks that saved, this one's among them.
    """

    passes: int
    running: dict[str, Any] | None
    rest: dict[str, Any]
    ranks: tuple[dict[str, Any], ...] = ()


def parse_all(state: object) -> tuple[str | None, dict[str, Position]]:
    """The name of the source that was read last, and the positions by name.

    Raises:
        FormatError: something is malformed; the message names the source.
    """
    fields = state if isinstance(state, dict) else {}
    last, sources = fields.get("last"), fields.get("sources")
    if not isinstance(sources, dict):
        raise FormatError("the positions in the data are malformed: they must be a dict of sources")
    _text(last, "last", "the positions in the data")
    return last, {name: parse(name, saved) for name, saved in sources.items()}


def parse(name: object, saved: object) -> Position:
    """The position in the source ``name``.

    Raises:
        FormatError: it is malformed; the message names the source.
    """
    where = f"the position in the source {name!r}"
    if not isinstance(name, str) or not isinstance(saved, dict):
        raise FormatError(f"{where} is malformed: it must be a dict under a text")
    passes, running, rest = (_field(saved, key, where) for key in ("passes", "running", "rest"))
    _count(passes, "passes", where)
    if running is not None:
        _running(running, where)
    _dict(rest, "rest", where)
    _dict(_field(rest, "own", where), "own", where)
    for key in ("again", "kept"):
        _flag(_field(rest, key, where), key, where)
    _text(_field(rest, "first", where), "first", where)
    _field(rest, "dataset", where)
    return Position(passes, running, rest, () if running is None else (running,))


def _running(running: Any, where: str) -> None:
    _dict(running, "running", where)
    kind = _field(running, "kind", where)
    if kind not in KINDS:
        raise FormatError(f"{where} is malformed: {kind!r} is no kind of source; known: {', '.join(KINDS)}")
    for key in ("batches", "samples"):
        _count(_field(running, key, where), key, where)
    for key in ("length", "batch_size"):
        if _field(running, key, where) is not None:
            _count(running[key], key, where)
    start = _dict(_field(running, "start", where), "start", where)
    for key in ("random", "own", "epochs"):
        _dict(_field(start, key, where), key, where)
    for epoch in start["epochs"].values():
        _count(epoch, "epochs", where)
    if kind == "state":
        _field(running, "state", where)
        if _field(running, "own", where) is not None:
            _dict(running["own"], "own", where)
        if _count(_field(running, "at", where), "at", where) > running["batches"]:
            raise FormatError(f"{where} is malformed: its state is of a later batch")
    if kind == "indices":
        _flag(_field(running, "reset", where), "reset", where)
        _text(_field(running, "next", where), "next", where)
        _field(running, "dataset", where)
        if running.get("order") is not None:  # older checkpoints have none
            _order(running["order"], where)


def _order(order: Any, where: str) -> None:
    _dict(order, "order", where)
    sampler = _field(order, "sampler", where)
    if sampler not in SAMPLERS:
        raise FormatError(f"{where} is malformed: {sampler!r} is no sampler; known: {', '.join(SAMPLERS)}")
    _count(_field(order, "length", where), "length", where)
    if sampler == "random":
        _field(order, "generator", where)
    if sampler == "distributed":
        _positive(_field(order, "replicas", where), "replicas", where)
        seed = _field(order, "seed", where)
        if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
            raise FormatError(f"{where} is malformed: 'seed' must be a number of 64 bits, not {seed!r:.80}")
        for key in ("shuffle", "drop_last"):
            _flag(_field(order, key, where), key, where)
    _splits(_field(order, "splits", where), where)
    share = _field(order, "share", where)
    if share is not None:
        _dict(share, "share", where)
        replicas = _positive(_field(share, "replicas", where), "replicas", where)
        if _count(_field(share, "replica", where), "replica", where) >= replicas:
            raise FormatError(f"{where} is malformed: there is no replica {share['replica']} of {replicas}")
        _flag(_field(share, "drop", where), "drop", where)
    elif not order["splits"]:
        raise FormatError(f"{where} is malformed: it says nothing of who reads what")


def _splits(splits: Any, where: str) -> None:
    if not isinstance(splits, list) or not all(isinstance(used, list) and used for used in splits):
        raise FormatError(f"{where} is malformed: 'splits' must be a list of lists of numbers, not {splits!r:.80}")
    for used in splits:
        for count in used:
            _count(count, "splits", where)


def _field(fields: dict[str, Any], key: str, where: str) -> Any:
    if key not in fields:
        raise FormatError(f"{where} is malformed: it lacks {key!r}")
    return fields[key]


def _dict(value: Any, key: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is malformed: {key!r} must be a dict, not {value!r:.80}")
    return value


def _count(value: Any, key: str, where: str) -> int:
    if type(value) is not int or value < 0:
        raise FormatError(f"{where} is malformed: {key!r} must be a number from 0 up, not {value!r:.80}")
    return value


def _positive(value: Any, key: str, where: str) -> int:
    if not 1 <= _count(value, key, where) <= MAX_RANKS:
        raise FormatError(f"{where} is malformed: {key!r} must be a number from 1 to {MAX_RANKS}, not {value}")
    return int(value)


def _flag(value: Any, key: str, where: str) -> None:
    if type(value) is not bool:
        raise FormatError(f"{where} is malformed: {key!r} must be true or false, not {value!r:.80}")


def _text(value: Any, key: str, where: str) -> None:
    if value is not None and type(value) is not str:
        raise FormatError(f"{where} is malformed: {key!r} must be a text, not {value!r:.80}")
