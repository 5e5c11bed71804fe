"""ONNX Runtime Training 1.19.2, without torch: its Module computes gradients of the factors.

The optimiser is ours (`edge_tcur_runtime.optimizer`) on every engine, so that all of them take the
same steps; the bundle's ``optimizer.onnx`` serves native apps that use ONNX Runtime's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_tcur_runtime.engines.engine import (
    StepResult,
    forward_outputs,
    no_training_interface,
    require_graph,
    require_onnxruntime,
    trained_names,
)
from edge_tcur_runtime.engines.providers import ON_CPU, Placement
from edge_tcur_runtime.engines.readable import require_readable
from edge_tcur_runtime.engines.session import (
    cannot_load,
    import_onnxruntime,
    require_names,
    session_options,
)
from edge_tcur_runtime.engines.verified import require_unchanged
from edge_tcur_runtime.errors import IncompatibleError
from edge_tcur_runtime.formats.bundle import BASE_FILE, Bundle

TARGETS = "labels"


def import_training_api() -> Any:
    """`onnxruntime.training.api`, without torch (see `import_onnxruntime`).

    Raises:
        MissingEngineError: the installed ONNX Runtime has no training interface.
    """
    installed = require_onnxruntime()
    if not installed.training:
        raise no_training_interface(installed)
    import_onnxruntime()
    try:
        from onnxruntime.training import api
    except ImportError as error:
        raise no_training_interface(installed) from error
    return api


class OrtTrainingEngine:
    """Runs ``train.onnx`` with a checkpoint that holds the factors alone."""

    name = "ort-training"

    def __init__(self, bundle: Bundle, *, threads: int = 0, placement: Placement = ON_CPU) -> None:
        train, checkpoint = (require_graph(bundle, role, self.name) for role in ("train", "checkpoint"))
        api, options = import_training_api(), session_options(threads)
        require_readable(bundle, train)
        reading = checkpoint
        try:
            self._state = api.CheckpointState.load_checkpoint(str(checkpoint))
            reading = train
            device = placement.provider.name  # "cpu", or "cuda" in the CUDA build
            self._module = api.Module(str(train), self._state, device=device, session_options=options)
        except Exception as error:
            raise cannot_load(error, reading) from error
        names = (train.name, checkpoint.name, BASE_FILE)  # the library takes no bytes
        require_unchanged(bundle.root, bundle.manifest.files, *names)
        self._inputs = self._module.input_names()
        self._parameters = [name for name, _ in self._state.parameters]
        self._outputs = self._module.output_names()
        require_names(train, "output", forward_outputs(bundle, self._outputs), self._outputs)
        require_names(train, "input", (*bundle.manifest.inputs, TARGETS), self._inputs)
        require_names(checkpoint, "parameter", trained_names(bundle), self._parameters)

    def step(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        """See `TrainingEngine.step`.

        Raises:
            IncompatibleError: a core of another rank than the bundle was exported with: the shapes of
                ONNX Runtime Training's parameters are fixed.
        """
        for name in self._parameters:
            parameter = self._state.parameters[name]
            if parameter.data.shape != feeds[name].shape:
                raise IncompatibleError(
                    f"{name} has shape {feeds[name].shape}; this bundle's training graph is for "
                    f"{parameter.data.shape}",
                    hint="use --engine ort-step, which trains any rank, or export a bundle from that run",
                )
            parameter.data = np.asarray(feeds[name], order="C")
        fed = {**inputs, TARGETS: targets, **feeds}
        self._module.lazy_reset_grad()
        values = self._module(*(np.asarray(fed[name], order="C") for name in self._inputs))
        result = dict(zip(self._outputs, values, strict=True))
        gradients = {name: self._state.parameters[name].grad for name in self._parameters}
        metric = float(result["metric"]) if "metric" in result else None
        return StepResult(float(result["loss"]), result["logits"], gradients, metric)
