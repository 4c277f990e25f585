"""Secrets never stand in a config: it is committed, copied and shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptstore.errors import FormatError

_SECRET = re.compile(
    r"[a-z]*key|secrets?|[a-z]*token|pass|passw(or)?d|passphrase|credentials?|authorization|sas", re.IGNORECASE
)
_CONNECTION = re.compile(r"connection_?string", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_HARMLESS = re.compile(r"(SSE)?KMS_?Key_?Id|key_filename|use_[a-z_]+", re.IGNORECASE)
"""Names of keys and of files with keys, which open nothing by themselves."""
_NO_TOKENS = ("anon", "cloud", "google_default", "browser", "cache")
"""What gcsfs calls a token, and is only the way to one."""
_ENVIRONMENT = "AWS_…, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_…"


def is_secret(name: str, value: object = "") -> bool:
    """Whether an option of this name and value looks like a secret."""
    if value is None or isinstance(value, bool) or value in _NO_TOKENS or _HARMLESS.fullmatch(name):
        return False
    return bool(_CONNECTION.fullmatch(name)) or any(_SECRET.fullmatch(word) for word in _WORDS.findall(name))


def check_options(key: str, options: Mapping[str, Any]) -> None:
    """Nothing, for options without secrets, which stand under ``key``.

    Raises:
        FormatError: which of them look like secrets, and where these belong.
    """
    if found := list(_secrets(options)):
        variables = ", ".join(f"CKPTSTORE_{key}__{name.replace('.', '__')}".upper() for name in found)
        raise FormatError(
            f"{', '.join(found)}: that looks like a secret, and a config is committed and copied. Leave it out and "
            f"give it by the environment, as the service's own tools take it ({_ENVIRONMENT}), or as {variables}"
        )


def check_place(place: str) -> None:
    """Nothing, for a path, or a URL without secrets in it.

    Raises:
        FormatError: there is a user or a query; the message doesn't repeat it.
    """
    scheme, slashes, rest = place.partition("://")
    if slashes and ("@" in rest.partition("/")[0] or "?" in rest or "#" in rest):
        raise FormatError(
            f"this {scheme:.20}:// URL has a user, a '?' or a '#' part, which may hold secrets: leave it out and give "
            f"credentials by the environment ({_ENVIRONMENT})"
        )


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if is_secret(name, value):
            yield name
        elif isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _secrets({str(key): item for key, item in value.items()}))
