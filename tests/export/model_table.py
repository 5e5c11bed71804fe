"""The table of docs/models.md: read, written and compared. Its cells are made by `zoo.measure` alone."""

from __future__ import annotations

from collections.abc import Mapping

import zoo

PATH = zoo.HERE.parents[1] / "docs" / "models.md"
COLUMNS = ("model", "family", "task", *zoo.COLUMNS, "why not")
UNKNOWN = "?"
_FIRST, _LAST = "<!-- made by tests/export/make_model_table.py -->\n", "<!-- end -->\n"
Rows = dict[str, dict[str, str]]  # model -> column -> "yes", a reason, or UNKNOWN


def read() -> Rows:
    """The rows of the file; models and cells that it lacks are UNKNOWN."""
    rows: Rows = {name: dict.fromkeys(zoo.COLUMNS, UNKNOWN) for name in zoo.MODELS}
    text = PATH.read_text(encoding="utf-8")
    lines = text[text.index(_FIRST) + len(_FIRST) : text.index(_LAST)].splitlines()[2:]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        found = dict(zip(COLUMNS, cells, strict=True))
        reasons = dict(part.split(": ", 1) for part in found["why not"].split("; ") if part)
        if found["model"] in rows:
            row = {column: reasons.get(column, found[column]) for column in zoo.COLUMNS}
            rows[found["model"]] = row
    return rows


def write(rows: Rows) -> None:
    """Puts the rows into the file."""
    text = PATH.read_text(encoding="utf-8")
    start, end = text.index(_FIRST) + len(_FIRST), text.index(_LAST)
    PATH.write_text(text[:start] + render(rows) + text[end:], encoding="utf-8")


def render(rows: Rows) -> str:
    """The table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for name, model in zoo.MODELS.items():
        row = rows[name]
        cells = [row[column] if row[column] in {"yes", UNKNOWN} else "no" for column in zoo.COLUMNS]
        reasons = [
            f"{column}: {clean(row[column])}"
            for column, cell in zip(zoo.COLUMNS, cells, strict=True)
            if cell == "no"
        ]
        lines.append("| " + " | ".join([name, model.family, model.task, *cells, "; ".join(reasons)]) + " |")
    return "\n".join(lines) + "\n"


def clean(reason: str) -> str:
    """A reason as a cell can hold it."""
    return reason.replace("|", "/").replace(";", ",").replace("\n", " ")


def agree(measured: Mapping[str, str], row: Mapping[str, str]) -> bool:
    """Whether what was measured is what the row says."""
    return all(clean(cell) == row[column] for column, cell in measured.items())
