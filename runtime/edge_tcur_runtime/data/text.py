"""Text data sets: CSV with a header row, and JSON Lines with one object a line."""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_tcur_runtime.data.limits import DEFAULT_LIMITS, DataLimits
from edge_tcur_runtime.data.targets import (
    LABEL,
    LABELS,
    NOTHING,
    VALUES,
    check_label_list,
    join_labels,
    no_target,
    parse_values,
)
from edge_tcur_runtime.errors import DataError, FileFormatError
from edge_tcur_runtime.formats.schema import nearest, parse_json

# What people call these columns elsewhere. Only suggested, never taken without being asked for.
_TEXT_NAMES = ("text", "sentence", "utterance", "query", "question", "content", "message", "review")
_LABEL_NAMES = ("label", "category", "class", "intent", "target", "sentiment", "y")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read, how targets stand in them, and whether every row must have one.

    Attributes:
        text: of the text.
        targets: of the targets: one, several numbers (`VALUES`), or none (`NOTHING`).
        reads: see `edge_tcur_runtime.data.targets`.
        required: refuse rows without a target.
    """

    text: str
    targets: tuple[str, ...]
    reads: str
    required: bool


@dataclass(frozen=True)
class TextRows:
    """What a reader found: one entry per row.

    Attributes:
        labels: texts of labels; None unless every row has one.
        values: numbers f32 [rows, columns]; None unless every row has them.
    """

    samples: tuple[str, ...]
    labels: tuple[str, ...] | None
    values: np.ndarray | None
    places: tuple[str, ...]


class _Lines(Iterator[str]):
    """Decoded lines of a file, bounded per record and in total, counted from 1."""

    def __init__(self, file: BinaryIO, path: Path | str, limits: DataLimits) -> None:
        self._file, self._path, self._limits = file, path, limits
        self.number = 0
        self._total = 0
        self.begin_record()

    def begin_record(self) -> None:
        """The next line starts a record: a CSV row may go on over several lines."""
        self.record_start = self.number + 1
        self._record_bytes = 0

    def where(self) -> str:
        return f"{self._path}:{self.record_start}"

    def __next__(self) -> str:
        raw = self._file.readline(self._limits.line_bytes + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        self._record_bytes += len(raw)
        self._total += len(raw)
        if self._record_bytes > self._limits.line_bytes:
            raise DataError(
                f"a line or record of more than {self._limits.line_bytes} bytes",
                where=self.where(),
                hint='shorten the text; in a CSV file also look for a " that is not closed',
            )
        if self._total > self._limits.decoded_bytes:
            raise DataError(
                f"the file has more than {self._limits.decoded_bytes} bytes",
                where=f"{self._path}:{self.number}",
                hint="split it into smaller files",
            )
        if self.number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line",
                where=f"{self._path}:{self.number}",
                hint="save the file as UTF-8",
            ) from error


class _Rows:
    """Collects checked rows."""

    def __init__(self, path: Path, columns: Columns, limits: DataLimits) -> None:
        self._path, self._columns, self._limits = path, columns, limits
        self._samples: list[str] = []
        self._labels: list[str] = []
        self._values: list[tuple[float, ...]] = []
        self._names: dict[str, str] = {}  # one string per class, however many rows carry it
        self._places: list[str] = []

    def add(self, where: str, text: str | None, cells: Sequence[str | None] | None) -> None:
        """A row; `cells` are those of the target's columns, None where the file has no such columns."""
        if len(self._samples) >= self._limits.samples:
            raise DataError(
                f"more than {self._limits.samples} rows", where=where, hint="split the file into smaller ones"
            )
        self._samples.append(_require_text(text, self._columns.text, where))
        self._places.append(where)
        if self._columns.reads == NOTHING or cells is None:
            return
        if self._columns.reads == VALUES:
            if self._columns.required or any(cell and cell.strip() for cell in cells):
                self._values.append(parse_values(cells, self._columns.targets, where))
            return
        (label,) = cells
        if self._columns.reads == LABELS:
            label = check_label_list(label or "", where)
        if label is not None and (label.strip() or self._columns.reads == LABELS):
            self._labels.append(self._names.setdefault(label, label))
        elif self._columns.required:
            raise no_target(self._columns.targets[0], where)

    def finish(self) -> TextRows:
        if not self._samples:
            raise DataError(
                "the data set is empty", where=str(self._path), hint="add at least one row of data"
            )
        count = len(self._samples)
        return TextRows(
            samples=tuple(self._samples),
            labels=tuple(self._labels) if len(self._labels) == count else None,
            values=np.array(self._values, np.float32) if len(self._values) == count else None,
            places=tuple(self._places),
        )


def read_csv(path: Path, columns: Columns, limits: DataLimits) -> TextRows:
    """Reads a CSV file (RFC 4180, UTF-8 with or without BOM, comma, header row).

    Blank lines are skipped; a quoted field may hold line breaks, and the row is then known by its
    first line.

    Raises:
        DataError: unreadable, not UTF-8, malformed, a missing column, a row without text or label,
            no row at all, or over a limit.
    """
    # csv's own bound (131,072 characters) is the process's, not the reader's. It is raised and not
    # restored, because another thread may be reading; our line bound is the one that holds.
    csv.field_size_limit(max(csv.field_size_limit(), limits.line_bytes))

    def read(lines: _Lines, rows: _Rows) -> None:
        records = _csv_records(lines)
        where, header = next(records, (f"{path}:1", []))
        if not header:
            raise DataError("the data set is empty", where=where, hint="add a header row and rows of data")
        text_at = _column_index(header, columns.text, where, _missing_text)
        targets_at = None
        if columns.required or set(columns.targets) <= set(header):
            targets_at = [_column_index(header, name, where, _missing_label) for name in columns.targets]
        for where, row in records:
            if len(row) != len(header):
                raise DataError(
                    f"the row has {len(row)} fields; the header has {len(header)}",
                    where=where,
                    hint='put a field that holds a comma between "quotes"',
                )
            rows.add(where, row[text_at], None if targets_at is None else [row[at] for at in targets_at])

    return _read_lines(path, columns, limits, read)


def read_jsonl(path: Path, columns: Columns, limits: DataLimits) -> TextRows:
    """Reads a JSON Lines file: one object a line, in UTF-8; blank lines are skipped.

    The text must be a string; the label a string or an integer, several labels also a list of them, a value
    a number. Other keys are ignored.

    Raises:
        DataError: as for `read_csv`.
    """

    def read(lines: _Lines, rows: _Rows) -> None:
        for line in lines:
            where = lines.where()
            lines.begin_record()
            if line.strip():
                rows.add(where, *_parse_object(line, columns, where))

    return _read_lines(path, columns, limits, read)


def stream_jsonl(
    file: BinaryIO, name: str, text_column: str, limits: DataLimits = DEFAULT_LIMITS
) -> Iterator[tuple[int, str]]:
    """The texts of JSON Lines, one at a time as they come, each with the number of its line (from 1).

    As `read_jsonl` without targets; the bound of a line holds, those of a whole file do not.

    Args:
        file: open for reading.
        name: of the file, for messages.

    Raises:
        DataError: a line that is not UTF-8, not an object, too long or without text; or reading fails.
    """
    columns = Columns(text_column, (), NOTHING, required=False)
    lines = _Lines(file, name, replace(limits, decoded_bytes=sys.maxsize))
    try:
        for line in lines:
            where = lines.where()
            lines.begin_record()
            if line.strip():
                text, _ = _parse_object(line, columns, where)
                yield lines.number, _require_text(text, text_column, where)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=f"{name}:{lines.number + 1}") from error


def _require_text(text: str | None, column: str, where: str) -> str:
    if text is None or not text.strip():
        raise DataError(
            f"the row has no text in the column {column!r}",
            where=where,
            hint="remove the row, or fill the column in",
        )
    return text


def _read_lines(
    path: Path, columns: Columns, limits: DataLimits, read: Callable[[_Lines, _Rows], None]
) -> TextRows:
    rows = _Rows(path, columns, limits)
    try:
        with path.open("rb") as file:
            read(_Lines(file, path, limits), rows)
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}", where=str(path), hint="check the path and its permissions"
        ) from error
    return rows.finish()


def _csv_records(lines: _Lines) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_record()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"malformed CSV: {error}",
                where=lines.where(),
                hint='quote a field with " and write a quotation mark inside it twice: ""',
            ) from error
        if row:
            yield lines.where(), row


def _column_index(
    header: Sequence[str], name: str, where: str, missing: Callable[[str, Sequence[str], str], DataError]
) -> int:
    if name not in header:
        raise missing(name, header, where)
    if header.count(name) > 1:
        raise DataError(f"the column {name!r} appears twice", where=where, hint="rename or remove one")
    return header.index(name)


def _parse_object(line: str, columns: Columns, where: str) -> tuple[str | None, list[str | None] | None]:
    try:
        document = parse_json(line.encode("utf-8"), where)
    except FileFormatError as error:
        raise DataError(error.message, where=where, hint="write one JSON object per line") from error
    keys = list(document)
    if columns.text not in document:
        raise _missing_text(columns.text, keys, where)
    missing = [name for name in columns.targets if name not in document]
    if missing and columns.required:
        raise _missing_label(missing[0], keys, where)
    cells = (
        None if missing else [_cell(document[name], name, columns.reads, where) for name in columns.targets]
    )
    return _checked_string(document[columns.text], columns.text, "a string", where), cells


def _cell(value: object, name: str, reads: str, where: str) -> str | None:
    """A target as a CSV file would hold it."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if reads == VALUES:
        if value is not None and not plain:
            raise DataError(
                f"{name!r} must be a number, not {type(value).__name__}",
                where=where,
                hint='write the number without "quotes"',
            )
        return None if value is None else repr(value)
    if reads == LABELS and isinstance(value, list):
        return join_labels([_cell(item, name, LABEL, where) or "" for item in value], where)
    if isinstance(value, int) and plain:
        return str(value)
    expected = "a string or an integer" + (", or a list of them" if reads == LABELS else "")
    return _checked_string(value, name, expected, where)


def _checked_string(value: object, name: str, expected: str, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{name!r} must be {expected}, not {type(value).__name__}",
            where=where,
            hint='write the value between "quotes"',
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name!r} holds half of a surrogate pair, {value[error.start]!a}, which is no character",
            where=where,
            hint="write the character itself, or both halves of its escape",
        ) from error
    return value


def _missing_text(name: str, present: Sequence[str], where: str) -> DataError:
    return _missing_column(name, present, where, "--text-column", _TEXT_NAMES)


def _missing_label(name: str, present: Sequence[str], where: str) -> DataError:
    return _missing_column(name, present, where, "--label-column", _LABEL_NAMES)


def _missing_column(
    name: str, present: Sequence[str], where: str, option: str, usual: Sequence[str]
) -> DataError:
    guess = nearest(name, present) or next((column for column in usual if column in present), None)
    if guess is not None:
        hint = f"did you mean {option} {guess}?"
    elif len(present) == 1 and (";" in present[0] or "\t" in present[0]):
        hint = "separate the columns with commas"
    else:
        hint = f"name the column with {option}"
    columns = ", ".join(repr(column) for column in present) or "none"
    return DataError(f"there is no column {name!r}; the columns are {columns}", where=where, hint=hint)
