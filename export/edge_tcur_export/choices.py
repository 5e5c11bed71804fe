"""Which base to export for a device's memory: precision x recompute x micro-batch, by a device's own plan.

Peaks are a device's first estimates, of the step graph in each form. A graph is traced once; its forms are
made of copies whose weights are counted, not written. Times are the work of a pass at the speed of one pass
on this machine (`calibrate`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edge_tcur.errors import ExportError
from edge_tcur_export import graph as graphs
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.gemm import write_gemms
from edge_tcur_export.memory_model import LIBRARY_BYTES, input_shapes
from edge_tcur_export.memory_tables import SAMPLES, graph_table
from edge_tcur_export.quantized_graph import WeightTable, dequantize_late
from edge_tcur_export.recompute import recompute_blocks
from edge_tcur_export.trace import TARGETS
from edge_tcur_runtime.errors import EdgeError, IncompatibleError
from edge_tcur_runtime.formats.bundle import BASE_FILE, BundleGroup, InputSpec
from edge_tcur_runtime.formats.memory import GraphTable, MemoryTables
from edge_tcur_runtime.formats.weights import FP32, INT4, INT8
from edge_tcur_runtime.planner import (
    FACTORS,
    RATE,
    Candidate,
    Footprint,
    Load,
    footprint_of,
    make_plan,
    named,
    resident_rows,
    session_bytes,
)

STEP, RECOMPUTE = "step", "step_recompute"
_ENGINE = "ort-step"
# Time of a pass over a float32 base's, measured: dequantising is more than the bytes that it moves.
_SLOWER = {FP32: 1.0, INT8: 1.1, INT4: 1.16}
_SECONDS = 1.0  # that the calibration should take, by the speed of a common core


@dataclass(frozen=True)
class Form:
    """The step graph over a base of one precision.

    Attributes:
        precision: of the base's large weights.
        graph: role, `STEP` or `RECOMPUTE`.
        table: what a pass takes.
        base_bytes: of the file with the frozen tensors that the graph reads.
    """

    precision: str
    graph: str
    table: GraphTable
    base_bytes: int


@dataclass(frozen=True)
class Choice:
    """One way to export and to train.

    Attributes:
        form: precision and graph.
        micro_batch: samples of a pass.
        peak: predicted bytes of the process.
        seconds: of an update, on one thread of this machine; of a common core where it was not measured.
        verdict: why it is taken or not.
    """

    form: Form
    micro_batch: int
    peak: int
    seconds: float
    verdict: str

    @property
    def options(self) -> str:
        """Options of ``edge-tcur export`` that give this form."""
        return f"--precision {self.form.precision}" + (" --recompute" if self.form.graph == RECOMPUTE else "")


@dataclass(frozen=True)
class Choices:
    """All of them, the fastest first, and the one that is taken.

    Attributes:
        rows: all.
        chosen: the fastest that fits; None without a budget, or where nothing fits.
        measured: whether times are of a pass on this machine.
        lacking: what could not be planned for, and why.
    """

    rows: tuple[Choice, ...] = ()
    chosen: Choice | None = None
    measured: bool = False
    lacking: tuple[str, ...] = ()

    @property
    def smallest(self) -> Choice:
        """The one with the lowest peak."""
        return min(self.rows, key=lambda row: row.peak)

    @property
    def named(self) -> int:
        """The budget in MiB that the smallest needs."""
        return named(self.smallest.peak)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; sizes in bytes."""
        return {
            "chosen": None if self.chosen is None else _as_dict(self.chosen),
            "candidates": [_as_dict(row) for row in self.rows],
            "seconds_measured_here": self.measured,
            "smallest_budget_bytes": self.named * 2**20 if self.rows else None,
            "lacking": list(self.lacking),
        }


def _as_dict(row: Choice) -> dict[str, Any]:
    return {
        "precision": row.form.precision,
        "graph": row.form.graph,
        "micro_batch": row.micro_batch,
        "base_bytes": row.form.base_bytes,
        "predicted_peak_bytes": row.peak,
        "predicted_step_seconds": row.seconds,
        "export_options": row.options,
        "verdict": row.verdict,
    }


@dataclass
class FormMaker:
    """Makes the forms of a step graph, to be called with it before its weights leave it.

    Attributes:
        tables: precision -> the quantised forms of the base's weights, by what the graph holds.
        inputs: the model's inputs with their named axes; groups: the adapted groups.
        length: tokens that are planned for; 0 where the model has no such axis.
        directory: where graphs are written.
        forms: what was made; lacking: what could not be, and why.
    """

    tables: Mapping[str, WeightTable]
    inputs: Mapping[str, InputSpec]
    groups: Mapping[str, BundleGroup]
    length: int
    directory: Path
    forms: list[Form] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    def __call__(self, model: ir.Model, keep: Collection[str]) -> None:
        """Makes all forms of `model`, which stays as it is; `keep`: see `recompute_blocks`."""
        for precision, table in self.tables.items():
            copy = graphs.clone(model)
            base = BaseFile(self.directory, table, write=False)
            base.externalize(copy)
            self._add(precision, STEP, copy, base.size)
            try:
                recompute_blocks(copy, (*self.inputs, TARGETS), keep)
            except ExportError as error:
                self.lacking = [f"--recompute: {error.message}"]
                continue
            dequantize_late(copy)
            write_gemms(copy)
            self._add(precision, RECOMPUTE, copy, base.size)

    def _add(self, precision: str, graph: str, model: ir.Model, base_bytes: int) -> None:
        ranks = {name: group.rank for name, group in self.groups.items()}
        table = graph_table(graphs.to_proto(model), self.inputs, ranks, (self.length,))
        self.forms.append(Form(precision, graph, table, base_bytes))


def forms_of_bundle(tables: MemoryTables, precision: str, base_bytes: int, length: int) -> list[Form]:
    """The step graphs that a bundle has, from its tables."""
    place = next((row for row, most in enumerate(tables.lengths) if most >= length), len(tables.lengths) - 1)
    return [
        Form(
            precision,
            role,
            replace(table, values=(table.values[place],), work=(table.work[place],)),
            base_bytes,
        )
        for role, table in tables.graphs.items()
        if role in (STEP, RECOMPUTE)
    ]


def choose(
    forms: Sequence[Form],
    batch: int,
    length: int,
    budget: int | None,
    *,
    samples: Sequence[int] = SAMPLES,
    rate: float | None = None,
    lacking: Sequence[str] = (),
) -> Choices:
    """Candidates of all forms, and the fastest whose peak is within the budget.

    Of equals, and of what is faster by less than times are known here, the one with the more exact base is
    taken: quantised bases count as a little slower.

    Args:
        forms: in the order of preference.
        batch, length: samples of an update and tokens of each.
        budget: bytes; None takes nothing.
        samples: grid of the tables.
        rate: seconds an operation of a float32 base, from `calibrate`; None was not measured.
    """
    if not forms:
        return Choices(lacking=tuple(lacking))
    found = [(form, _footprint(form, samples, batch, length, rate or RATE)) for form in forms]
    load = Load(np.full(batch, length, np.int64), batch)
    plan = make_plan([footprint for _, footprint in found], load, budget)

    def row(candidate: Candidate) -> Choice:
        form = next(form for form, footprint in found if footprint is candidate.footprint)
        verdict = candidate.verdict if budget is not None else ""
        return Choice(form, candidate.passes.micro_batch, candidate.peak, candidate.seconds, verdict)

    taken = None if budget is None or plan.chosen is None else row(plan.chosen)
    return Choices(tuple(map(row, plan.candidates)), taken, rate is not None, tuple(lacking))


def _footprint(form: Form, samples: Sequence[int], batch: int, length: int, rate: float) -> Footprint:
    table = form.table
    held = LIBRARY_BYTES + session_bytes(form.graph, table.nodes) + table.base + _rows(table, batch, length)
    tables = MemoryTables(tuple(samples), (length,), {form.graph: table})
    way = (_ENGINE, form.graph, 1)
    return footprint_of(tables, way, held, FACTORS[form.graph], rate=rate * _SLOWER[form.precision])


def _rows(table: GraphTable, batch: int, length: int) -> int:
    """Bytes of tables that the samples of an update make resident, each token another row."""
    picked = {
        rows.input: np.unique(np.linspace(0, rows.bytes // rows.row - 1, batch * max(1, length)).astype(int))
        for rows in table.rows
    }
    return resident_rows(table.rows, picked)


# --- the speed of this machine ---------------------------------------------------------------------------


def calibrate(
    path: Path,
    form: Form,
    inputs: Mapping[str, InputSpec],
    groups: Mapping[str, BundleGroup],
    length: int,
    samples: Sequence[int] = SAMPLES,
) -> float | None:
    """Seconds an operation of a float32 base, from a pass of a step graph on one thread of this machine.

    What is fed is made up: the time of a product does not depend on it.

    Args:
        path: of a plain step graph, beside its ``base.bin``, which may be a file of zeros.
        form: its form.

    Returns:
        None where ONNX Runtime is not installed, or cannot run the graph.
    """
    from edge_tcur_runtime.engines.session import open_session

    footprint = _footprint(form, samples, 1, length, RATE)
    counts = [count for count in samples if footprint.seconds(count, length) <= _SECONDS]
    count = max(counts, default=1)
    try:
        session = open_session(path, threads=1)
        seconds = _time(session, dict(_feeds(path, inputs, groups, count, length)))
    except EdgeError:  # the plan does without times
        return None
    return seconds / footprint.work(count, length) / _SLOWER[form.precision]


def _time(session: Any, feeds: Mapping[str, np.ndarray]) -> float:
    """Seconds of a second pass."""
    try:
        session.run(None, feeds)
        started = time.perf_counter()
        session.run(None, feeds)
    except Exception as error:  # ONNX Runtime's own errors share no other class
        raise IncompatibleError(str(error)) from error
    return time.perf_counter() - started


def _feeds(
    path: Path,
    inputs: Mapping[str, InputSpec],
    groups: Mapping[str, BundleGroup],
    samples: int,
    length: int,
) -> Iterator[tuple[str, np.ndarray]]:
    model = onnx.load(str(path), load_external_data=False)
    ranks = {name: group.rank for name, group in groups.items()}
    shapes = input_shapes(model, inputs, samples, length, ranks)
    for value in model.graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        fill = 1 if "mask" in value.name or np.issubdtype(kind, np.floating) else 0
        yield value.name, np.full(shapes[value.name], fill, kind)


def stand_in(directory: Path, size: int) -> None:
    """A ``base.bin`` of zeros, of which no byte is on the disk."""
    with (directory / BASE_FILE).open("wb") as file:
        file.truncate(size)
