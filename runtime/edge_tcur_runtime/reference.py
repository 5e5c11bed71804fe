"""The reference set of a bundle: a few samples of the publisher, on which a new adapter must not fall behind.

They are stored as the model takes them (``input.<name>`` and ``targets``), so that a device needs nothing to
read them with, and the manifest's digest covers every bit that is scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import safetensors
import safetensors.numpy

from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.bundle import MAX_REFERENCE_BYTES, Bundle, ReferenceSpec
from edge_tcur_runtime.formats.content import read_content
from edge_tcur_runtime.tasks import DeviceTask, find_device_task

_INPUT, _TARGETS = "input.", "targets"


@dataclass(frozen=True)
class ReferenceSet:
    """Encoded samples.

    Attributes:
        inputs: model inputs by name, first axis n.
        targets: as `edge_tcur_runtime.data.encode_targets` gives them, first axis n.
        task: of the bundle.
        spec: what the bundle's manifest says of them: which answers are the measure, and their scores.
    """

    inputs: Mapping[str, np.ndarray]
    targets: np.ndarray
    task: DeviceTask
    spec: ReferenceSpec

    @property
    def elements(self) -> int:
        """Numbers that one sample feeds to the model."""
        return sum(value[0].size for value in self.inputs.values())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, all padded to the longest, int64 [n]; zeros where samples have no length."""
        length = next((value.shape[1] for value in self._tokens.values()), 0)
        return np.full(self.spec.samples, length, np.int64)

    @cached_property
    def picked(self) -> dict[str, np.ndarray]:
        """Model input -> the numbers in it, each once and sorted, over all samples."""
        return {name: np.unique(value) for name, value in self._tokens.items()}

    @property
    def _tokens(self) -> dict[str, np.ndarray]:
        """The inputs of text: integers [n, tokens]."""
        return {
            name: value for name, value in self.inputs.items() if value.dtype.kind == "i" and value.ndim == 2
        }

    def take(self, indices: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """Model inputs and targets of the samples at `indices`."""
        inputs = {name: value[indices] for name, value in self.inputs.items()}
        return inputs, self.task.batch_targets(self.targets[indices], inputs)

    def forgot(self, scores: tuple[float, float], allowed: float) -> bool:
        """Whether these metric and loss fall behind the reference's by more than is allowed.

        Args:
            allowed: of a share such as accuracy the points (0 to 1) that it may lose; of an error, and of the
                loss where that judges, the part by which it may grow.
        """
        metric, loss = scores
        if not (math.isfinite(metric) and math.isfinite(loss)):
            return True
        if self.task.judged_by_loss:
            return loss > self.spec.loss * (1 + allowed)
        if self.task.metric.larger_is_better:
            return metric < self.spec.score - allowed - 1e-9  # 0.98 is not below 1 - 0.02
        return metric > self.spec.score * (1 + allowed)


def reference_tensors(inputs: Mapping[str, np.ndarray], targets: np.ndarray) -> dict[str, np.ndarray]:
    """The file's tensors."""
    return {**{f"{_INPUT}{name}": value for name, value in inputs.items()}, _TARGETS: targets}


def read_reference(bundle: Bundle) -> ReferenceSet | None:
    """The reference set of an opened bundle, or None where it has none.

    Raises:
        BadInputError: it cannot be read, or is larger than `MAX_REFERENCE_BYTES`.
        IntegrityError: it is not what the manifest promises.
        FileFormatError: no safetensors file, or not the inputs and samples that the manifest promises.
    """
    spec = bundle.manifest.reference
    if spec is None:
        return None
    path = bundle.path(spec.file)
    raw = read_content(bundle.root, bundle.manifest.files, spec.file, MAX_REFERENCE_BYTES)
    try:
        tensors = safetensors.numpy.load(raw)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FileFormatError(f"not a safetensors file: {error}", where=str(path)) from error
    task, expected = find_device_task(bundle.manifest.task), bundle.manifest.inputs
    found = {name: (value.dtype.name, len(value.shape), value.shape[:1]) for name, value in tensors.items()}
    wanted = {
        f"{_INPUT}{name}": (place.dtype, len(place.shape), (spec.samples,))
        for name, place in expected.items()
    }
    targets = tensors.get(_TARGETS, np.empty(0))
    wanted[_TARGETS] = (task.target_dtype, targets.ndim, (spec.samples,))
    if found != wanted:
        raise FileFormatError("its tensors are not what the manifest says", where=str(path))
    return ReferenceSet({name: tensors[f"{_INPUT}{name}"] for name in expected}, targets, task, spec)
