"""From what was written to a ``Config``, or to one error that names all that is wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from ckptstore.config import environment as variables
from ckptstore.config import foreign
from ckptstore.config.files import Draft, plain, read
from ckptstore.config.model import OPTIONS, Keys, names
from ckptstore.config.problems import Problems, add_validation
from ckptstore.config.secrets import check_options
from ckptstore.config.settings import Config, Parts, Run
from ckptstore.errors import FormatError

_log = logging.getLogger("ckptstore")

BYTES_PER_PARAMETER = 12
"""fp32 weights and Adam's two moments."""
BYTES_PER_WEIGHT = 4
"""Without the optimizer."""


def load(path: str | os.PathLike[str], *, environment: Mapping[str, str] | None = None) -> Config:
    """The config in a YAML file, or in one that is called ``.toml``.

    Args:
        path: of the file.
        environment: variables that override keys, ``os.environ`` by default; {} for none.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it can't be read.
        FormatError: all that is wrong with it.
    """
    return _made(read(path), environment)


def parse(data: Mapping[str, Any], *, source: str = "config", environment: Mapping[str, str] | None = None) -> Config:
    """The config in a dict, as a file would hold it; policies may be objects, too.

    Args:
        data: the keys.
        source: where they come from, for messages.
        environment: variables that override keys, ``os.environ`` by default; {} for none.

    Raises:
        FormatError: all that is wrong with it.
    """
    return _made(Draft(source, plain(data, source)), environment)


def _made(draft: Draft, environment: Mapping[str, str] | None) -> Config:
    problems = Problems(draft.source, draft.lines)
    data, notes = draft.data, list[str]()
    if foreign.is_foreign(data):
        data, notes = foreign.translated(data, problems)
    else:
        foreign.refuse_mixed(data, problems)
    # A key without a value, as a section whose keys are all commented out, says nothing.
    data = {name: value for name, value in data.items() if value is not None or name not in names()}
    for name in OPTIONS:
        if isinstance(given := data.get(name), dict):
            with problems.at((name,)):
                check_options(name, given)
    data = variables.override(data, os.environ if environment is None else environment, problems)
    keys, wrong = _validated(data, problems)
    config = _config(keys, draft.source, notes)
    _check_together(config, keys, problems, wrong)
    problems.raise_any()
    for note in notes:
        _log_once(f"{draft.source}: {note}")
    return config


def _validated(data: Mapping[str, Any], problems: Problems) -> tuple[Keys, set[str]]:
    """What of ``data`` each key alone says, and the keys at the top with which something is wrong."""
    try:
        return Keys.model_validate(data), set()
    except ValidationError as error:
        add_validation(problems, error)
        wrong = {str(each["loc"][0]) for each in error.errors(include_url=False)}
    # The others are looked at all the same, so that one reading tells all.
    return Keys.model_validate({name: value for name, value in data.items() if name not in wrong}), wrong


def _config(keys: Keys, source: str, notes: Sequence[str]) -> Config:
    run = keys.run.model_dump()
    step_s = run.pop("step_time")
    return Config(
        storage=keys.storage,
        storage_options=keys.storage_options,
        backup=keys.backup,
        backup_options=keys.backup_options,
        durable=keys.durable,
        compression=keys.compression,
        save=keys.save,
        keep=keys.keep,
        evaluate=keys.evaluate,
        trash_s=keys.trash,
        final=keys.final,
        resume=keys.resume,
        restore=Parts(**keys.restore.model_dump()),
        save_parts=Parts(**keys.include.model_dump()),
        run=Run(**run, step_s=step_s),
        checkpoint_bytes=_checkpoint_bytes(keys),
        notes=notes,
        source=source,
    )


def _checkpoint_bytes(keys: Keys) -> int | None:
    if keys.parameters is None:
        return keys.checkpoint_size
    return keys.parameters * (BYTES_PER_PARAMETER if keys.include.optimizer else BYTES_PER_WEIGHT)


def _check_together(config: Config, keys: Keys, problems: Problems, wrong: Collection[str]) -> None:
    """What each key alone doesn't tell."""
    far = config.storage is None or "://" in config.storage
    pairs: list[tuple[str, str, object, str]] = [
        ("durable", "backup", config.durable == "backup" and not config.backup,
         "'backup' needs a backup: name where it is, or write primary"),
        ("backup_options", "backup", config.backup_options and not config.backup,
         "there is no backup that they could be for: leave them out, or name it"),
        ("storage_options", "storage", config.storage_options and not far,
         f"are for storage far away, and {config.storage} is a path: leave them out"),
        ("parameters", "checkpoint_size", keys.parameters is not None and keys.checkpoint_size is not None,
         "checkpoint_size says the same thing: give one of them"),
    ]  # fmt: skip
    for name, other, contradicts, text in pairs:
        if contradicts and not {name, other}.intersection(wrong):
            problems.add((name,), text)
    if "run" not in wrong:
        _check_fit(config, problems)


def _check_fit(config: Config, problems: Problems) -> None:
    """Whether the schedules fit the run, where its length is known."""
    try:
        length = config.run.length()
    except FormatError as error:
        problems.add(("run",), str(error))
        return
    if length.total_steps is None:
        return
    for name, schedule in (("save", config.save), ("eval", config.evaluate)):
        if schedule is not None:
            with problems.at((name,)):
                schedule.check(length)


@lru_cache(maxsize=256)
def _log_once(text: str) -> None:
    _log.warning("%s", text)
