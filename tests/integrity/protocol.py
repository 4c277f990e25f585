"""The protocol of borrowing and reclaiming as single steps, of which every interleaving can be tried.

One checkpoint, ``L``, owns a file. ``B`` borrows it by way of ``L``, then ``V`` borrows it by way of ``B``. Meanwhile
``L`` and ``B`` are deleted and brought back, and two prunes reclaim what is buried, each at any time. A listing of the
commits takes two steps: what comes and goes in between may be missed, as in a large folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import NamedTuple

Ids = frozenset[str]
NONE: Ids = frozenset()
VIA = {"B": "L", "V": "B"}
HEIR, OTHERS = frozenset("V"), frozenset("LB")
PASSED = {"list": HEIR, "list on": OTHERS, "list again": HEIR, "list to end": OTHERS}
"""What each step of a listing passes: the newest first, so that an heir may come where it has been already."""


class Prune(NamedTuple):
    """One prune: its next step, and what it knows."""

    next: str = "begin"
    graves: Ids = NONE
    """The tombstones that it listed."""
    seen: Ids = NONE
    """The commits of its last listing."""
    before: Ids | None = None
    """Those of the listing before, after the records were removed."""
    due: Ids = NONE
    """Whose records it still has to remove."""


class State(NamedTuple):
    """What is on storage, and where everybody is."""

    file: bool = True
    commits: Ids = frozenset("L")
    graves: Ids = NONE
    acknowledged: Ids = frozenset("L")
    borrower: str = "B"
    next: str = "begin"
    """What the borrower does next."""
    deletes: int = 2
    undeletes: int = 1
    prunes: tuple[Prune, ...] = (Prune(), Prune())

    @property
    def lost(self) -> bool:
        """Whether an acknowledged checkpoint, live or in the trash, has lost its file."""
        return not self.file and bool(self.acknowledged & self.commits)


@dataclass(frozen=True)
class Rules:
    """The protocol, where nothing else is said; each other value leaves out something of it."""

    looks_for: str = "record"
    """What the borrower looks for after its commit: the "record" of whom it borrowed by way of, its "tombstone",
    "both", or "nothing"."""
    counts_buried: bool = True
    lists: str = "after"
    """When the commits are listed that say what is lent: "after" the records were removed, "before" that, or "first" of
    all, before the tombstones."""
    settles: bool = True
    """Whether they are listed until they are the same twice in a row."""
    trusts_the_dead: bool = False
    """Whether a process that goes on after another died borrows by way of its last checkpoint, acknowledged or not,
    also where the owner's record is gone."""
    at_once: bool = False
    """Whether a listing is a single step, as in a small folder."""

    def after(self, s: State) -> Iterator[State]:
        """Every state that one step of anybody leads to."""
        yield from self._save(s)
        for id in s.acknowledged & s.commits & frozenset("LB"):
            if id in s.graves and s.undeletes:
                yield s._replace(graves=s.graves - {id}, undeletes=s.undeletes - 1)
            elif id not in s.graves and s.deletes:
                yield s._replace(graves=s.graves | {id}, deletes=s.deletes - 1)
        for prune in set(s.prunes):
            [other] = s.prunes if len(s.prunes) == 1 else [s.prunes[1 - s.prunes.index(prune)]]
            for state, moved in self._prune(s, prune):
                # Which of the two is which makes no difference.
                yield state._replace(prunes=tuple(sorted((moved, other), key=repr)))

    def _save(self, s: State) -> Iterator[State]:
        via = VIA.get(s.borrower, "")
        if s.next == "begin" and via in s.commits and s.file:
            # Up to here all is seen to be there; whether it stays is what this is about.
            yield s._replace(next="commit")
        elif s.next == "commit":
            yield s._replace(commits=s.commits | {s.borrower}, next="look")
        elif s.next == "restart" and via in s.commits - s.graves and s.file:
            if self.trusts_the_dead or "L" in s.commits:
                yield s._replace(next="commit")
        elif s.next == "look":
            if s.borrower == "B":
                # Its process dies, and nobody knows whether it was acknowledged.
                yield s._replace(borrower="V", next="restart")
            record, grave = via in s.commits, via in s.graves
            safe = {"record": record, "tombstone": not grave, "both": record and not grave, "nothing": True}[
                self.looks_for
            ]
            if safe:
                heir = {"B": ("V", "begin"), "V": ("", "")}[s.borrower]
                yield s._replace(acknowledged=s.acknowledged | {s.borrower}, borrower=heir[0], next=heir[1])
            else:
                yield s._replace(graves=s.graves | {s.borrower}, borrower="", next="")

    def _prune(self, s: State, p: Prune) -> Iterator[tuple[State, Prune]]:
        if p.next == "begin":
            yield s, p._replace(next="list" if self.lists == "first" else "graves")
        elif p.next == "graves":
            first = self.lists == "first"
            due = s.graves & p.seen if first else NONE
            yield s, p._replace(graves=s.graves, due=due, next="look" if first else "list")
        elif p.next.startswith("list"):
            yield s, self._list(s, p)
        elif p.next == "look":
            yield s, self._look(s, p)
        elif p.next.startswith("remove"):
            id = p.next[-1]
            yield s._replace(commits=s.commits - {id}), p._replace(seen=p.seen - {id}, next="look")
        elif p.next == "unlink":
            lent = p.seen & frozenset("BV") - (NONE if self.counts_buried else p.graves)
            gone = "L" not in p.seen and not lent
            yield s._replace(file=s.file and not gone), Prune("end")

    def _list(self, s: State, p: Prune) -> Prune:
        begins, again = p.next in ("list", "list again"), p.next in ("list again", "list to end")
        seen = NONE if begins else p.seen
        seen |= s.commits & PASSED[p.next]
        if begins:
            p = p._replace(seen=seen, next="list to end" if again else "list on")
            return self._list(s, p) if self.at_once else p
        if not again:
            first = self.lists == "first"
            return p._replace(seen=seen, due=NONE if first else p.graves & seen, next="graves" if first else "look")
        settled = not self.settles or seen == p.before
        return p._replace(seen=seen, before=None if settled else seen, next="unlink" if settled else "list again")

    def _look(self, s: State, p: Prune) -> Prune:
        if not p.due:
            return p._replace(next="list again" if self.lists == "after" else "unlink")
        id = min(p.due)
        return p._replace(due=p.due - {id}, next=f"remove {id}" if id in s.graves else "look")


def explored(rules: Rules) -> tuple[Set[State], list[State] | None]:
    """Every state that can be, or those up to the first that loses a file, and the shortest history to that."""
    begin = State()
    came_from: dict[State, State | None] = {begin: None}
    newest = [begin]
    while newest:
        found = []
        for state in newest:
            for next in rules.after(state):
                if next not in came_from:
                    came_from[next] = state
                    found.append(next)
                    if next.lost:
                        return came_from.keys(), _history(came_from, next)
        newest = found
    return came_from.keys(), None


def _history(came_from: dict[State, State | None], last: State) -> list[State]:
    history: list[State] = []
    state: State | None = last
    while state is not None:
        history.append(state)
        state = came_from[state]
    return history[::-1]
