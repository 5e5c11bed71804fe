"""A small document in two copies, written in turn: generation, checksum; the valid one with the higher holds.

A write that is torn, or a sector that fails, then costs one change and not everything. Each copy is
written old-or-new; who writes holds a lock.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from edge_tcur_runtime.atomic import write_atomic
from edge_tcur_runtime.errors import BadInputError, DiskError, FileFormatError, IntegrityError
from edge_tcur_runtime.formats.adapter import read_bounded

NAMES = ("state-0.json", "state-1.json")
MODE = 0o600
T = TypeVar("T")


@dataclass(frozen=True)
class Current(Generic[T]):
    """The document that holds, the copy it lies in, and what was wrong with the other one."""

    value: T
    generation: int = 0  # 0: no valid copy was found
    slot: int = 1  # index into `NAMES`; the next write goes to the other one
    warnings: tuple[str, ...] = ()
    valid: int = 0  # how many copies are valid; one is missing or damaged below 2, or not written yet


class Copies(Generic[T]):
    """The two copies of a document in a directory.

    Args:
        parse: a document and its generation from the bytes of a copy and its path; raises FileFormatError or
            IntegrityError for a damaged one.
        limit: the most bytes that a copy has.
        what: names the document in messages.
    """

    def __init__(
        self, folder: Path, parse: Callable[[bytes, str], tuple[T, int]], limit: int, what: str
    ) -> None:
        self.folder, self._parse, self._limit, self._what = folder, parse, limit, what

    def read(self, empty: T, *, changing: bool = False) -> Current[T]:
        """The valid copy with the highest generation; `empty` where there is none.

        Raises:
            DiskError: `changing`, and the disk cannot read a copy just now: the change would be made to
                an older document.
            BadInputError: no permission. FormatVersionError: written by a newer version.
        """
        best, warnings, valid = Current(empty), [], 0
        for slot, name in enumerate(NAMES):
            try:
                copy = self._read_copy(self.folder / name)
            except (FileFormatError, IntegrityError, DiskError) as error:
                if changing and isinstance(error, DiskError):
                    raise
                warnings.append(f"{error}; this copy of {self._what} is not used")
                continue
            valid += copy is not None
            if copy is not None and copy[1] > best.generation:
                best = Current(*copy, slot)
        return replace(best, warnings=tuple(warnings), valid=valid)

    def write(self, current: Current[T], serialize: Callable[[int], bytes]) -> None:
        """Writes the next generation in the place of the older or damaged copy; DiskError where it cannot."""
        raw = serialize(current.generation + 1)
        write_atomic(self.folder / NAMES[1 - current.slot], raw, mode=MODE)

    def _read_copy(self, path: Path) -> tuple[T, int] | None:
        """One copy; None where there is none. A failing sector is a DiskError and counts as damage; a
        missing permission does not: falling back would silently go back in time.
        """
        try:
            raw = read_if_there(path, self._limit)
        except BadInputError as error:
            if not isinstance(error.__cause__, OSError):
                raise IntegrityError(error.message, where=str(path)) from error
            if error.__cause__.errno == errno.EIO:
                hint = "the storage may be failing; if this stays, delete the file: there is another copy"
                raise DiskError(error.message, where=str(path), hint=hint) from error
            raise
        return None if raw is None else self._parse(raw, str(path))


def read_if_there(path: Path, limit: int) -> bytes | None:
    """A file's bytes; None where there is no such file. Raises: see `read_bounded`."""
    try:
        return read_bounded(path, limit)
    except BadInputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
