"""The step graphs of a bundle: the plain one and, where they are asked for, its two cheaper relatives."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from edge_tcur.errors import ExportError
from edge_tcur.method.targets import Group
from edge_tcur.models import Base
from edge_tcur.models.base import example_inputs
from edge_tcur.tasks import Task
from edge_tcur.tasks.task import CausalLm
from edge_tcur_export import vocabulary
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.cases import make_case
from edge_tcur_export.divergence import Source
from edge_tcur_export.gemm import write_gemms
from edge_tcur_export.graph import add_zero_gradients, to_graph
from edge_tcur_export.infer_graph import split_stacks
from edge_tcur_export.last_blocks import adapted_blocks, detached, split_blocks, what_learns
from edge_tcur_export.log_softmax import write_log_softmax
from edge_tcur_export.parity import Case
from edge_tcur_export.picks import pick_by_index
from edge_tcur_export.quantized_graph import dequantize_late
from edge_tcur_export.recompute import block_of, recompute_blocks
from edge_tcur_export.saved import save_graph
from edge_tcur_export.scalars import read_scalars
from edge_tcur_export.settings import ExportSettings
from edge_tcur_export.trace import (
    EXAMPLE_LENGTH,
    TARGETS,
    Example,
    FactorModel,
    Traced,
    trace_forward,
    trace_step,
)
from edge_tcur_runtime.formats.bundle import LastBlocks

STEP = "step.onnx"
RECOMPUTE = "step-recompute.onnx"
LAST = "step-last.onnx"


class StepGraphs:
    """Writes the step graphs of one bundle.

    Args:
        base: as it was loaded, before a `FactorModel` takes it apart.

    Raises:
        ExportError: the base has too few numbered blocks for what `settings` ask.

    Attributes:
        recomputed: how many blocks ``step_recompute`` computes again; None without that graph.
        learning: what learns in ``step_last``; None without that graph.
        cases: what torch computes where the last blocks alone learn.
        sources: role -> what the graph was converted from.
        on_step: called with the plain step graph while it still holds its weights, and the names of what
            `recompute_blocks` keeps; None is not.
    """

    def __init__(
        self, base: Base, groups: tuple[Group, ...], task: Task, settings: ExportSettings, directory: Path
    ) -> None:
        self._base, self._groups, self._task = base, groups, task
        self._settings, self._directory = settings, directory
        if settings.recompute:
            _require_blocks(base)
        self._before: list[str] = []
        if settings.last_blocks:
            length = min(EXAMPLE_LENGTH, int(base.preprocessing.get("max_length", EXAMPLE_LENGTH)))
            inputs = example_inputs(base.inputs, {"batch": 2, "sequence": length})
            self._before, _ = split_blocks(adapted_blocks(base.model, groups, inputs), settings.last_blocks)
        self.recomputed: int | None = None
        self.learning: LastBlocks | None = None
        self.cases: list[Case] = []
        self.sources: dict[str, Source] = {}
        self.on_step: Callable[[ir.Model, Collection[str]], None] | None = None

    def write(self, forward: Traced, example: Example, base_file: BaseFile) -> dict[str, str]:
        """The plain step graph and, where it is asked for, the one that recomputes.

        Returns:
            role -> file name for the manifest.

        Raises:
            ExportError: the model has no backward that can be traced, or none that can be recomputed.
        """
        model = to_graph(trace_step(forward, example))
        self.sources["step"] = Source.of(model, forward.signature.inputs)
        self._write_loss(model)
        split_stacks(model)
        picked = pick_by_index(model)
        if self.on_step is not None:
            self.on_step(model, picked)
        base_file.externalize(model)
        save_graph(model, self._directory / STEP)
        roles = {"step": STEP}
        if self._settings.recompute:
            self.recomputed = len(recompute_blocks(model, (*example.inputs, TARGETS), picked))
            dequantize_late(model)
            write_gemms(model)
            save_graph(model, self._directory / RECOMPUTE)
            roles["step_recompute"] = RECOMPUTE
            self.sources["step_recompute"] = self.sources["step"]
        return roles

    def _write_loss(self, model: ir.Model) -> None:
        """The loss as providers have operators for it, of a large vocabulary in pieces; scalars unspread."""
        read_scalars(model)
        if isinstance(self._task, CausalLm):
            vocabulary.write_token_loss(model, TARGETS, vocabulary.PIECE_BYTES)
        write_log_softmax(model)

    def write_last(
        self, model: FactorModel, example: Example, tests: list[Example], base_file: BaseFile
    ) -> dict[str, str]:
        """The step graph in which the last blocks alone learn, where it is asked for.

        Args:
            tests: what torch is asked for the `cases`.

        Returns:
            role -> file name for the manifest; empty where it is not asked for.

        Raises:
            ExportError: no gradient is left, or it cannot be traced.
        """
        count = self._settings.last_blocks
        if not count:
            return {}
        with detached(model.model, self._before):
            self.learning = what_learns(model, example, self._groups, self._before, count)
            learn = {f"{name}.core" for name, slices in self.learning.slices.items() if slices}
            partial = _without_gradient(example, learn | set(self.learning.extras))
            forward = trace_forward(model, self._base, self._groups, self._task, partial)
            self.cases = [make_case(model, test, partial=True) for test in tests]
        graph = to_graph(trace_step(forward, partial))
        self.sources["step_last"] = Source.of(graph, forward.signature.inputs)
        self._write_loss(graph)
        split_stacks(graph)
        pick_by_index(graph)
        still = [name for name, value in partial.trained().items() if not value.requires_grad]
        add_zero_gradients(graph, still)
        base_file.externalize(graph)
        save_graph(graph, self._directory / LAST)
        return {"step_last": LAST}


def _require_blocks(base: Base) -> None:
    blocks = {block_of(name) for name, _ in base.model.named_parameters()} - {None}
    if len(blocks) < 2:
        raise ExportError(
            "--recompute needs two numbered blocks at least (layers.0, layers.1, ...); "
            f"the model has {len(blocks)}",
            hint="leave --recompute out for this model",
        )


def _without_gradient(example: Example, learn: set[str]) -> Example:
    """The example with gradients for the names in `learn` only."""
    factors = {
        name: parts if f"{name}.core" in learn else (parts[0].detach(), *parts[1:])
        for name, parts in example.factors.items()
    }
    extras = {name: value if name in learn else value.detach() for name, value in example.extras.items()}
    return replace(example, factors=factors, extras=extras)
