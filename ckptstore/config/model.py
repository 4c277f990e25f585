"""The keys of a config: their types, what is checked of each alone, and what an editor is told about it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from ckptstore.config.secrets import check_place
from ckptstore.errors import FormatError
from ckptstore.format.codecs import parse_compression
from ckptstore.policy.counts import parse_count
from ckptstore.policy.retention import Keep
from ckptstore.policy.schedule import Schedule
from ckptstore.policy.text import parse_keep, parse_schedule
from ckptstore.units import duration_s, size_bytes

Policy = TypeVar("Policy", Schedule, Keep)
Read = TypeVar("Read")

_SELECTOR = re.compile(
    r"latest|best:[^:]+(:(min|max))?|(step|epoch):\d{1,15}|milestone:[^:]+|[A-Za-z0-9][^:/\\\s]*", re.ASCII
)


def _combined(value: object, kind: type[Policy], read: Callable[[object], Policy], example: str) -> Policy | None:
    parts = value if isinstance(value, list | tuple) else [value]
    if not parts:
        raise FormatError(f"the list is empty: write {example}, or leave the key out")
    made = [part if isinstance(part, kind) else read(part) for part in parts]
    return reduce(or_, made)


def _schedule(value: object) -> Schedule | None:
    return _combined(value, Schedule, parse_schedule, "every(steps=250)")  # type: ignore[type-abstract]


def _keep(value: object) -> Keep | None:
    return _combined(value, Keep, parse_keep, "last(3)")  # type: ignore[type-abstract]


def read_place(value: object) -> str | None:
    """A path or a URL.

    Raises:
        FormatError: it is none, or there may be secrets in it.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise FormatError(f"{value!r:.60} is no place: write a path or a URL, as runs/gpt2 or s3://bucket/gpt2")
    place = os.fspath(value)
    check_place(place)
    return place


def _places(value: object) -> list[str]:
    parts = value if isinstance(value, list | tuple) else [value]
    return [place for place in map(read_place, parts) if place is not None]


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        # Not shown: it may hold secrets.
        raise FormatError("must be a section of options, as endpoint_url: https://…")
    return value


def _compression(value: object) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{value!r:.60} must be text, as float-zstd; none is for no compression")
    parse_compression(value)
    return value


def read_resume(value: object) -> bool | str:
    """Whether a run resumes, or from which checkpoint.

    Raises:
        FormatError: it is no selector.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and _SELECTOR.fullmatch(value):
        return value
    raise FormatError(
        f"{value!r:.100} is no selector: write true (the latest checkpoint, or a fresh start), false (a fresh start), "
        "latest, best:METRIC, step:N, epoch:N, milestone:1B, a hold's name or an id"
    )


def _unnamed(read: Callable[[Any, str], Read], value: object) -> Read:
    """What ``read`` makes of it; an error says where it stands anyway, and needs no name."""
    try:
        return read(value, "")
    except FormatError as error:
        raise FormatError(str(error).removeprefix(": ")) from error


def _duration(value: object) -> float:
    return _unnamed(duration_s, value)


def _step_time(value: object) -> float | None:
    seconds = None if value is None else _duration(value)
    if seconds == 0:
        raise FormatError("a step takes longer than 0 seconds")
    return seconds


def _size(value: object) -> int | None:
    return None if value is None else _unnamed(size_bytes, value)


def _count(value: object) -> int | None:
    if isinstance(value, str):
        return _unnamed(parse_count, value)
    if value is None or (type(value) is int and value > 0):
        return value
    raise FormatError(f"{value!r:.60} is no count; write a whole number, or as 124M, 7B")


def _text(*examples: str) -> dict[str, Any]:
    return {"type": "string", "examples": list(examples)}


def _or(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(schemas)})


_NULL: dict[str, Any] = {"type": "null"}
_NUMBER: dict[str, Any] = {"type": "number", "minimum": 0}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 1}


def _texts(*examples: str) -> WithJsonSchema:
    text = _text(*examples)
    return _or(text, {"type": "array", "items": text, "minItems": 1}, _NULL)


_EVERY = ("every(steps=250)", "every(epochs=1)", "epoch_plan(first=20, then='log')", "at(0, 10, '2000-10000/1000')")
ScheduleText: TypeAlias = Annotated[Schedule | None, PlainValidator(_schedule), _texts(*_EVERY, "on_best(val_loss)")]
KeepText: TypeAlias = Annotated[Keep | None, PlainValidator(_keep), _texts("last(10) | epochs() | best(val_loss)")]
Place: TypeAlias = Annotated[str | None, PlainValidator(read_place), _or(_text("runs/gpt2", "s3://bucket/gpt2"), _NULL)]
Places: TypeAlias = Annotated[list[str], PlainValidator(_places), _texts("s3://bucket/gpt2")]
Options: TypeAlias = Annotated[
    dict[str, Any], PlainValidator(_options), _or({"type": "object", "additionalProperties": True}, _NULL)
]
Compression: TypeAlias = Annotated[
    str, PlainValidator(_compression), WithJsonSchema(_text("none", "auto", "zstd", "float-zstd"))
]
Resume: TypeAlias = Annotated[
    bool | str, PlainValidator(read_resume), _or({"type": "boolean"}, _text("latest", "best:val_loss", "step:1000"))
]
Duration: TypeAlias = Annotated[float, PlainValidator(_duration), _or(_text("90s", "10m", "24h", "7d"), _NUMBER)]
StepTime: TypeAlias = Annotated[float | None, PlainValidator(_step_time), _or(_text("1.2s"), _NUMBER, _NULL)]
Size: TypeAlias = Annotated[int | None, PlainValidator(_size), _or(_text("1.5GB", "1GiB"), _WHOLE, _NULL)]
Count: TypeAlias = Annotated[int | None, PlainValidator(_count), _or(_text("124M", "7B"), _WHOLE, _NULL)]
Whole: TypeAlias = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: exact types, no unknown keys."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class RestoreKeys(Section):
    """``restore:``, what is restored when a run resumes, besides the model."""

    optimizer: bool = True
    scheduler: bool = True
    rng: bool = True
    data: bool = True


class IncludeKeys(Section):
    """``include:``, what is saved, besides the model."""

    optimizer: bool = True
    scheduler: bool = True


class RunKeys(Section):
    """``run:``, what is known of the run."""

    total_steps: Whole | None = Field(default=None, description="optimizer steps in all")
    epochs: Whole | None = Field(default=None, description="passes over the data")
    steps_per_epoch: Whole | None = Field(default=None, description="optimizer steps in each epoch")
    dataset_size: Whole | None = Field(default=None, description="samples in one epoch")
    batch_size: Whole | None = Field(default=None, description="samples in one micro batch, over all ranks")
    accumulation: Whole = Field(default=1, description="micro batches in one optimizer step")
    fallback_steps_per_epoch: Whole | None = Field(
        default=None, description="where nothing else tells an epoch's steps"
    )
    tokens_per_step: Whole | None = Field(default=None, description="tokens that one optimizer step learns from")
    step_time: StepTime = Field(default=None, description="what one step takes, as 1.2s")


class Keys(Section):
    """A config of ckptstore."""

    storage: Place = Field(default=None, description="where checkpoints lie: a path or a URL")
    storage_options: Options = Field(
        default={}, description="for a URL, as endpoint_url; secrets belong into the environment"
    )
    backup: Places = Field(default=[], description="where they are copied to")
    backup_options: Options = Field(default={}, description="for the backups")
    durable: Literal["primary", "backup"] = Field(default="primary", description="when a save is done")
    compression: Compression = Field(
        default="none", description="none, auto, zstd or float-zstd, the last two with :LEVEL"
    )
    save: ScheduleText = Field(default=None, description="when to save")
    keep: KeepText = Field(default=None, description="what stays; all, where it is left out")
    evaluate: ScheduleText = Field(default=None, alias="eval", description="when to evaluate")
    trash: Duration = Field(default=0.0, description="how long what was let go can be brought back")
    final: bool = Field(default=True, description="whether the end of the run is saved in any case")
    resume: Resume = Field(
        default=True, description="true: the latest, or a fresh start; false: a fresh start; or a selector"
    )
    restore: RestoreKeys = Field(default=RestoreKeys(), description="what is restored when a run resumes")
    include: IncludeKeys = Field(default=IncludeKeys(), description="what is saved, besides the model")
    run: RunKeys = Field(default=RunKeys(), description="what is known of the run")
    checkpoint_size: Size = Field(default=None, description="what one checkpoint takes, to plan with")
    parameters: Count = Field(default=None, description="instead of checkpoint_size: how many parameters the model has")


LEVELS: Mapping[tuple[str, ...], type[Section]] = {
    (): Keys, ("restore",): RestoreKeys, ("include",): IncludeKeys, ("run",): RunKeys,
}  # fmt: skip
"""The sections, by where they stand."""

OPTIONS = ("storage_options", "backup_options")
"""Keys under which anything may stand."""


def names(level: tuple[str, ...] = ()) -> list[str]:
    """The keys of a section, as they are written."""
    return [field.alias or name for name, field in LEVELS[level].model_fields.items()]
