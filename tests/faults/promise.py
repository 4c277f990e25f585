"""What must hold of each state that a power cut leaves, judged from names and versions alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from .crash import Disk, Files, begin
from .recorder import Event


@dataclass
class Promise:
    """What the operation in ``log`` has to keep.

    Args:
        log: the whole log of one operation.
        deletes: whether the operation deletes; the commit records that it makes are condemnations then.
        old: id of the checkpoint that was there and has to stay.
        lent: names of the files that it borrows from another one.
    """

    log: Sequence[Event]
    deletes: bool
    old: str | None
    lent: Set[str] = frozenset()
    whole: Counter[int] = field(default_factory=Counter)
    needed: dict[str, dict[str, int]] = field(default_factory=dict)
    condemned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        disk = Disk()
        for place, event in enumerate(self.log):
            disk.apply(event)
            if event[0] == "data":
                self.whole[event[1]] += 1
            elif event[0] in ("create", "link") and not event[2].startswith("tmp-"):
                self._learn(disk.now(), event, operation=place >= begin(self.log))
        for files in [files for id, files in self.needed.items() if self.lent and id != self.old]:
            lent = {path: node for path, node in files.items() if path.rpartition("/")[2] in self.lent}
            self.needed[self.old or ""].update(lent)

    def _learn(self, files: Files, event: Event, *, operation: bool) -> None:
        path = next(path for path, (node, _) in files.items() if path.endswith(event[2]) and node == event[3])
        top, _, rest = path.partition("/")
        if top == "checkpoints":
            self.needed.setdefault(rest.partition("/")[0], {})[path] = event[3]
        elif top == "commits" and operation and self.deletes:
            self.condemned.add(_id(path))

    def broken_by(self, files: Files, told: Set[tuple[str, str]]) -> str | None:
        """What is wrong with ``files`` after the process ``told`` these (word, id), or None."""
        records = {path for path in files if _is_record(path)}
        for path in records:
            if not self._is_whole(files, path, files[path][0]):
                return f"{path} is torn"
        commits = {_id(path) for path in records if path.startswith("commits/")} - self.condemned
        buried = {_id(path) for path in records if path.startswith("trash/")}
        for id in commits:
            if not all(self._is_whole(files, path, node) for path, node in self.needed[id].items()):
                return f"{id} is committed and not whole"
        if commits and "store.json" not in files:
            return "store.json is missing"
        acknowledged = {id for word, id in told if word == "ack"} | ({self.old} if self.old else set())
        if not acknowledged <= commits - buried:
            return "an acknowledged checkpoint is gone"
        if {id for word, id in told if word == "buried"} & (commits - buried):
            return "a deleted checkpoint is back"
        return None

    def _is_whole(self, files: Files, path: str, node: int) -> bool:
        return files.get(path) == (node, self.whole[node])


def _is_record(path: str) -> bool:
    return path.endswith(".json") and not path.startswith("checkpoints/") and "/tmp-" not in path


def _id(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")
