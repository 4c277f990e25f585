"""A config as text, with a comment at each key, to begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptstore.config.files import yaml_value
from ckptstore.errors import FormatError

SCHEMA = Path(__file__).with_name("schema.json")
"""By which editors complete a config."""

_COMMENTS: Mapping[str, str] = {
    "storage": "where checkpoints lie: a path, s3://bucket/prefix, gs://…",
    "backup": "every checkpoint is copied there in the background",
    "save": "when to save: every(steps=…), every(epochs=1), on_best(val_loss), milestones('1B,5B'), budget('1%')",
    "keep": "what stays, besides the newest: last(10), epochs(), best(val_loss), milestones(), within('7d')",
    "resume": "true: the latest checkpoint, or a fresh start; false: a fresh start; or one of them, as best:val_loss",
    "run": "what is known of the run, which the above is checked against",
    "total_steps": "optimizer steps",
    "epochs": "passes over the data",
}


def draft(data: Mapping[str, Any]) -> str:
    """``data`` as a YAML config with comments.

    >>> print(draft({"storage": "runs/gpt2"}).partition(chr(10) * 2)[2], end="")
    # where checkpoints lie: a path, s3://bucket/prefix, gs://…
    storage: runs/gpt2
    """
    lines = [f"# yaml-language-server: $schema={SCHEMA.as_uri()}", "# Every key: ckptstore's README, Configuration."]
    for key, value in data.items():
        lines += ["", f"# {_COMMENTS[key]}"]
        if isinstance(value, Mapping):
            inner = [f"  {name}: {_scalar(each)}  # {_COMMENTS[name]}" for name, each in value.items()]
            lines += [f"{key}:", *inner]
        else:
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join([*lines, ""])


def _scalar(value: object) -> str:
    quoted = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return quoted
    try:
        same = yaml_value(f"key: {value}\n", "a draft") == {"key": value}
    except FormatError:
        same = False
    return value if same else quoted
