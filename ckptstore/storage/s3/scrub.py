"""No message repeats a secret, whoever wrote it: servers may send back what they were sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPTIONS = ("key", "secret", "token", "username", "password")
_LEAST = 8
"""Shorter ones are no secrets, but would be found everywhere."""


def secrets_in(options: Mapping[str, Any]) -> set[str]:
    """The credentials among storage_options."""
    nested = options.get("client_kwargs")
    given = [options.get(name) for name in _OPTIONS]
    given += [value for name, value in nested.items() if "aws_" in name] if isinstance(nested, Mapping) else []
    extra = options.get("s3_additional_kwargs")
    given += [value for name, value in extra.items() if "CustomerKey" in name] if isinstance(extra, Mapping) else []
    return {value for value in given if isinstance(value, str)}


def secrets_of(client: object) -> set[str]:
    """The credentials that a client of botocore found by itself, in the environment or in files."""
    found = getattr(getattr(client, "_request_signer", None), "_credentials", None)
    # Under these names also where they are refreshed, which may take a request, when they are asked for.
    values = [getattr(found, name, None) for name in ("_access_key", "_secret_key", "_token")]
    values += [found.__dict__.get(name) for name in ("access_key", "secret_key", "token")] if found else []
    return {value for value in values if isinstance(value, str)}


def scrubbed(text: str, secrets: set[str]) -> str:
    """``text`` without them."""
    for secret in secrets:
        if len(secret) >= _LEAST:
            text = text.replace(secret, "***")
    return text
