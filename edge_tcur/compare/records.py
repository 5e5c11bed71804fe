"""The records of a comparison: one line of JSON a run, in a folder that one comparison writes at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge_tcur_runtime.atomic import exclusive_lock, write_atomic
from edge_tcur_runtime.errors import ConfigError, FileFormatError

RECORDS = "records.jsonl"
PROBLEMS = "problems.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class Job:
    """One run: a method on a problem at a learning rate and a seed."""

    problem: str
    method: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        validation, test: scores, 0 to 1; zero when training diverged.
        trained_numbers, shipped_bytes: head apart.
        seconds: of the training loop; prepare_seconds: of the warm-up of the head, gradients and selection.
    """

    validation: float
    test: float
    trained_numbers: int
    shipped_bytes: int
    seconds: float
    prepare_seconds: float
    steps: int
    final_loss: float


@dataclass(frozen=True)
class Record(Outcome, Job):
    """A run and what it gave."""

    @property
    def job(self) -> Job:
        """The run that this is the record of."""
        return Job(self.problem, self.method, self.rate, self.seed)


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


def read_records(folder: Path) -> list[Record]:
    """The records in a folder; a last line that was cut off is left out.

    Raises:
        FileFormatError: another line is not a record.
    """
    path = folder / RECORDS
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    found = []
    for number, line in enumerate(lines, start=1):
        torn = number == len(lines)  # what stands after the last end of a line
        if line.strip():
            record = _parse(line, f"{path}, line {number}", torn=torn)
            found += [] if record is None else [record]
    return found


def _parse(line: bytes, where: str, *, torn: bool) -> Record | None:
    """A record, or None where the line may have been cut off and is none."""
    try:
        values = json.loads(line)
        record = Record(**values)
        for item in fields(Record):
            value = values[item.name]
            if not isinstance(value, _KINDS[str(item.type)]) or isinstance(value, bool):
                raise TypeError(f"{item.name} is {value!r}")
    except (ValueError, TypeError) as error:
        if torn:
            return None
        raise FileFormatError(
            f"not a record: {error}", where=where, hint="remove that line: its run is done again"
        ) from error
    return record


def write_record(folder: Path, record: Record) -> None:
    """Appends a record, in the place of a line that was cut off."""
    with (folder / RECORDS).open("a+b") as file:
        file.seek(0)
        tail = file.read().rpartition(b"\n")[2]
        whole = tail and _parse(tail, "", torn=True) is not None  # only the end of its line is missing
        if tail and not whole:
            file.truncate(file.tell() - len(tail))
        file.write((b"\n" if whole else b"") + json.dumps(asdict(record)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Inside, no other comparison writes to the folder; the lock ends with the process, however that ends.

    Raises:
        BadInputError: another one does. DiskError: the folder cannot be locked.
    """
    busy = "another comparison writes to this folder (or choose another --out)"
    with exclusive_lock(folder / _LOCK, busy):
        yield


def check_problems(folder: Path, problems: Mapping[str, Mapping[str, Any]]) -> None:
    """Holds the settings of each problem beside the records; runs under others are not of one comparison.

    Raises:
        ConfigError: the folder has records of a problem of that name with other settings.
        FileFormatError: the file beside the records is none of ours.
    """
    path, known = folder / PROBLEMS, dict[str, Any]()
    with contextlib.suppress(FileNotFoundError):
        try:
            known = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"not the settings of problems: {error}", where=str(path)) from error
    for name, settings in problems.items():
        if known.setdefault(name, dict(settings)) != settings:
            raise ConfigError(
                f"the records are of {known[name]}, not of {dict(settings)}",
                where=f"{folder}: {name}",
                hint="give the settings that the comparison began with, or another --out",
            )
    write_atomic(path, (json.dumps(known, indent=1) + "\n").encode())
