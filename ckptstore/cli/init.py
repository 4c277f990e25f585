"""``ckptstore init``: a config to begin with, from a few questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from ckptstore.cli.outcome import BAD_NEWS, CommandError
from ckptstore.cli.terminal import answer, emit, json_option, note, plain
from ckptstore.errors import ExistsError, FormatError

NONE = "none"


@dataclass(frozen=True)
class Question:
    """What is asked, and what is answered by pressing Enter."""

    key: str
    text: str
    default: str


_QUESTIONS = (
    Question("total_steps", "How many optimizer steps does the run have? (none: not known yet)", "10000"),
    Question("epochs", "How many epochs? (none: not known yet)", NONE),
    Question("storage", "Where shall checkpoints lie? A path, s3://bucket/prefix, gs://…", "runs/first"),
    Question("save", "When to save? every(steps=250), every(epochs=1), on_best(val_loss), budget('1%'); a | b", ""),
    Question("milestones", "At which numbers of parameters, too? 1B,5B or 500M (none: at none)", NONE),
    Question("keep", "What stays? last(3), epochs(), best(val_loss); a | b (none: all)", "last(3)"),
    Question("backup", "Where are they copied to? A path or URL (none: nowhere)", NONE),
)
_USUAL_STEPS = 250
"""Between two saves, where the run is that long."""


@click.command()
@click.argument("path", default="ckptstore.yaml")
@click.option("--yes", "-y", is_flag=True, help="Ask nothing, take the answers that Enter would give.")
@click.option("--force", is_flag=True, help="Replace PATH without asking, if it exists.")
@json_option
def init(path: str, yes: bool, force: bool, as_json: bool) -> None:
    """Write a config to begin with.

    Asks how long the run is, where checkpoints lie, how often to save, what stays, and where backups go. Each answer
    is checked at once, and asked for again with what is wrong. PATH, ckptstore.yaml by default, is then a YAML file
    with a comment at each key. An existing one is not replaced without a yes or --force.

    \b
      ckptstore init configs/gpt2.yaml
      ckptstore init --yes

    Exit codes: 0 written; 1 PATH exists, or you said no; 2 nobody to ask and no --yes, PATH can't be written or
    wrong use.
    """
    if "://" in path:
        raise click.UsageError("PATH is a URL: a config is a file on this machine")
    if not yes and not _at_terminal():
        raise click.UsageError("There is no terminal to ask at: add --yes to take the defaults")
    replace = force or _may_replace(path, yes)
    data = _defaults() if yes else _asked()
    from ckptstore.config import draft, write_new

    write_new(path, draft(data), replace=replace)
    if as_json:
        emit({"written": path, "config": data})
    else:
        answer(
            f"wrote {path}",
            f"see what it saves and keeps: ckptstore plan {path}",
            f"it is read with: ckptstore.config.load({path!r})",
        )


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _may_replace(path: str, yes: bool) -> bool:
    if not os.path.lexists(path):
        return False
    if yes:
        raise ExistsError(f"{path} exists: add --force to replace it, or name another file")
    if not click.confirm(f"{path} exists. Replace it?", err=True):
        raise CommandError("nothing was written", code="declined", exit_code=BAD_NEWS)
    return True


def _defaults() -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for question in _QUESTIONS:
        _accept(answers, question, _default(question, answers))
    return _config(answers)


def _asked() -> dict[str, Any]:
    answers: dict[str, Any] = {}
    note("Enter takes what stands in brackets.")
    for question in _QUESTIONS:

        def checked(text: str, question: Question = question) -> str:
            try:
                _accept(answers, question, text)
            except FormatError as error:
                # click says it and asks again.
                raise click.UsageError(plain(str(error))) from error
            return text

        click.prompt(question.text, default=_default(question, answers), value_proc=checked, err=True)
    return _config(answers)


def _default(question: Question, answers: Mapping[str, Any]) -> str:
    if question.key != "save":
        return question.default
    total = answers["total_steps"]
    return f"every(steps={_USUAL_STEPS if total is None else min(_USUAL_STEPS, max(1, total // 4))})"


def _accept(answers: dict[str, Any], question: Question, text: str) -> None:
    """Take an answer.

    Raises:
        FormatError: what is wrong with it, beside those that were given before.
    """
    from ckptstore.config import parse

    text = text.strip()
    value: Any = None if text.lower() == NONE else text
    if question.key in ("total_steps", "epochs") and text.isdecimal():
        value = int(text)
    if question.key in ("storage", "save") and value is None:
        raise FormatError(f"a run without it saves nothing; for example {_default(question, answers)}")
    tried = {**answers, question.key: value}
    try:
        parse(_config(tried), source="", environment={})
    except FormatError as error:
        # What was asked for just now needs no name.
        raise FormatError(str(error).removeprefix(": ").partition(": ")[2]) from error
    answers.update(tried)


def _config(answers: Mapping[str, Any]) -> dict[str, Any]:
    """The answers as keys of a config."""
    found = {key: answers.get(key) for key in ("storage", "save", "keep", "backup")}
    if (counts := answers.get("milestones")) is not None:
        from ckptstore.policy.rules import milestones

        found["save"] = f"{answers['save']} | {milestones(counts)}"
        if answers.get("keep") is not None:
            found["keep"] = f"{answers['keep']} | milestones()"
    run = {key: answers[key] for key in ("total_steps", "epochs") if answers.get(key) is not None}
    made = {key: value for key, value in found.items() if value is not None}
    return made | ({"run": run} if run else {})
