"""What takes up the space at a store's URL, and what each rule that keeps checkpoints costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from ckptstore.engine.catalogue import Checkpoint, read_holds
from ckptstore.engine.workers import Progress
from ckptstore.maintenance.retire import holders, incomplete, trash_bytes
from ckptstore.policy.judge import judge
from ckptstore.policy.kinds import saved_as
from ckptstore.policy.progress import MILESTONE
from ckptstore.policy.retention import AnyOf, AtMost, Keep, Situation, rules_of
from ckptstore.policy.rules import Best, Epochs, MilestonesKept
from ckptstore.tools.census import RECORDS, Census, take_census
from ckptstore.view import View

_NUMBER = re.compile(r"\d[\d.,]*")
_EPOCH = re.compile(r"epoch \d+")

Roles: TypeAlias = dict[str, set[str]]
"""The ids of the checkpoints that have each role."""


@dataclass(frozen=True)
class RoleUsage:
    """What the checkpoints of one role take up; a checkpoint may have several roles.

    Attributes:
        name: ``latest``, ``best:METRIC``, ``hold NAME``, ``epoch``, ``milestone``, a reason for which they were saved
            (``every N steps`` where they differ in numbers only), or ``none``.
        checkpoints: how many.
        bytes: what they need, each object once, also what they borrow.
        only_bytes: what would be free without them: what no other checkpoint needs.
    """

    name: str
    checkpoints: int
    bytes: int
    only_bytes: int


@dataclass(frozen=True)
class PartUsage:
    """The objects of one component of the state, or the blocks of one codec, that existing checkpoints need.

    Attributes:
        name: as ``model``, ``(records)`` for manifests and parts; of a codec its name.
        objects: how many; of a codec the files that have blocks of it.
        bytes: on storage.
        raw_bytes: before they were encoded.
    """

    name: str
    objects: int
    bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class CheckpointUsage:
    """What one checkpoint takes up.

    Attributes:
        bytes: what it needs: own_bytes and borrowed_bytes.
        own_bytes: what lies in its own folder.
        borrowed_bytes: what lies with others, and is needed by them or was before.
        only_bytes: what would be free if it alone were deleted: what no other one needs.
        raw_bytes: its tensors in memory.
        roles: as ``RoleUsage.name``.
    """

    id: str
    step: int
    bytes: int
    own_bytes: int
    borrowed_bytes: int
    only_bytes: int
    raw_bytes: int
    roles: Sequence[str]


@dataclass(frozen=True)
class RuleUsage:
    """What one of several rules costs.

    Attributes:
        rule: as it is written.
        checkpoints: how many it keeps.
        bytes: what these need, each object once.
        only_bytes: what would be free without the rule. Less than 0 where more would stay, as without ``at_most``.
    """

    rule: str
    checkpoints: int
    bytes: int
    only_bytes: int


@dataclass(frozen=True)
class KeepUsage:
    """What rules cost, were they applied now.

    Attributes:
        keep: the rules.
        rules: each of them.
        always_bytes: what would be free without those that stay though no rule keeps them: the newest, what is held or
            damaged, what others borrow from.
        stay, stay_bytes: the checkpoints that stay, and what they need.
        go: those that would be deleted.
        freed_bytes: what that would free, as soon as they are reclaimed.
    """

    keep: str
    rules: Sequence[RuleUsage]
    always_bytes: int
    stay: int
    stay_bytes: int
    go: int
    freed_bytes: int


@dataclass(frozen=True)
class Usage:
    """What lies at one URL. The first six add up to ``total_bytes``.

    Attributes:
        checkpoint_bytes: what existing checkpoints need, each object once: data files, manifests and parts.
        trash_bytes: what only deleted checkpoints need, which can be brought back.
        unfinished_bytes: what running or killed saves have written so far.
        damaged_bytes: of checkpoints whose commit record can't be read, and what they may need.
        record_bytes: all other records: commits, holds, writers, receipts and so on.
        foreign_bytes: what isn't ckptstore's.
        total_bytes, objects: all that lies there.
        raw_bytes: the tensors of all existing checkpoints in memory, each checkpoint by itself.
        spared_bytes: what borrowing spares: what would lie there twice or more without it.
        unreadable: ids of checkpoints whose manifest or parts are damaged; what they may need counts as theirs.
        roles, components, codecs, checkpoints: the same space, seen from each side; the checkpoints oldest first.
        keep: what the rules cost that were asked for, else None.
    """

    url: str
    checkpoint_bytes: int
    trash_bytes: int
    unfinished_bytes: int
    damaged_bytes: int
    record_bytes: int
    foreign_bytes: int
    total_bytes: int
    objects: int
    deleted: int
    raw_bytes: int
    spared_bytes: int
    unreadable: Sequence[str]
    roles: Sequence[RoleUsage]
    components: Sequence[PartUsage]
    codecs: Sequence[PartUsage]
    checkpoints: Sequence[CheckpointUsage]
    keep: KeepUsage | None


def usage(store: View, keep: Keep | None = None, *, progress: Progress | None = None) -> Usage:
    """What takes up the space at ``store.url``: by role, component, codec and checkpoint. Only records are read.

    A file that several checkpoints share lies there once and counts once wherever several are taken together. What
    ``only_bytes`` says would be free is exact: what no other existing checkpoint needs.

    Args:
        keep: also what each of these rules costs, and what would go under them.
        progress: called with (checkpoints read, checkpoints in all), from any thread.

    Raises:
        NotFoundError: there is no store.
        IntegrityError: with ``keep``, a commit record or a hold can't be read: who knows what it keeps.
        StorageError: the storage can't be read completely.
    """
    census = take_census(store, progress)
    roles = _roles(census.checkpoints, read_holds(store.storage)[0])
    needed = census.checkpoints
    whole = sum(census.bytes_of([c.id]) for c in needed)
    return Usage(
        url=census.url,
        checkpoint_bytes=census.total("checkpoints"),
        trash_bytes=census.total("trash"),
        unfinished_bytes=census.total("unfinished"),
        damaged_bytes=census.total("damaged"),
        record_bytes=census.total("records"),
        foreign_bytes=census.total("foreign"),
        total_bytes=sum(census.sizes.values()),
        objects=len(census.sizes),
        deleted=len(census.catalogue.buried),
        raw_bytes=sum(c.raw_bytes for c in needed),
        spared_bytes=whole - census.bytes_of(c.id for c in needed),
        unreadable=sorted(set(census.unreadable) & {c.id for c in needed}),
        roles=[RoleUsage(name, len(ids), census.bytes_of(ids), census.freed_by(ids)) for name, ids in roles.items()],
        components=_components(census),
        codecs=_codecs(census),
        checkpoints=[_of_one(census, c, roles) for c in needed],
        keep=None if keep is None else _cost(census, store, keep),
    )


def _of_one(census: Census, checkpoint: Checkpoint, roles: Roles) -> CheckpointUsage:
    id = checkpoint.id
    whole, own = census.bytes_of([id]), census.own_bytes(checkpoint)
    return CheckpointUsage(
        id=id,
        step=checkpoint.step,
        bytes=whole,
        own_bytes=own,
        borrowed_bytes=whole - own,
        only_bytes=census.freed_by([id]),
        raw_bytes=checkpoint.raw_bytes,
        roles=[name for name, ids in roles.items() if id in ids],
    )


def _roles(checkpoints: Sequence[Checkpoint], holds: Mapping[str, str]) -> Roles:
    """Every role that any checkpoint has, by its name: those that select one first."""
    there = {c.id for c in checkpoints}
    situation = Situation(datetime.now(UTC))
    roles: Roles = {"latest": {c.id for c in checkpoints[-1:]}}
    for metric in sorted({name for c in checkpoints for name in c.metrics}):
        roles[f"best:{metric}"] = set(Best(metric, 1, "auto").kept(checkpoints, situation))
    roles |= {f"hold {name}": {id} & there for name, id in sorted(holds.items())}
    roles["epoch"] = set(Epochs(1).kept(checkpoints, situation))
    roles["milestone"] = set(MilestonesKept().kept(checkpoints, situation))
    roles |= _reasons(checkpoints)
    roles["none"] = there.difference(*roles.values())
    return {name: ids for name, ids in roles.items() if ids}


def _reasons(checkpoints: Sequence[Checkpoint]) -> Roles:
    """The ids by the reasons they were saved for; those that differ in numbers only are one kind."""
    kinds: dict[str, Roles] = {}
    for c in checkpoints:
        for reason in c.reasons:
            if not reason.startswith(MILESTONE) and not _EPOCH.fullmatch(reason):
                kinds.setdefault(_NUMBER.sub("N", saved_as(reason)), {}).setdefault(reason, set()).add(c.id)
    named = {next(iter(each)) if len(each) == 1 else kind: each for kind, each in sorted(kinds.items())}
    return {name: set().union(*each.values()) for name, each in named.items()}


def _components(census: Census) -> list[PartUsage]:
    found: dict[str, list[tuple[int, int]]] = {}
    for key, what in census.existing.items():
        size = census.sizes.get(key, 0)
        raw = size if what.component == RECORDS else sum(raw for _, _, raw in what.codecs)
        found.setdefault(what.component, []).append((size, raw))
    return _parts(found)


def _codecs(census: Census) -> list[PartUsage]:
    found: dict[str, list[tuple[int, int]]] = {}
    for what in census.existing.values():
        for codec, stored, raw in what.codecs:
            found.setdefault(codec, []).append((stored, raw))
    return _parts(found)


def _parts(found: Mapping[str, Sequence[tuple[int, int]]]) -> list[PartUsage]:
    parts = [
        PartUsage(name, len(each), sum(s for s, _ in each), sum(r for _, r in each)) for name, each in found.items()
    ]
    return sorted(parts, key=lambda part: (-part.bytes, part.name))


def _cost(census: Census, store: View, keep: Keep) -> KeepUsage:
    """What ``keep`` costs: rule by rule, compared with the same rules without it."""
    now, checkpoints = datetime.now(UTC), census.checkpoints
    held, bad = holders(store.storage, census.catalogue), incomplete(census.entries, checkpoints)
    trash = trash_bytes(store.storage, census.catalogue, keep)
    everything = {c.id for c in checkpoints}

    def staying(rules: Iterable[Keep]) -> set[str]:
        verdicts = judge(AnyOf(tuple(rules)), checkpoints, now=now, held=held, bad=bad, other_bytes=trash).verdicts
        return {verdict.id for verdict in verdicts if verdict.stays}

    rules, good = rules_of(keep), [c for c in checkpoints if c.id not in bad]
    stay = staying(rules)
    told, kept = [], set[str]()
    for rule in rules:
        rest = [other for other in rules if other is not rule]
        # Without its only limit, and no other rule, all stay.
        without = staying(rest) if rest or not isinstance(rule, AtMost) else everything
        own = stay if isinstance(rule, AtMost) else set(rule.kept(good, Situation(now)))
        kept |= own & stay
        only = census.bytes_of(stay) - census.bytes_of(without)
        told.append(RuleUsage(str(rule), len(own), census.bytes_of(own), only))
    return KeepUsage(
        keep=str(keep),
        rules=told,
        always_bytes=census.bytes_of(stay) - census.bytes_of(kept),
        stay=len(stay),
        stay_bytes=census.bytes_of(stay),
        go=len(everything - stay),
        freed_bytes=census.freed_by(everything - stay),
    )
