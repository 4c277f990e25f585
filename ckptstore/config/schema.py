"""The JSON Schema of a config, by which editors complete it: ``python -m ckptstore.config.schema`` writes it."""

from __future__ import annotations

import json

from ckptstore.config.model import Keys
from ckptstore.config.template import SCHEMA


def generate() -> str:
    """The schema as text, as it stands in ``schema.json``."""
    schema = Keys.model_json_schema(by_alias=True)
    return json.dumps(schema | {"title": "ckptstore config"}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(generate())
