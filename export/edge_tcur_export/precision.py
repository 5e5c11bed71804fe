"""The precision of a bundle's base: its large weights quantised in place, before anything is traced, so that
torch computes every case and the canary with what the device computes with.

Linear weights (GPT-2's Conv1D too) become int8 or int4, embedding tables int8 in both. A head that is tied to
a table is that table, and takes the precision of linear weights. Norms, biases, convolutions, small tensors
and what is trained stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from edge_tcur.errors import ExportError
from edge_tcur.method.views import CONV1D, LINEAR, find_view
from edge_tcur.models import Base
from edge_tcur_export.graph import OPSET
from edge_tcur_export.quantize import (
    BLOCK,
    Quantized,
    quantize_int4,
    quantize_int8,
    relative_error,
)
from edge_tcur_export.quantized_graph import INT4_OPSET, SCALES, VALUES, WeightTable
from edge_tcur_export.trace import stored_weight
from edge_tcur_runtime.formats.weights import FP32, INT4, INT8, TensorPlace

_SMALLEST_BYTES = 512  # of a float32 weight that is worth a tensor of scales beside it
_FEWEST_ROWS = 16  # of an embedding table: one of token types is no bytes, and is added to every token
_AXES = {INT8: 1, INT4: 0}  # of a weight [n2, n1]: its outputs have scales, its inputs lie in blocks


@dataclass(frozen=True)
class QuantizedBase:
    """What was quantised.

    Attributes:
        precision: out of `PRECISIONS`.
        weights: parameter name -> its quantised form as the graphs store it.
        errors: parameter name -> `relative_error`.
    """

    precision: str = FP32
    weights: Mapping[str, Quantized] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """The opset of the bundle's graphs."""
        return INT4_OPSET if self.precision == INT4 else OPSET

    def table(self) -> WeightTable:
        """For the pass over the graphs."""
        return WeightTable(self.weights.values())

    def place(self, parameter: str, shape: tuple[int, int], offsets: Mapping[str, int]) -> TensorPlace:
        """Where an adapted weight lies: of a linear layer transposed, of a convolution as it is.

        Args:
            shape: n1 and n2 of its matrix.
            offsets: of `BaseFile`.

        Raises:
            ExportError: it is in none of the graphs.
        """
        name, plain = stored_weight(parameter)
        if name + VALUES in offsets:
            block = BLOCK if self.precision == INT4 else None
            return TensorPlace(
                offsets[name + VALUES], self.precision, shape[::-1], True, offsets[name + SCALES], block
            )
        if name in offsets:
            return TensorPlace(offsets[name], "float32", shape[::-1], True)
        if plain in offsets:
            return TensorPlace(offsets[plain], "float32", shape, False)
        raise ExportError(f"the weight {parameter} did not come out as a tensor of the graph")


def quantize_base(base: Base, precision: str, trained: Collection[str]) -> QuantizedBase:
    """Quantises the base's large weights and puts what they dequantise to into the model.

    `Base.digest` stays that of the float32 base: adapters of it fit.

    Args:
        base: changed in place.
        precision: out of `PRECISIONS`; ``fp32`` changes nothing.
        trained: names of parameters that an adapter carries itself.

    Raises:
        ExportError: a weight is not finite, or the base has none that can be quantised.
    """
    if precision == FP32:
        return QuantizedBase()
    weights, errors = {}, {}
    for name, stored, quantised in _quantise(base, precision, trained):
        weights[name], errors[name] = quantised, relative_error(stored.numpy(), quantised)
        stored.copy_(torch.from_numpy(quantised.dequantize()))
    if not weights:
        raise ExportError(
            "no float32 weight of a linear layer or embedding to quantise", where=base.reference
        )
    return QuantizedBase(precision, weights, errors)


def planned_weights(base: Base, precision: str, trained: Collection[str]) -> WeightTable:
    """What `quantize_base` would make of a base, which stays as it is; for graphs that hold its weights."""
    if precision == FP32:
        return WeightTable(())
    return WeightTable.of(
        (stored.contiguous().numpy(), quantised)
        for _, stored, quantised in _quantise(base, precision, trained)
    )


def _quantise(
    base: Base, precision: str, trained: Collection[str]
) -> Iterator[tuple[str, Tensor, Quantized]]:
    """Name, values in the orientation of the graphs, and quantised form of each large weight.

    Tables first: a head that is tied to one reads what its rows dequantise to.
    """
    quantize_linear = quantize_int8 if precision == INT8 else quantize_int4
    done = set()
    names = {id(value): name for name, value in base.model.named_parameters(remove_duplicate=False)}
    heads = {id(module.weight) for _, module in _linears(base.model, trained)}
    for _, module in (*_tables(base.model, trained), *_linears(base.model, trained)):
        weight = cast("Tensor", module.weight)
        if id(weight) in done:
            continue
        done.add(id(weight))
        name = names[id(weight)]  # of a tied one the last, as in the graphs
        if isinstance(module, nn.Embedding):
            stored = weight.detach()
            if precision == INT4 and id(weight) in heads and weight.shape[1] % BLOCK == 0:
                quantised = quantize_int4(stored.numpy(), 1, name)
            else:
                quantised = quantize_int8(stored.numpy(), 0, name)
        else:
            stored = LINEAR.matrix(module).detach().T if type(module) is nn.Linear else weight.detach()
            quantised = quantize_linear(stored.contiguous().numpy(), _AXES[precision], name)
        yield name, stored, quantised


def _linears(model: nn.Module, trained: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by the name of their weight; those of Int8Linear stay as they are."""
    for name, module in model.named_modules():
        if find_view(module) in (LINEAR, CONV1D) and _is_free(module, f"{name}.weight", trained):
            yield f"{name}.weight", module


def _tables(model: nn.Module, trained: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Embedding tables that their module only reads."""
    for name, module in model.named_modules():
        if type(module) is not nn.Embedding or module.num_embeddings < _FEWEST_ROWS:
            continue
        if module.max_norm is None and _is_free(module, f"{name}.weight", trained):
            yield f"{name}.weight", module


def _is_free(module: nn.Module, name: str, trained: Collection[str]) -> bool:
    weight = cast("Tensor", module.weight)
    return name not in trained and weight.dtype is torch.float32 and weight.nbytes >= _SMALLEST_BYTES
