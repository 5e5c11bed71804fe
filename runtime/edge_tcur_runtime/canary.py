"""The canary of a bundle: fixed inputs, and what torch answered to them when the bundle was written.

A device runs them to see that its ONNX Runtime computes what was exported, and that an adapter is really
applied: ONNX Runtime gives the base's answers without a word where the factors do not arrive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from edge_tcur_runtime.errors import BudgetError, FileFormatError
from edge_tcur_runtime.formats.bundle import Manifest
from edge_tcur_runtime.formats.content import read_content
from edge_tcur_runtime.formats.digest import digest_state

TOLERANCE = 1e-2  # of the largest answer: processors differ by 1e-5, GPUs and half precision by more
NOT_FINITE = "NaN or infinity"  # what `departs` says of it
_NO_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate memory")  # as ONNX Runtime says it
MAX_BYTES = 64 * 2**20
_INPUT, _BASE, _ADAPTER = "input.", "output.base", "output.adapter"
_PLACES, _SIZES = "output.places", "output.sizes"


@dataclass(frozen=True)
class Canary:
    """Fixed inputs and expected outputs.

    Attributes:
        inputs: the model's inputs by name.
        base, adapter: torch's outputs f32 of the base, and of the adapter that came with the bundle; None
            where the file has none.
        places: int64 [m], where `base` and `adapter`, f32 [samples, m], hold a part of the outputs: places in
            each sample's outputs, flat; None where they hold all.
        sizes: of the whole outputs, samples first; empty where `places` is None.
    """

    inputs: dict[str, np.ndarray]
    base: np.ndarray | None
    adapter: np.ndarray | None
    places: np.ndarray | None = None
    sizes: tuple[int, ...] = ()

    def part(self, outputs: np.ndarray) -> np.ndarray:
        """The part of a model's outputs that `base` and `adapter` hold; of another size, all of them."""
        if self.places is None or outputs.shape != self.sizes:
            return outputs
        found: np.ndarray = outputs.reshape(len(outputs), -1)[:, self.places]
        return found

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the inputs."""
        return digest_state(self.inputs)


def read_canary(root: Path, manifest: Manifest) -> Canary | None:
    """The canary of the bundle at `root`; None where it has none.

    Raises:
        BadInputError: it cannot be read.
        IntegrityError: it is not what the manifest promises.
        FileFormatError: not a safetensors file, without inputs, or with places that contradict its outputs.
    """
    if manifest.canary is None:
        return None
    path = root / manifest.canary
    raw = read_content(root, manifest.files, manifest.canary, MAX_BYTES)
    try:
        tensors = safetensors.numpy.load(raw)
    except (safetensors.SafetensorError, ValueError) as error:
        raise FileFormatError(f"not a safetensors file: {error}", where=str(path)) from error
    inputs = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
    if not inputs:
        raise FileFormatError("the canary has no inputs", where=str(path))
    canary = Canary(inputs, tensors.get(_BASE), tensors.get(_ADAPTER))
    if _PLACES not in tensors and _SIZES not in tensors:
        return canary
    return _in_part(canary, tensors.get(_PLACES), tensors.get(_SIZES), str(path))


def _in_part(canary: Canary, places: np.ndarray | None, sizes: np.ndarray | None, where: str) -> Canary:
    """The canary with the places that its outputs are from."""
    for name, value in ((_PLACES, places), (_SIZES, sizes)):
        if value is None or value.dtype != np.int64 or value.ndim != 1 or not value.size or value.min() < 0:
            raise FileFormatError(f"{name!r} must be int64 [n], 0 or more", where=where)
    assert places is not None
    assert sizes is not None
    whole = tuple(int(size) for size in sizes)
    if places.max() >= math.prod(whole[1:]):
        raise FileFormatError(f"{_PLACES!r} lies outside of outputs of the shape {list(whole)}", where=where)
    for name, outputs in ((_BASE, canary.base), (_ADAPTER, canary.adapter)):
        if outputs is not None and outputs.shape != (whole[0], len(places)):
            raise FileFormatError(
                f"{name!r} has the shape {list(outputs.shape)}; expected {[whole[0], len(places)]}",
                where=where,
            )
    return replace(canary, places=places, sizes=whole)


def departs(found: np.ndarray, expected: np.ndarray) -> str | None:
    """In words, how outputs differ from the expected ones by more than `TOLERANCE`; None where they agree."""
    if found.shape != expected.shape:
        return f"outputs of the shape {list(found.shape)}; expected {list(expected.shape)}"
    if not np.isfinite(found).all():
        return NOT_FINITE
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / scale
    return None if difference <= TOLERANCE else f"outputs that are off by {difference:.1%} of the largest"


def ran_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory is short, and so nothing about the adapter that was tried."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY)


def no_memory() -> BudgetError:
    """The error of a check that ran out of memory."""
    hint = "nothing was changed; run it again when other programs have ended"
    return BudgetError("not enough memory to try the adapter now", hint=hint)
