"""What an export tells of itself besides its files."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Notes:
    """Filled while an export is made.

    Attributes:
        cast: what was converted to another type, by name, as "float32".
        overflowed: what has infinite numbers only since it was converted, by name, with the type.
        converted: values that are something simpler now, by path, with what they are.
        left_out: what isn't in it, by path, with the reason.
    """

    cast: dict[str, str] = field(default_factory=dict)
    overflowed: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
