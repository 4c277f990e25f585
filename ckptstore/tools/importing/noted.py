"""What stands beside a foreign checkpoint's tensors, in names and JSON, read as what it should be or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ckptstore.errors import FormatError, StorageError
from ckptstore.tools.importing.folder import Folder

_NAME_LENGTH = 100
_METRICS = 100
_NO_METRICS = frozenset(
    "step epoch total_flos num_input_tokens_seen num_tokens learning_rate grad_norm global_step".split()
)
_NO_METRICS_END = ("_runtime", "_per_second", "_preparation_time")


@dataclass
class Noted:
    """What was read of a checkpoint; the fields are those of ``Found``, and the names of the files that were read."""

    kind: str
    step: int | None = None
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    created: datetime | None = None
    values: dict[str, Any] = field(default_factory=dict)
    facts_in: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    names: set[str] = field(default_factory=set)

    def read(self, folder: Folder, name: str, component: str) -> Mapping[str, Any]:
        """The object in a JSON file, which becomes a component, too; {} where it isn't there or can't be read."""
        if name not in folder.files:
            return {}
        self.names.add(name)
        try:
            found = folder.read_json(name)
        except (FormatError, StorageError) as error:
            self.left_out[name] = error.message
            return {}
        if not isinstance(found, dict):
            self.left_out[name] = "holds no JSON object"
            return {}
        self.values[component] = found
        return found


def count_of(value: Any) -> int | None:
    """A step or an epoch, if the value is one."""
    return value if type(value) is int and 0 <= value < 10**15 else None


def metrics_of(values: Mapping[Any, Any]) -> dict[str, float]:
    """What of the values are metrics: finite numbers that tell how good the model is."""
    found = {
        name: float(value)
        for name, value in values.items()
        if type(value) in (int, float)
        and isinstance(name, str)
        and 0 < len(name) <= _NAME_LENGTH
        and name not in _NO_METRICS
        and not name.endswith(_NO_METRICS_END)
        and -1e300 < value < 1e300
        and not math.isnan(value)
    }
    # A commit record is small; those of a training are few.
    return dict(list(found.items())[:_METRICS])


def time_of(value: Any) -> datetime | None:
    """A time as programs write it, seconds since 1970 or ISO text; without a zone it is taken as UTC."""
    try:
        if isinstance(value, str):
            found = datetime.fromisoformat(value)
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        return datetime.fromtimestamp(value, UTC) if type(value) in (int, float) else None
    except (ValueError, OverflowError, OSError):
        return None
