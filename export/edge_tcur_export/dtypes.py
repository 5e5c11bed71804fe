"""A base in bfloat16, float16 or float64 is exported in float32, which is what the graphs compute in."""

from __future__ import annotations

from collections import Counter

import torch

from edge_tcur.errors import ExportError
from edge_tcur.models import Base
from edge_tcur.models.base import example_inputs


def to_float32(base: Base) -> dict[str, int]:
    """Converts the base's floating-point weights and buffers, in place; 16-bit ones exactly.

    `Base.digest` stays that of the base as it was loaded: adapters of it fit.

    Returns:
        dtype -> number of tensors that were converted; empty where all are float32 already.

    Raises:
        ExportError: the model does not run on float32 weights, because it casts to a dtype of its own.
    """
    other = {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in (*base.model.named_parameters(), *base.model.named_buffers())
        if value.dtype.is_floating_point and value.dtype is not torch.float32
    }
    if not other:
        return {}
    base.model.float()
    try:
        with torch.no_grad():
            outputs = base.model(**example_inputs(base.inputs, {"batch": 2, "sequence": 8}))
    except Exception as error:
        raise _fixed(base, other, f"it fails: {type(error).__name__}: {error}".splitlines()[0]) from error
    if outputs.dtype is not torch.float32:
        raise _fixed(base, other, f"it answers in {outputs.dtype}")
    return dict(Counter(other.values()))


def _fixed(base: Base, other: dict[str, str], what: str) -> ExportError:
    name, dtype = next(iter(other.items()))
    return ExportError(
        f"graphs are float32; with {len(other)} tensors of the base converted ({name} from {dtype}) {what}",
        where=base.reference,
        hint="in the model, cast to the dtype of a weight (x.to(self.layer.weight.dtype)) or not at all, "
        f"instead of to {dtype}; or train on a float32 base",
    )
