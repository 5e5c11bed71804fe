"""The canary of a bundle: fixed inputs, and what torch answered to them when the bundle was written.

A device runs them to see that its ONNX Runtime computes what was exported, and that an adapter is really
applied: ONNX Runtime gives the base's answers without a word where the factors do not arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.bundle import Manifest
from edge_tcur_runtime.formats.digest import digest_state

TOLERANCE = 1e-2  # of the largest answer: processors differ by 1e-5, GPUs and half precision by more
MAX_BYTES = 64 * 2**20
_INPUT, _BASE, _ADAPTER = "input.", "output.base", "output.adapter"


@dataclass(frozen=True)
class Canary:
    """Fixed inputs and expected outputs.

    Attributes:
        inputs: the model's inputs by name.
        base, adapter: torch's outputs f32 of the base, and of the adapter that came with the bundle; None
            where the file has none.
    """

    inputs: dict[str, np.ndarray]
    base: np.ndarray | None
    adapter: np.ndarray | None

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the inputs."""
        return digest_state(self.inputs)


def read_canary(root: Path, manifest: Manifest) -> Canary | None:
    """The canary of the bundle at `root`; None where it has none.

    Raises:
        BadInputError: it cannot be read.
        FileFormatError: not a safetensors file, or without inputs.
    """
    if manifest.canary is None:
        return None
    path = root / manifest.canary
    try:
        tensors = safetensors.numpy.load(read_bounded(path, MAX_BYTES))
    except (safetensors.SafetensorError, ValueError) as error:
        raise FileFormatError(f"not a safetensors file: {error}", where=str(path)) from error
    inputs = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
    if not inputs:
        raise FileFormatError("the canary has no inputs", where=str(path))
    return Canary(inputs, tensors.get(_BASE), tensors.get(_ADAPTER))


def departs(found: np.ndarray, expected: np.ndarray) -> str | None:
    """In words, how outputs differ from the expected ones by more than `TOLERANCE`; None where they agree."""
    if found.shape != expected.shape:
        return f"outputs of the shape {list(found.shape)}; expected {list(expected.shape)}"
    if not np.isfinite(found).all():
        return "NaN or infinity"
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / scale
    return None if difference <= TOLERANCE else f"outputs that are off by {difference:.1%} of the largest"
