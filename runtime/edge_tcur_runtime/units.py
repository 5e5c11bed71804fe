"""Sizes as people write them (binary units) and as scripts read them (bytes)."""

from __future__ import annotations

import math
import re

from edge_tcur_runtime.errors import UsageError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``256MiB``, ``1.5 GiB`` or ``4096``.

    Raises:
        UsageError: not a number with a binary unit. Decimal units (``MB``) are refused rather
            than guessed, because a budget read 5 % too large is a killed process.
    """
    match = _PATTERN.match(text)
    unit = match.group(2).upper() if match else ""
    size = float(match.group(1)) * _UNITS.get(unit, 1) if match else math.inf
    if unit not in _UNITS or math.isinf(size):
        raise UsageError(
            f"cannot read the size {text!r}",
            hint="write a number with a binary unit: 256MiB, 1.5GiB or bytes without a unit",
        )
    return round(size)


def format_size(size: int) -> str:
    """A size in the largest binary unit that keeps at least one digit before the point."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
