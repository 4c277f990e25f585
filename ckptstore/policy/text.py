"""Policies as text, the same as in Python: ``every(steps=250) | on_best(val_loss)``, ``last(10) | epochs()``."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Any

from ckptstore.errors import FormatError
from ckptstore.policy.budget import budget
from ckptstore.policy.epochs import epoch_plan
from ckptstore.policy.events import on_best
from ckptstore.policy.retention import Keep
from ckptstore.policy.rules import at_most, best, epochs, every_kept, last, milestones, tagged, within
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.steps import at, every

_SCHEDULES: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (at, every, epoch_plan, on_best, milestones, budget)
}
_RULES: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (last, best, epochs, every_kept, milestones, within, tagged, at_most)
}
_LONGEST = 100_000


def parse_schedule(text: object) -> Schedule:
    """The schedule that ``text`` writes.

    Names of metrics and reasons need no quotes, and segments of ``at`` neither.

    Raises:
        FormatError: it is none; what is wrong, and how to write it.
    """
    made = _parse(text, _SCHEDULES, "a schedule", "every(steps=250) | every(epochs=1)")
    if not isinstance(made, Schedule):
        # Only ``milestones`` is both, by its arguments.
        raise FormatError(f"{text!r:.200} is no schedule: milestones('1B') says when to save, milestones() what stays")
    return made


def parse_keep(text: object) -> Keep:
    """The rules that ``text`` writes.

    Raises:
        FormatError: it writes none; what is wrong, and how to write it.
    """
    made = _parse(text, _RULES, "a rule", "last(10) | epochs() | best(val_loss)")
    if not isinstance(made, Keep):
        raise FormatError(f"{text!r:.200} is no rule: milestones() says what stays, milestones('1B,5B') when to save")
    return made


def _parse(text: object, known: Mapping[str, Callable[..., Any]], what: str, example: str) -> Any:
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise FormatError(f"{text!r:.60} is not {what}: write text, as {example}")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise FormatError(f"{text!r:.200} is not {what}: write it as {example}") from error
    parts: list[ast.expr] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            waiting += [node.right, node.left]
        else:
            parts.append(node)
    return reduce(or_, [_call(part, text, known, what, example) for part in parts])


def _call(node: ast.expr, text: str, known: Mapping[str, Callable[..., Any]], what: str, example: str) -> Any:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise FormatError(f"{_shown(node, text)} in {text!r:.200} is not {what}: write it as {example}")
    name = node.func.id
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise FormatError(f"{name!r:.60} in {text!r:.200} is not {what}: {meant}There are {', '.join(known)}")
    arguments = [_value(argument, text) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in named:
            raise FormatError(f"{_shown(node, text)}: give each argument once, by its name")
        named[keyword.arg] = _value(keyword.value, text)
    try:
        return known[name](*arguments, **named)
    except TypeError as error:
        # Python names the function and the argument.
        raise FormatError(f"{_shown(node, text)}: {error}") from error


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if (segment := _segment(node)) is not None:
        return segment
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        value = ...
    if value is not None and not isinstance(value, str | int | float | list):
        raise FormatError(f"{_shown(node, text)} in {text!r:.200}: write a number, or text in quotes")
    return value


def _segment(node: ast.expr) -> str | None:
    """``2000-10000/1000``, which Python reads as a subtraction of a division, as ``at`` wants it."""
    match node:
        case ast.BinOp(
            ast.Constant(int(first)), ast.Sub(), ast.BinOp(ast.Constant(int(last)), ast.Div(), ast.Constant(int(every)))
        ):
            return f"{first}-{last}/{every}"
    return None


def _shown(node: ast.expr, text: str) -> str:
    """The part of ``text`` that ``node`` was read from, shortened."""
    # Not unparsed: what is deeply nested can be read, and no longer be written.
    return f"{ast.get_source_segment(text, node)!r:.100}"
