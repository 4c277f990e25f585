"""A checkpoint's state as a tree of names, collapsed where it gets deep."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptstore.cli.terminal import plain
from ckptstore.near import meant_pattern
from ckptstore.tools.outline import wanted

if TYPE_CHECKING:
    from rich.tree import Tree

_INLINE_ITEMS = 8
_INLINE_CHARS = 100


@dataclass
class Branch:
    """One level of names: what lies under each, and the leaves that end here."""

    branches: dict[str, Branch] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    count: int = 0
    stored_bytes: int = 0


def grow(leaves: Iterable[tuple[str, str, int]], separators: str) -> Branch:
    """The tree of (name, what stands behind it, bytes), cut after each of ``separators``."""
    root, cut = Branch(), re.compile(f"(?<=[{re.escape(separators)}])")
    for name, text, size in leaves:
        *folders, last = cut.split(name)
        branch = root
        for folder in (None, *folders):
            if folder is not None:
                branch = branch.branches.setdefault(folder, Branch())
            branch.count += 1
            branch.stored_bytes += size
        branch.leaves[last] = text
    return root


def draw(title: str, root: Branch, depth: int, label: Callable[[Branch], str]) -> Tree:
    """The tree as rich draws it; what lies deeper than ``depth`` is only counted, by ``label``."""
    from rich.tree import Tree

    tree = Tree(_text(title), guide_style="dim")
    _draw(tree, root, depth, label)
    return tree


def _draw(tree: Tree, branch: Branch, depth: int, label: Callable[[Branch], str]) -> None:
    for name, text in branch.leaves.items():
        tree.add(_text(f"{name}{text}"))
    for name, below in branch.branches.items():
        path, end = name, below
        # A folder with nothing but one other in it takes no level of its own.
        while len(end.branches) == 1 and not end.leaves:
            ((more, end),) = end.branches.items()
            path += more
        if len(end.leaves) == 1 and not end.branches:
            ((last, text),) = end.leaves.items()
            tree.add(_text(f"{path}{last}{text}"))
            continue
        node = tree.add(_text(f"{path}  {label(end)}"))
        if depth > 1:
            _draw(node, end, depth - 1, label)


def _text(content: str) -> Any:
    from rich.text import Text

    return Text(plain(content), overflow="fold")


def unmatched(patterns: tuple[str, ...], names: Collection[str]) -> Iterator[str]:
    """For each of ``patterns`` that matches none of ``names`` a remark, with what may have been meant."""
    for pattern in patterns:
        if not any(wanted(name, (pattern,)) for name in names):
            yield f"nothing here matches {pattern!r}{meant_pattern(pattern, names)}"


def value_text(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, list) and len(value) > _INLINE_ITEMS:
        shown = ", ".join(value_text(item) for item in value[:3])
        return f"[{shown}, … {len(value):,} in all]"
    # Infinities and NaN have no JSON, and people know them by their Python names.
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _INLINE_CHARS else text[:_INLINE_CHARS] + "…"
