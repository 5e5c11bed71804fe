"""The CPUs that this process may use, and how many threads are worth trying on them.

A container's share of CPU time is a quota of its control group, which the affinity does not show: with more
threads than that all are stopped when it is used up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edge_tcur_runtime.cgroups import group_folders
from edge_tcur_runtime.errors import ConfigError

_NEARLY = 0.8  # of the fastest core's speed, for one that counts as fast: cores of one kind differ by turbo


def usable_cores(root: Path = Path("/")) -> int:
    """CPUs that this process may run on: its affinity, and no more than its control group's quota of time.

    Args:
        root: where /proc and /sys are found.
    """
    cores = len(_affinity())
    for quota in _quotas(root):
        cores = min(cores, max(1, int(quota)))
    return cores


def fast_cores(root: Path = Path("/")) -> int:
    """How many of the CPUs of this process are of the fastest kind; all where the system does not say."""
    places = [root / f"sys/devices/system/cpu/cpu{number}" for number in _affinity()]
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = [_number(place / name) for place in places]
        known = [speed for speed in speeds if speed]
        if len(known) == len(speeds):
            return sum(speed >= _NEARLY * max(known) for speed in known)
    return len(places)


def thread_counts(asked: int) -> tuple[int, ...]:
    """Numbers of threads to choose from, ascending: one, the fast cores, all; or the one that was asked for.

    Raises:
        ConfigError: a negative number.
    """
    cores = usable_cores()
    if asked:
        return (within(asked),)
    return tuple(sorted({1, min(fast_cores(), cores), cores}))


def within(asked: int) -> int:
    """`asked` threads, 0 for as many as there are cores: more only wait for each other.

    Raises:
        ConfigError: a negative number.
    """
    if asked < 0:
        raise ConfigError(f"{asked}; expected 0 or more", where="threads")
    cores = usable_cores()
    return min(asked or cores, cores)


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time that each of this process's control groups and their parents may use."""
    for _, folder in group_folders("cpu", root):
        if quota := _quota(folder):
            yield quota


def _quota(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        most, period = (folder / "cpu.max").read_text("ascii").split()
        return int(most) / int(period) if most != "max" else None
    most_us, period_us = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return most_us / period_us if most_us and period_us and most_us > 0 else None


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text("ascii"))
    return None
