"""The step graph on any ONNX Runtime: batch and factors in, loss and gradients out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_tcur_runtime.engines.engine import (
    StepResult,
    forward_outputs,
    require_graph,
    trained_names,
)
from edge_tcur_runtime.engines.providers import ON_CPU, Placement
from edge_tcur_runtime.engines.readable import require_readable
from edge_tcur_runtime.engines.session import open_session, require_names
from edge_tcur_runtime.formats.bundle import Bundle

TARGETS = "labels"
_SUFFIX = ".grad"
_NONE = np.empty(0, np.float32)  # outputs, of a graph that does not give them


class OrtStepEngine:
    """Runs a step graph (role ``step`` or one of `STEP_VARIANTS`): standard operators, any provider."""

    name = "ort-step"

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, graph: str = "step", placement: Placement = ON_CPU
    ) -> None:
        path = require_graph(bundle, graph, self.name)
        require_readable(bundle, path)
        # What is recomputed must wait for the backward pass; ONNX Runtime's own order suits the others, whose
        # quantised weights stand first in the file.
        in_order = graph == "step_recompute"
        files = bundle.manifest.files
        # Nodes that ONNX Runtime makes as it optimises come last in that order, and before each of them all
        # of the backward pass that is ready.
        optimized = not in_order or placement != ON_CPU
        self._session = open_session(
            path, threads=threads, files=files, in_order=in_order, placement=placement, optimized=optimized
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {value.name for value in self._session.get_inputs()}
        gradients = [name + _SUFFIX for name in trained_names(bundle)]
        require_names(path, "output", (*forward_outputs(bundle, self._outputs), *gradients), self._outputs)
        fed = [*bundle.manifest.inputs, TARGETS, *bundle.manifest.factor_names()]
        require_names(path, "input", fed, self._inputs)
        require_names(path, "default for", self._inputs, fed)

    def step(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        """See `TrainingEngine.step`."""
        fed = {**inputs, TARGETS: targets, **feeds}
        values = self._session.run(None, {name: fed[name] for name in self._inputs})
        result = dict(zip(self._outputs, values, strict=True))
        return StepResult(
            float(result["loss"]),
            result.get("logits", _NONE),
            {name.removesuffix(_SUFFIX): value for name, value in result.items() if name.endswith(_SUFFIX)},
            float(result["metric"]) if "metric" in result else None,
        )
