"""The tables of a bundle that tell what a pass of each training graph takes, without reading the graph.

They are made by an exact walk of the graph's live values (`edge_tcur_export.memory_tables`), on a grid of
samples and tokens. In between, `edge_tcur_runtime.planner` interpolates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.schema import Fields


@dataclass(frozen=True)
class RowTable:
    """A table of the base of which only some rows are read, for example that of the words.

    Attributes:
        bytes: of the whole table.
        row: bytes of a row.
        input: the model input that holds the numbers of the rows.
    """

    bytes: int
    row: int
    input: str


@dataclass(frozen=True)
class GraphTable:
    """What one graph takes.

    Attributes:
        nodes: operators that a pass runs.
        base: bytes of `base.bin` that every pass reads.
        rows: tables of which a pass reads some rows.
        values: bytes of values alive at once, inputs included, [length][samples] on the grid.
        work: floating point operations of a pass and those that its memory traffic is worth, the same way.
    """

    nodes: int
    base: int
    rows: tuple[RowTable, ...]
    values: tuple[tuple[int, ...], ...]
    work: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MemoryTables:
    """Tables of all training graphs of a bundle.

    Attributes:
        samples: of a pass, the grid's columns, increasing from 1.
        lengths: tokens of a sample, the grid's rows, increasing: the lengths that batches are padded to;
            a single 0 where the model has no such axis.
        graphs: role -> table.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    graphs: Mapping[str, GraphTable]


def parse_tables(fields: Fields) -> MemoryTables:
    """The field ``memory`` of a manifest.

    Raises:
        FileFormatError: unknown, missing or wrong fields, or a grid that is not increasing.
    """
    fields.only("samples", "lengths", "graphs")
    samples, lengths = fields.sizes("samples"), fields.sizes("lengths")
    for key, grid in (("samples", samples), ("lengths", lengths)):
        if not grid or sorted(set(grid)) != list(grid):
            raise FileFormatError(f"the field {key!r} must hold increasing sizes", where=fields.where)
    if samples[0] != 1 or len(samples) < 2:
        raise FileFormatError("the field 'samples' must begin with 1 and go on", where=fields.where)
    graphs = {
        role: _parse_graph(child, len(lengths), len(samples))
        for role, child in fields.children("graphs").items()
    }
    return MemoryTables(samples, lengths, graphs)


def _parse_graph(fields: Fields, rows: int, columns: int) -> GraphTable:
    fields.only("nodes", "base", "rows", "values", "work")
    return GraphTable(
        nodes=fields.integer("nodes", low=1),
        base=fields.integer("base"),
        rows=tuple(_parse_rows(entry, fields.where) for entry in fields.items("rows")),
        values=_grid(fields, "values", rows, columns),
        work=_grid(fields, "work", rows, columns),
    )


def _parse_rows(entry: object, where: str) -> RowTable:
    if not isinstance(entry, dict):
        raise FileFormatError("the field 'rows' must hold objects", where=where)
    fields = Fields(entry, f"{where}: rows").only("bytes", "row", "input")
    return RowTable(fields.integer("bytes", low=1), fields.integer("row", low=1), fields.text("input"))


def _grid(fields: Fields, key: str, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Numbers that grow with the samples."""
    found = fields.items(key)
    holder = Fields({str(place): line for place, line in enumerate(found)}, f"{fields.where}: {key}")
    grid = tuple(holder.sizes(str(place)) for place in range(len(found)))
    if len(grid) != rows or any(len(line) != columns or list(line) != sorted(line) for line in grid):
        raise FileFormatError(
            f"the field {key!r} must hold {rows} lines of {columns} growing numbers", where=fields.where
        )
    return grid
