"""What quantising a base changed, measured: the run's own held-out samples, the canary's outputs, each
weight, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_tcur.data import PreparedData, prepare
from edge_tcur.models import Base
from edge_tcur.tasks import find_task
from edge_tcur.training.loop import score_model
from edge_tcur.training.run import Run
from edge_tcur.training.train import read_data
from edge_tcur_export.cases import adapted, make_canary
from edge_tcur_export.parity import distance
from edge_tcur_export.precision import QuantizedBase, quantize_base
from edge_tcur_export.quantized_graph import SCALES
from edge_tcur_export.trace import stored_weight
from edge_tcur_runtime.data import split
from edge_tcur_runtime.errors import BadInputError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.weights import FP32

_NO_FILE = "the run's data file is not there"
_OTHER_DATA = "the run's data file is not what it was trained on"


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising changed.

    Attributes:
        precision: out of `PRECISIONS`.
        base_bytes_fp32: what ``base.bin`` would have with the same weights in float32.
        base_bytes: what it has.
        relative_errors: quantised parameter -> norm of its change over its norm.
        output_change: ``base`` and ``adapter`` -> largest change of the canary's outputs, relative to the
            largest output.
        accuracy: of the adapter on the run's held-out samples, ``fp32`` and under the precision, 0 to 1,
            and ``samples``; None where they could not be scored, and `note` says why.
    """

    precision: str = FP32
    base_bytes_fp32: int = 0
    base_bytes: int = 0
    relative_errors: Mapping[str, float] = field(default_factory=dict)
    output_change: Mapping[str, float] = field(default_factory=dict)
    accuracy: Mapping[str, float] | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any] | None:
        """JSON values; None of a float32 bundle, where nothing changed."""
        return None if self.precision == FP32 else asdict(self)

    def worst(self) -> tuple[str, float]:
        """The weight with the largest relative error."""
        return max(self.relative_errors.items(), key=lambda item: item[1])


class Quantization:
    """Quantises a base in place and measures what that changes.

    Args:
        base, run, adapter: a run and its parts.
        work: directory of the tokenizer.
        precision: out of `PRECISIONS`; with ``fp32`` nothing is changed or measured.

    Raises:
        ExportError: the base cannot be quantised.
    """

    def __init__(self, base: Base, run: Run, adapter: Adapter, work: Path, precision: str) -> None:
        trained = base.extra_parameters(run.config.method().modules_to_save)
        if precision == FP32:
            self.base = QuantizedBase()
            return
        held_out, self._note = held_out_samples(base, run)
        before, canary = _score(base, run, adapter, held_out), make_canary(base, run, adapter, work)
        self.base = quantize_base(base, precision, trained)
        after, changed = _score(base, run, adapter, held_out), make_canary(base, run, adapter, work)
        self._changes = {
            name: distance(changed[f"output.{name}"], canary[f"output.{name}"])
            for name in ("base", "adapter")
        }
        self._accuracy = None
        if before is not None and after is not None and held_out is not None:
            self._accuracy = {"fp32": before, precision: after, "samples": float(len(held_out))}

    def report(self, offsets: Mapping[str, int], base_bytes: int) -> QuantizationReport:
        """The report, of the weights that came into the graphs.

        Args:
            offsets, base_bytes: of `BaseFile`.
        """
        if self.base.precision == FP32:
            return QuantizationReport()
        used = {n: w for n, w in self.base.weights.items() if _stored(n, offsets)}
        saved = sum(4 * weight.values.size - weight.nbytes for weight in used.values())
        errors = {name: self.base.errors[name] for name in used}
        return QuantizationReport(
            self.base.precision,
            base_bytes + saved,
            base_bytes,
            errors,
            self._changes,
            self._accuracy,
            self._note,
        )


def _stored(parameter: str, offsets: Mapping[str, int]) -> bool:
    return any(name + SCALES in offsets for name in stored_weight(parameter))


def _score(base: Base, run: Run, adapter: Adapter, data: PreparedData | None) -> float | None:
    if data is None:
        return None
    with adapted(base, run, adapter):
        return score_model(base.model, data, find_task(run.config.task))


def held_out_samples(base: Base, run: Run) -> tuple[PreparedData | None, str]:
    """The samples that the run held out, or why they cannot be had."""
    config, task = run.config, find_task(run.config.task)
    path = config.eval_data or config.data
    if not Path(path).exists():
        return None, _NO_FILE
    try:
        dataset = read_data(path, task, config, base=base)
        if not config.eval_data:
            dataset = split(dataset, config.eval_fraction, config.seed)[1]
        if len(dataset) != run.metrics.get("held_out_samples"):
            return None, _OTHER_DATA
        prepared = prepare(dataset, run.labels, run.preprocessing, run.root, task)
    except BadInputError:
        return None, _OTHER_DATA
    return (prepared, "") if len(prepared) else (None, "the run held no samples out")
