"""Gates of a background job: mains power, a temperature, hours of the day. Linux and Android's files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_tcur_runtime.errors import IncompatibleError, UsageError

_SUPPLIES = Path("/sys/class/power_supply")
_ZONES = Path("/sys/class/thermal")
_CHARGING = ("Charging", "Full", "Not charging")  # a battery that is not giving power
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


def _read(path: Path) -> str | None:
    try:
        return path.read_text("ascii", errors="replace").strip()
    except OSError:
        return None


@dataclass(frozen=True)
class MainsPower:
    """Open while the device runs on mains power, or has no battery.

    Attributes:
        root: Linux's ``power_supply`` class (sysfs-class-power in the kernel's ABI documentation).
    """

    root: Path = _SUPPLIES

    def __call__(self) -> str | None:
        """Why the run must wait, or None."""
        supplies = sorted(self.root.iterdir()) if self.root.is_dir() else []
        kinds = {supply: _read(supply / "type") for supply in supplies}
        if any(_read(supply / "online") == "1" for supply, kind in kinds.items() if kind != "Battery"):
            return None
        batteries = [_read(supply / "status") for supply, kind in kinds.items() if kind == "Battery"]
        if all(status in _CHARGING for status in batteries):
            return None
        return "the device runs on its battery"


@dataclass(frozen=True)
class Cool:
    """Open while no sensor is above `limit` degrees Celsius.

    Attributes:
        root: Linux's ``thermal`` class; a zone's ``temp`` is in thousandths of a degree.
    """

    limit: float
    root: Path = _ZONES

    def __post_init__(self) -> None:
        if not 0 < self.limit < 150:
            raise UsageError(f"{self.limit} degrees; expected above 0 and below 150")
        if not self._temperatures():
            raise IncompatibleError(
                "this system tells no temperature", where=str(self.root), hint="leave --max-temperature out"
            )

    def _temperatures(self) -> list[float]:
        found = (_read(path) for path in sorted(self.root.glob("thermal_zone*/temp")))
        return [int(text) / 1000 for text in found if text is not None and re.fullmatch(r"-?\d+", text)]

    def __call__(self) -> str | None:
        """Why the run must wait, or None."""
        warmest = max(self._temperatures(), default=0.0)
        return f"a sensor shows {warmest:.0f} degrees, above {self.limit:g}" if warmest > self.limit else None


@dataclass(frozen=True)
class Hours:
    """Open between two times of the local day.

    Attributes:
        begin, end: minutes after midnight; a span may pass midnight, and equal times are the whole day.
        clock: gives the local hour and minute.
    """

    begin: int
    end: int
    clock: Callable[[], tuple[int, int]] = lambda: time.localtime()[3:5]

    @classmethod
    def parse(cls, text: str) -> Hours:
        """From ``HH:MM-HH:MM``.

        Raises:
            UsageError: anything else.
        """
        match = _HOURS.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} are no hours; expected HH:MM-HH:MM", hint="for example 01:00-05:30")
        hours = [int(part) for part in match.groups()]
        return cls(hours[0] * 60 + hours[1], hours[2] * 60 + hours[3])

    def __call__(self) -> str | None:
        """Why the run must wait, or None."""
        hour, minute = self.clock()
        since = (hour * 60 + minute - self.begin) % (24 * 60)
        if self.begin == self.end or since < (self.end - self.begin) % (24 * 60):
            return None
        return f"it is {hour:02}:{minute:02}, outside the hours that are allowed"
