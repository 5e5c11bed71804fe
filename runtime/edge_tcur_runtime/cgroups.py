"""The limits that control groups set to this process, versions 1 and 2.

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


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[bool, Path]]:
    """The folders of this process's groups that may limit something, and of those above them.

    Args:
        controller: ``memory`` or ``cpu``.
        root: where /proc and /sys are found.

    Returns:
        whether it is a group of version 1, and its folder.
    """
    mounts = list(_mounts(_text(root / "proc/self/mountinfo"), controller))
    for names, group in _groups(_text(root / "proc/self/cgroup"), controller):
        old = bool(names)
        known = [mount for mount in mounts if mount.old is old]
        for mount in known or _usual(names, controller):
            for folder in _way_up(mount, group):
                yield old, root / folder.relative_to("/")


def read_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits of memory on the way from this process's groups to the root.

    Args:
        root: where /proc and /sys are found.
    """
    most, high = list[str](), list[str]()
    for old, folder in group_folders("memory", root):
        most.append(_text(folder / (_OLD if old else _MAX)))
        high.append("" if old else _text(folder / _HIGH))
    return Limits(_least(most), _least(high))


def _usual(names: str, controller: str) -> list[_Mount]:
    """Where the hierarchies lie on most systems."""
    if not names:
        return [_Mount("/", "/sys/fs/cgroup", old=False)]
    return [_Mount("/", f"/sys/fs/cgroup/{name}", old=True) for name in dict.fromkeys((names, controller))]


def _groups(text: str, controller: str) -> Iterator[tuple[str, str]]:
    """(controllers of version 1, none of version 2; path) of this process's groups with that controller."""
    for line in text.splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if path.startswith("/") and (not names or controller in names.split(",")):
            yield names, path


def _mounts(text: str, controller: str) -> Iterator[_Mount]:
    """The hierarchies with a controller (proc_pid_mountinfo(5))."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        first, last = before.split(), after.split()
        if len(first) < 5 or len(last) < 3:
            continue
        top, place = (_unescape(word) for word in first[3:5])
        if last[0] == "cgroup2" or (last[0] == "cgroup" and controller in last[2].split(",")):
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
