"""The memory limits that control groups set to this process, versions 1 and 2.

A group's limit holds for all groups in it, so the tightest one on the way to the root counts. Where the
groups lie says ``/proc/self/mountinfo``: Android mounts the memory controller of version 1 at ``/dev/memcg``,
and a container's mount may begin at its own group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED = 2**60  # version 1 writes "no limit" as a number near 2^63
_MAX, _HIGH, _OLD = "memory.max", "memory.high", "memory.limit_in_bytes"
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Limits:
    """Bytes; None where there is no limit.

    Attributes:
        most: above it the kernel kills a process of the group (``memory.max``, ``memory.limit_in_bytes``).
        high: above it the kernel slows the group down until it is below (``memory.high``, version 2 alone).
    """

    most: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy is visible: the group at its top, and the place; `old` is version 1."""

    top: str
    place: str
    old: bool


_USUAL = (_Mount("/", "/sys/fs/cgroup", old=False), _Mount("/", "/sys/fs/cgroup/memory", old=True))


def read_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits on the way from this process's groups to the root.

    Args:
        root: where /proc and /sys are found.
    """
    most, high = list[str](), list[str]()
    mounts = list(_mounts(_text(root / "proc/self/mountinfo")))
    for old, group in _groups(_text(root / "proc/self/cgroup")):
        known = [mount for mount in mounts if mount.old is old]
        for mount in known or [mount for mount in _USUAL if mount.old is old]:
            for folder in _way_up(mount, group):
                place = root / folder.relative_to("/")
                most.append(_text(place / (_OLD if old else _MAX)))
                high.append("" if old else _text(place / _HIGH))
    return Limits(_least(most), _least(high))


def _groups(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is version 1, path) of this process's groups that may limit memory."""
    for line in text.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if path.startswith("/") and (not controllers or "memory" in controllers.split(",")):
            yield bool(controllers), path


def _mounts(text: str) -> Iterator[_Mount]:
    """The hierarchies with a memory controller (proc_pid_mountinfo(5))."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        first, last = before.split(), after.split()
        if len(first) < 5 or len(last) < 3:
            continue
        top, place = (_unescape(word) for word in first[3:5])
        if last[0] == "cgroup2" or (last[0] == "cgroup" and "memory" in last[2].split(",")):
            yield _Mount(top, place, old=last[0] == "cgroup")


def _way_up(mount: _Mount, group: str) -> Iterator[PurePosixPath]:
    """The folder of a group and those above it, as far as they are visible.

    A group beside the mount's top is not visible; of one whose place below it is not known, the top alone is
    taken, as it is the container's own.
    """
    path, top = PurePosixPath(group), PurePosixPath(mount.top)
    if ".." in path.parts:
        return
    below = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
    for part in (below, *below.parents):
        yield PurePosixPath(mount.place) / part
        if part == PurePosixPath():
            return


def _least(texts: list[str]) -> int | None:
    numbers = [int(text) for text in map(str.strip, texts) if text.isdecimal()]
    return min((number for number in numbers if number < _UNLIMITED), default=None)


def _unescape(word: str) -> str:
    """The kernel writes a space as ``\\040``."""
    return _ESCAPED.sub(lambda match: chr(int(match.group(1), 8)), word)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
