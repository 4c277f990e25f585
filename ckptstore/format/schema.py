"""The JSON Schema of all records, generated from the models: ``python -m ckptstore.format.schema`` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.json_schema import models_json_schema

from ckptstore.format.records import (
    CommitRecord,
    CondemnedRecord,
    ControlRecord,
    CopyingRecord,
    HoldRecord,
    ManifestRecord,
    PartRecord,
    ReceiptRecord,
    StoreRecord,
    TombstoneRecord,
    VerificationRecord,
    WriterRecord,
)

RECORDS = (
    StoreRecord,
    WriterRecord,
    CommitRecord,
    CondemnedRecord,
    TombstoneRecord,
    HoldRecord,
    ReceiptRecord,
    CopyingRecord,
    VerificationRecord,
    ControlRecord,
    ManifestRecord,
    PartRecord,
)
PATH = Path(__file__).with_name("schema.json")


def generate() -> str:
    """The schema as text, as it stands in ``schema.json``."""
    _, schema = models_json_schema([(model, "serialization") for model in RECORDS], title="ckptstore format 1")
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    PATH.write_text(generate())
