"""How the weight of a module is a matrix [n1, n2], and where its output features are.

A linear layer, GPT-2's Conv1D (a linear layer with its weight transposed) and a convolution, whose
kernel is reshaped to [output channels, input channels * kernel]: the rows of the matrix are output
features in each, which is all that the gather trick (`edge_tcur.method.forms`) needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_tcur.method.quantized import Int8Linear

_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class View:
    """A weight as a matrix.

    Attributes:
        name: of the kind; a view is pickled (a model for another process) as its name.
        matrix: the matrix [n1, n2] of a module's weight (a view where the storage allows).
        restore: from a matrix [n1, n2] to the shape and dtype of the module's weight.
        axis: of the output features in the module's output.
        is_linear: whether the module maps vectors [..., n2] to [..., n1] by the matrix and a bias.
        call: the module with another matrix [n1, n2] in the place of its own; ``bias=False`` leaves its
            bias out.
    """

    name: str
    matrix: Callable[[nn.Module], Tensor]
    restore: Callable[[nn.Module, Tensor], Tensor]
    axis: int
    is_linear: bool
    call: Callable[..., Tensor]

    def __reduce__(self) -> tuple[Callable[[str], View], tuple[str]]:
        return view_of_kind, (self.name,)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of an adaptable module."""
    return cast("Tensor", module.weight)


def _bias(module: nn.Module) -> Tensor | None:
    return cast("Tensor | None", module.bias)


def _call_linear(module: nn.Module, x: Tensor, matrix: Tensor, *, bias: bool = True) -> Tensor:
    return functional.linear(x, matrix, _bias(module) if bias else None)


def _call_convolution(module: nn.Module, x: Tensor, matrix: Tensor, *, bias: bool = True) -> Tensor:
    kernel = matrix.reshape(weight_of(module).shape)
    own = _bias(module) if bias else None
    return cast("Tensor", module._conv_forward(x, kernel, own))  # type: ignore[operator]


LINEAR = View(
    "linear",
    matrix=weight_of,
    restore=lambda module, matrix: matrix.to(weight_of(module).dtype),
    axis=-1,
    is_linear=True,
    call=_call_linear,
)
CONV1D = View(
    "transposed-linear",
    matrix=lambda module: weight_of(module).T,
    restore=lambda module, matrix: matrix.T.to(weight_of(module).dtype),
    axis=-1,
    is_linear=True,
    call=_call_linear,
)
INT8 = View(
    "int8",
    matrix=lambda module: cast("Int8Linear", module).dequantize(),
    restore=lambda _, matrix: matrix,
    axis=-1,
    is_linear=True,
    call=_call_linear,
)


def _convolution(dimensions: int) -> View:
    return View(
        f"convolution-{dimensions}d",
        matrix=lambda module: weight_of(module).flatten(1),
        restore=lambda module, matrix: matrix.reshape(weight_of(module).shape).to(weight_of(module).dtype),
        axis=-1 - dimensions,
        is_linear=False,
        call=_call_convolution,
    )


_CONVOLUTION_VIEWS = {kind: _convolution(dimensions) for kind, dimensions in _CONVOLUTIONS.items()}
_VIEWS = {view.name: view for view in (LINEAR, CONV1D, INT8, *_CONVOLUTION_VIEWS.values())}


def view_of_kind(name: str) -> View:
    """The view of that name."""
    return _VIEWS[name]


def find_view(module: nn.Module) -> View | str:
    """The view of a module's weight, or the reason why it has none.

    Subclasses are left alone: what they do with their weight is not known (`nn.MultiheadAttention`
    reads the weight of its output projection itself and would pass an update by).
    """
    kind = type(module)
    if kind is nn.Linear:
        return LINEAR
    if kind is Int8Linear:
        return INT8
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return CONV1D
    if kind in _CONVOLUTION_VIEWS:
        if cast("nn.Conv2d", module).groups != 1:
            return f"{kind.__name__} with groups: no column reaches all of its outputs"
        return _CONVOLUTION_VIEWS[cast("type[nn.Conv2d]", kind)]
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its packed weights itself; write attention with nn.Linear layers"
    return f"{kind.__name__}, not a linear layer or convolution"


def bias_of(module: nn.Module, rows: Tensor) -> Tensor | None:
    """The bias at these output features, or None."""
    bias = _bias(module)
    return None if bias is None else bias.detach().index_select(0, rows)


def is_finite(module: nn.Module) -> bool:
    """Whether every entry of the weight is a finite number."""
    weight = module.scale if isinstance(module, Int8Linear) else weight_of(module)
    return bool(torch.isfinite(weight).all())


def foreign_kind(value: Tensor) -> str | None:
    """The class of a tensor that is none of torch's plain ones (a quantising library's), or None."""
    return None if type(value) in (Tensor, nn.Parameter) else type(value).__name__
