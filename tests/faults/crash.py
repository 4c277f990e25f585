"""Every state that POSIX lets a power cut leave, from a log of what an operation asked of the file system.

Until a folder is synced, each name made or removed in it since its last sync may be on the disk or not, each by
itself. Until a file is synced, it may hold what it held at its last sync, what it holds now, or torn data. Nothing
else is promised: no order between two folders, or between a file and its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from .recorder import ABOVE, BEGIN, Event

TORN = -1
"""The version of a file of which a part is old, missing or zero."""

MOST_STATES = 1 << 16
"""At one point; more would be a log that syncs nothing."""

Node = int
Files = Mapping[str, tuple[Node, int]]
"""The node and version of each file that a walk from the root reaches, by its path; folders end in "/"."""


@dataclass
class Disk:
    """What is durable, and what may be."""

    names: dict[tuple[Node, str], list[Node | None]] = field(default_factory=dict)
    """For each name in each folder what it led to: first on the disk, then each change that isn't synced."""
    versions: dict[Node, list[int]] = field(default_factory=dict)
    """For each file the version on the disk, and the present one where it differs."""
    folders: set[Node] = field(default_factory=lambda: {ABOVE})

    def apply(self, event: Event) -> None:
        """Do one event of the log."""
        kind, node, *rest = event
        if kind == "data":
            durable, current = self.versions[node][0], self.versions[node][-1]
            self.versions[node] = [durable, current + 1]
        elif kind == "fsync":
            self._sync(node)
        elif kind in ("unlink", "rmdir"):
            self.names[node, rest[0]].append(None)
        elif kind != "note":
            self.names.setdefault((node, rest[0]), [None]).append(rest[1])
            if kind == "mkdir":
                self.folders.add(rest[1])
            else:
                self.versions.setdefault(rest[1], [0])

    def _sync(self, node: Node) -> None:
        if node in self.folders:
            for (folder, _), history in self.names.items():
                if folder == node:
                    del history[:-1]
        else:
            del self.versions[node][:-1]

    def states(self) -> Iterator[Files]:
        """Every state that a cut may leave now, by what a walk from the root would find."""
        open_names = [(key, list(dict.fromkeys(history))) for key, history in self.names.items() if len(history) > 1]
        open_files = [(node, [*history, TORN]) for node, history in self.versions.items() if len(history) > 1]
        count = 1
        for _, choices in (*open_names, *open_files):
            count *= len(choices)
        assert count <= MOST_STATES, f"{count} states"
        settled = {key: history[-1] for key, history in self.names.items()}
        versions = {node: history[-1] for node, history in self.versions.items()}
        for nodes in product(*(choices for _, choices in open_names)):
            chosen = {**settled, **dict(zip((key for key, _ in open_names), nodes, strict=True))}
            for contents in product(*(choices for _, choices in open_files)):
                chosen_versions = {**versions, **dict(zip((node for node, _ in open_files), contents, strict=True))}
                yield self._walk(chosen, chosen_versions)

    def now(self) -> Files:
        """What every process sees, while the power is on."""
        return self._walk(
            {key: history[-1] for key, history in self.names.items()},
            {node: history[-1] for node, history in self.versions.items()},
        )

    def _walk(self, names: Mapping[tuple[Node, str], Node | None], versions: Mapping[Node, int]) -> Files:
        inside: dict[Node, list[tuple[str, Node]]] = {}
        for (folder, name), node in names.items():
            if node is not None:
                inside.setdefault(folder, []).append((name, node))
        found: dict[str, tuple[Node, int]] = {}
        pending = [("", node) for _, node in inside.get(ABOVE, ())]
        while pending:
            path, folder = pending.pop()
            for name, node in inside.get(folder, ()):
                if node in self.folders:
                    found[f"{path}{name}/"] = node, 0
                    pending.append((f"{path}{name}/", node))
                else:
                    found[path + name] = node, versions[node]
        return found


def replay(log: Sequence[Event]) -> Disk:
    """The disk after all of ``log``."""
    disk = Disk()
    for event in log:
        disk.apply(event)
    return disk


def begin(log: Sequence[Event]) -> int:
    """Where in ``log`` the operation begins; before that stands what was there already."""
    return log.index(BEGIN) + 1


def fsync_names(log: Sequence[Event]) -> dict[int, str]:
    """What each fsync of the operation makes durable, for a person, by its place in the log."""
    paths = {ABOVE: ""}
    for kind, *rest in log:
        if kind in ("create", "mkdir", "link"):
            folder, name, node = rest
            paths[node] = f"{paths[folder]}{name}{'/' if kind == 'mkdir' else ''}"
    places = range(begin(log), len(log))
    return {place: _title(paths[log[place][1]]) for place in places if log[place][0] == "fsync"}


def _title(path: str) -> str:
    if not path:
        return "above the store"
    _, _, key = path.partition("/")
    top, _, rest = key.partition("/")
    if rest in _TITLES:
        return _TITLES[rest]
    if not rest or key.endswith("/"):
        return "<id>/" if rest else key or "root"
    return _TITLES.get(top) or ("part" if "/part-" in rest else _TITLES.get(rest.rpartition("/")[2], "data file"))


_TITLES = {"commits": "commit record", "writers": "writer record", "trash": "tombstone", "manifest.json": "manifest"}
