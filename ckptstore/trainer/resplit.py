"""Positions in the data on another number of ranks: what all of them have left of a pass is dealt anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ckptstore.errors import StateError
from ckptstore.trainer import orders, starts
from ckptstore.trainer.indices import digest
from ckptstore.trainer.positions import Position
from ckptstore.trainer.readings import batch_size, other_order

Fields: TypeAlias = dict[str, Any]
Say: TypeAlias = Callable[[str], None]
Saved: TypeAlias = tuple[str | None, dict[str, Position]]


class Ranks(NamedTuple):
    """Which one of how many this is, and how many saved."""

    rank: int
    size: int
    before: int

    def refuse(self, name: str, why: str) -> StateError:
        """The error for a pass that they can't go on with."""
        return StateError(
            f"the source {name!r} can't be continued within its pass: {_ranks(self.before)} read it when it was saved, "
            f"{_ranks(self.size)} would go on now, and {why}. Resume with {_ranks(self.before)}, from the end of an "
            "epoch, or without the position in the data (restore=Parts(data=False))",
            path=name,
        )


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def gathered(saved: Sequence[Saved], rank: int, size: int) -> Saved:
    """The position of one of ``size`` ranks, of those of the ranks that saved.

    With as many ranks it is that of the same rank.

    Raises:
        StateError: a source was within a pass that other ranks can't continue.
    """
    ranks = Ranks(rank, size, len(saved))
    last, own = saved[rank] if rank < len(saved) else saved[0]
    if len(saved) == size:
        return last, {name: _with_all(position, name, saved) for name, position in own.items()}
    names = dict.fromkeys(name for _, positions in saved for name in positions)
    found = {name: _gathered(name, [positions.get(name) for _, positions in saved], ranks) for name in names}
    return last, {name: position for name, position in found.items() if position is not None}


def _with_all(position: Position, name: str, saved: Sequence[Saved]) -> Position:
    running = [positions[name].running for _, positions in saved if name in positions]
    return position._replace(ranks=tuple(fields for fields in running if fields is not None))


def _gathered(name: str, saved: Sequence[Position | None], ranks: Ranks) -> Position | None:
    readers = [position for position in saved if position is not None]
    own = saved[ranks.rank] if ranks.rank < len(saved) else None
    if len(readers) < len(saved):
        alone = len(readers) == 1 and saved[0] is not None
        if not alone and any(position.running and position.running["batches"] for position in readers):
            raise ranks.refuse(name, f"only {len(readers)} of those that saved read it")
        return own
    if len({(position.passes, position.running is None) for position in readers}) > 1:
        raise ranks.refuse(name, "they stood in different passes over it")
    base = readers[0] if own is None else own
    if own is None:
        base = base._replace(rest=_rest_of_new([position.rest for position in readers]))
    running = tuple(position.running for position in readers if position.running is not None)
    pooled = _pooled(name, running, ranks) if running else None
    return base._replace(running=pooled, ranks=running)


def _rest_of_new(rests: Sequence[Fields]) -> Fields:
    """What a rank that is new begins a pass with: generators that all have in common, else those of its own program."""
    if len({starts.digest_of(rest["own"]) for rest in rests}) == 1:
        return rests[0] | {"dataset": None}
    return rests[0] | {"own": {}, "dataset": None, "first": None, "again": False}


def _pooled(name: str, running: Sequence[Fields], ranks: Ranks) -> Fields | None:
    """One pass of all ranks, not dealt yet; None where nothing of it was used and it may as well begin anew.

    Raises:
        StateError: it is no one pass.
    """
    known = [fields["order"] for fields in running if fields.get("order") is not None]
    alone = any(order["sampler"] != "distributed" and not order["splits"] for order in known)
    if len(known) < len(running) or (alone and len(running) > 1):
        if not any(fields["batches"] for fields in running):
            return None
        raise ranks.refuse(
            name,
            "what each of them reads is its own affair: only where loaders have a DistributedSampler is it dealt anew",
        )
    if len({starts.digest_of({**order, "share": None}) for order in known}) > 1:
        raise ranks.refuse(name, "the ranks that saved didn't share one order of the samples")
    fields = running[ranks.rank] if ranks.rank < len(running) else _running_of_new(running)
    splits = known[0]["splits"]
    if any(order["share"] is not None for order in known):
        splits = [*splits, _used(name, running, ranks)]
    return fields | {
        "batches": max(each["batches"] for each in running),
        "samples": 0,
        "next": None,
        "order": known[0] | {"splits": splits, "share": None},
    }


def _running_of_new(running: Sequence[Fields]) -> Fields:
    """The pass on a rank that is new, with random numbers of its own, so that no two ranks draw the same."""
    own = [fields["start"]["own"] for fields in running]
    common = own[0] if len(set(map(starts.digest_of, own))) == 1 else {}
    start = running[0]["start"] | {"random": starts.process_state(), "own": common}
    return running[0] | {"start": start, "dataset": None}


def _used(name: str, running: Sequence[Fields], ranks: Ranks) -> list[int]:
    """How many samples each share was used of, since they were dealt."""
    shares = [(fields["order"]["share"], fields["samples"]) for fields in running]
    if len(shares) == 1:
        # Only one rank saved: the others, which trained with it, had used as many.
        return [shares[0][1]] * int(shares[0][0]["replicas"])
    used = {share["replica"]: samples for share, samples in shares if share is not None}
    replicas = {share and share["replicas"] for share, _ in shares}
    # Ranks that compute on the same samples have the same share.
    agree = all(share is not None and used[share["replica"]] == samples for share, samples in shares)
    if not agree or replicas != {len(used)}:
        raise ranks.refuse(name, "the ranks that saved weren't at one place in it")
    return [used[replica] for replica in range(len(used))]


def fitted(position: Position, source: Any, name: str, ranks: Ranks, say: Say, *, strict: bool) -> Fields:
    """The running pass, as the loader ``source`` can continue it.

    Where it is one of another number of loaders than those that saved, what is left of the pass is dealt anew. All get
    the same number of samples: where that doesn't work out, some come twice, as those that a ``DistributedSampler``
    adds, or are left out, where it or the loader has ``drop_last``.

    Raises:
        StateError: it can't continue it.
        IntegrityError: the order of the samples isn't the one that was saved, and ``strict``.
    """
    fields = position.running
    assert fields is not None
    order = fields.get("order")
    if order is None:
        return fields
    here, saved = orders.share_of(source), order["share"]
    if here is None:
        if saved is None or order["splits"]:
            raise ranks.refuse(name, "the batches of its loader aren't those of a sampler that can be given samples")
        return fields
    blind = ranks.size > 1 and not orders.knows_ranks(source)
    same = saved is not None and (blind or here["replicas"] == saved["replicas"])
    if same and not order["splits"]:
        return _of_share(here, fields, position.ranks)
    if order["length"] != (count := orders.length_of(source)):
        raise ranks.refuse(name, f"its data set had {order['length']} samples and has {count}")
    if same:
        return _of_share(here, fields, position.ranks)
    if blind:
        raise ranks.refuse(name, "its loader has no DistributedSampler")
    # As many ranks may be another number of loaders, where some read the same samples.
    pooled = fields if saved is None else _pooled(name, position.ranks, ranks)
    if pooled is None:
        return fields | {"next": None}
    samples = _left(pooled["order"], position.ranks, name, strict)
    fields = _dealt(pooled, here, source)
    say(_sentence(name, len(samples), position.ranks, fields))
    return fields


def _of_share(here: Fields, own: Fields, others: Sequence[Fields]) -> Fields:
    """The position in what this loader reads: of the same rank, or where ranks are numbered anew of another one."""
    for fields in (own, *others):
        share = (fields.get("order") or {}).get("share")
        if share is not None and all(share[key] == here[key] for key in ("replicas", "replica")):
            return fields
    return own


def _left(order: Fields, running: Sequence[Fields], name: str, strict: bool) -> orders.Samples:
    """What is left of the samples; those that ranks would have read next must be those that were saved."""
    *earlier, used = order["splits"]
    samples = orders.told(order | {"splits": earlier}, name)
    _compare(samples, running, name, strict)
    return orders.left(samples, used)


def _compare(samples: orders.Samples, running: Sequence[Fields], name: str, strict: bool) -> None:
    for fields in running:
        share, following = fields["order"]["share"], fields["next"]
        if share is None or following is None:
            continue
        used, size = fields["samples"], fields["batch_size"] or 1
        # Up to the end of its batch, of which a part may have been used.
        actual = digest(orders.dealt(samples, share, used, (used // size + 1) * size))
        if actual != following:
            other_order(fields, actual, name, strict)
            return


def _dealt(fields: Fields, here: Fields, source: Any) -> Fields:
    """The pass with the share of the loader that goes on with it."""
    start = fields["start"]
    there = starts.own_states(source)
    own = {path: state for path, state in start["own"].items() if path in there}
    return fields | {
        "order": fields["order"] | {"share": here},
        "batch_size": batch_size(source),
        "start": start | {"own": own},
    }


def _sentence(name: str, left: int, before: Sequence[Fields], fields: Fields) -> str:
    here = fields["order"]["share"]
    replicas = len(fields["order"]["splits"][-1])
    text = f"the source {name!r} goes on within its pass with {_ranks(here['replicas'])}, after {_ranks(replicas)}"
    if over := left % here["replicas"]:
        what = f"{over} are left out" if here["drop"] else f"{here['replicas'] - over} are read again"
        text += f"; of its last {left} samples {what}, so that all ranks read as many"
    sizes = [
        each and each * count
        for each, count in ((before[0]["batch_size"], replicas), (fields["batch_size"], here["replicas"]))
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        text += f". Together they take {sizes[1]} samples at a time, and took {sizes[0]}"
    return text
