"""The forms in which an adapted layer can be computed. All give the same function and the same gradients.

``gather``        ``y = W x; y += C' mix (W x)[rows]``: the rows of W times x are features of y already, so
                  only r of them are gathered; for slices that no transform couples. Works on whatever
                  computes ``W x``: linear layers, convolutions, quantised layers.
``factored``      ``y = W x + C_flat M R_flat x``.
``materialised``  ``y = (W + dW) x`` with autograd through dW.
``spectral``      the same with the updates of a coupled block computed together, see
                  `edge_tcur.method.spectral`; keeps one dense update a weight.
``merged``        the same product, but the gradient of the core from ``(dY C_flat)^T (X R_flat^T)``: a full
                  gradient of dW [n1, n2] is never built, and W + dW is rebuilt in the backward pass
                  instead of kept.

``gather`` and ``factored`` have first derivatives alone and say so when they are asked for second ones; set
`AdaptedLayer.form` to another for a gradient penalty.

Which one is cheapest depends on tokens, shapes, rank and coupling: `edge_tcur.method.cost`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edge_tcur.method.tproduct import apply_update, dense_update
from edge_tcur.method.views import View, weight_of


@dataclass(frozen=True)
class Slice:
    """The factors of one weight, frozen ones in the frame's coordinates and float32.

    Attributes:
        matrix: gives f32 [m, m] with a gradient: the transposed coupling matrix of the slice (m = p r), or
            of a slice alone the transposed core (m = r).
        rows_t: [n2, m]: R_flat transposed; needed by all forms but ``gather``.
        columns_t: [m, n1]: C_flat transposed.
        rows: int64 [r] for the gather form, or None where the slice has no rows of the base.
        mix_t: [r, r]: what turns raw rows into those of the frame, transposed; for ``gather``.
        bias: [r], the layer's bias at `rows`, or None.
        update: gives the update [n1, n2], computed together with those of its block, or None for a slice
            that stands alone.
    """

    matrix: Callable[[], Tensor]
    rows_t: Callable[[], Tensor]
    columns_t: Tensor
    rows: Tensor | None = None
    mix_t: Tensor | None = None
    bias: Tensor | None = None
    update: Callable[[], Tensor] | None = None

    def dense(self) -> Tensor:
        """The update [n1, n2]."""
        return dense_update(self.rows_t(), self.matrix(), self.columns_t)


class _GatherUpdate(torch.autograd.Function):
    """``z + ((z[rows] - bias) @ mix_t) @ columns_t``; keeps only the r gathered features of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        matrix_t: Tensor,
        mix_t: Tensor,
        rows: Tensor,
        columns_t: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        features = z.index_select(-1, rows).to(matrix_t.dtype)
        if bias is not None:
            features = features - bias
        gathered = features.reshape(-1, len(rows)) @ mix_t
        ctx.save_for_backward(gathered, matrix_t, mix_t, rows, columns_t)
        update = (gathered @ matrix_t) @ columns_t
        return z + update.reshape(z.shape).to(z.dtype)

    @staticmethod
    @once_differentiable  # what is kept is no input: a second derivative would come out wrong
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient: Tensor = gradients[0]
        gathered, matrix_t, mix_t, rows, columns_t = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1]).to(matrix_t.dtype)
        back = flat @ columns_t.T  # [tokens, r]
        on_matrix = gathered.T @ back if ctx.needs_input_grad[1] else None
        on_z = None
        if ctx.needs_input_grad[0]:
            on_features = (back @ matrix_t.T) @ mix_t.T
            # A new tensor: autograd may hand the same gradient to another node too.
            on_z = gradient.clone(memory_format=torch.contiguous_format)
            on_z.view(-1, on_z.shape[-1]).index_add_(1, rows, on_features.to(on_z.dtype))
        return on_z, on_matrix, None, None, None, None


class _GatherChannels(torch.autograd.Function):
    """`_GatherUpdate` of features that stand before the places of a picture, z [..., n1, places].

    All products are made in that layout: moving the features to the end and back takes as long as they do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        matrix_t: Tensor,
        mix_t: Tensor,
        rows: Tensor,
        columns_t: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        features = z.index_select(-2, rows).to(matrix_t.dtype)
        if bias is not None:
            features = features - bias[:, None]
        gathered = mix_t.T @ features
        ctx.save_for_backward(gathered, matrix_t, mix_t, rows, columns_t)
        return z + (columns_t.T @ (matrix_t.T @ gathered)).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient: Tensor = gradients[0]
        gathered, matrix_t, mix_t, rows, columns_t = ctx.saved_tensors
        back = columns_t @ gradient.to(matrix_t.dtype)  # [..., r, places]
        on_matrix = None
        if ctx.needs_input_grad[1]:
            on_matrix = (gathered @ back.mT).reshape(-1, *matrix_t.shape).sum(0)
        on_z = None
        if ctx.needs_input_grad[0]:
            on_features = mix_t @ (matrix_t @ back)
            on_z = gradient.clone(memory_format=torch.contiguous_format)
            on_z.index_add_(gradient.dim() - 2, rows, on_features.to(on_z.dtype))
        return on_z, on_matrix, None, None, None, None


class _FactoredLinear(torch.autograd.Function):
    """``x W^T + ((x @ rows_t) @ matrix_t) @ columns_t``; keeps only the m products of each token.

    One function for the layer and its update, so that the two sums of a forward and backward pass are
    made inside matrix products instead of in passes of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix_t: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows_t: Tensor,
        columns_t: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ rows_t
        ctx.save_for_backward(inner, matrix_t, weight, rows_t, columns_t)
        output = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        output.addmm_(inner @ matrix_t, columns_t)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable  # what is kept is no input: a second derivative would come out wrong
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        inner, matrix_t, weight, rows_t, columns_t = ctx.saved_tensors
        gradient: Tensor = gradients[0]
        flat = gradient.reshape(-1, gradient.shape[-1])
        back = flat @ columns_t.T
        on_matrix = inner.T @ back if ctx.needs_input_grad[1] else None
        on_x = None
        if ctx.needs_input_grad[0]:
            on_x = (flat @ weight).addmm_(back @ matrix_t.T, rows_t.T)
            on_x = on_x.view(*gradient.shape[:-1], on_x.shape[-1])
        return on_x, on_matrix, None, None, None, None


class _MergedLinear(torch.autograd.Function):
    """``x (W + dW)^T`` with the projected gradient of the coupling matrix; saves x and the factors only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix_t: Tensor, weight: Tensor, rows_t: Tensor, columns_t: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, matrix_t, weight, rows_t, columns_t)
        return x @ (weight + dense_update(rows_t, matrix_t, columns_t).to(weight.dtype)).T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient: Tensor = gradients[0]
        x, matrix_t, weight, rows_t, columns_t = ctx.saved_tensors
        on_x = on_matrix = None
        if ctx.needs_input_grad[0]:
            on_x = gradient @ (weight + dense_update(rows_t, matrix_t, columns_t).to(weight.dtype))
        if ctx.needs_input_grad[1]:
            inner = x.reshape(-1, x.shape[-1]).to(matrix_t.dtype) @ rows_t
            outer = gradient.reshape(-1, gradient.shape[-1]).to(matrix_t.dtype) @ columns_t.T
            on_matrix = inner.T @ outer
        return on_x, on_matrix, None, None, None


class _UpdatedLinear(torch.autograd.Function):
    """``x (W + dW)^T`` for an update that is kept anyway: the sum is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, update, weight)
        return x @ (weight + update.to(weight.dtype)).T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient: Tensor = gradients[0]
        x, update, weight = ctx.saved_tensors
        on_x = on_update = None
        if ctx.needs_input_grad[0]:
            on_x = gradient @ (weight + update.to(weight.dtype))
        if ctx.needs_input_grad[1]:
            flat = gradient.reshape(-1, gradient.shape[-1])
            on_update = flat.T.to(update.dtype) @ x.reshape(-1, x.shape[-1]).to(update.dtype)
        return on_x, on_update, None


def gather(module: nn.Module, view: View, x: Tensor, part: Slice) -> Tensor:
    """See the module's text; the output features may be any axis."""
    assert part.rows is not None
    assert part.mix_t is not None
    output = cast("Tensor", module(x))
    parts = (part.matrix(), part.mix_t, part.rows, part.columns_t, part.bias)
    if view.axis != -1 and output.is_contiguous():
        places = output.flatten(view.axis + 1)
        result = cast("Tensor", _GatherChannels.apply(places, *parts))  # type: ignore[no-untyped-call]
        return result.view(output.shape)
    moved = output.movedim(view.axis, -1)
    result = cast("Tensor", _GatherUpdate.apply(moved, *parts))  # type: ignore[no-untyped-call]
    return result.movedim(-1, view.axis)


def factored(module: nn.Module, view: View, x: Tensor, part: Slice) -> Tensor:
    """See the module's text; linear layers only."""
    weight, matrix_t = weight_of(module), part.matrix()
    if not (weight.dtype == x.dtype == matrix_t.dtype):  # half precision, int8
        return beside(module, view, x, part)
    bias = cast("Tensor | None", module.bias)
    return cast(
        "Tensor",
        _FactoredLinear.apply(  # type: ignore[no-untyped-call]
            x,
            matrix_t,
            view.matrix(module).detach(),
            None if bias is None else bias.detach(),
            part.rows_t(),
            part.columns_t,
        ),
    )


def materialised(module: nn.Module, view: View, x: Tensor, part: Slice) -> Tensor:
    """See the module's text; any module that has a view."""
    matrix = view.matrix(module).detach()
    return view.call(module, x, matrix + part.dense().to(matrix.dtype))


def spectral(module: nn.Module, view: View, x: Tensor, part: Slice) -> Tensor:
    """See the module's text; linear layers only."""
    assert part.update is not None
    weight = view.matrix(module).detach()
    output = cast("Tensor", _UpdatedLinear.apply(x, part.update(), weight))  # type: ignore[no-untyped-call]
    bias = cast("Tensor | None", module.bias)
    return output if bias is None else output + bias


def merged(module: nn.Module, view: View, x: Tensor, part: Slice) -> Tensor:
    """See the module's text; linear layers only."""
    weight = view.matrix(module).detach()
    output = cast(
        "Tensor",
        _MergedLinear.apply(x, part.matrix(), weight, part.rows_t(), part.columns_t),  # type: ignore[no-untyped-call]
    )
    bias = cast("Tensor | None", module.bias)
    return output if bias is None else output + bias


def beside(module: nn.Module, view: View, x: Tensor, part: Slice) -> Tensor:
    """The module called as it is (hooks included) plus its update of `x`, in torch's own operators."""
    output = cast("Tensor", module(x))
    if view.is_linear:
        matrix_t = part.matrix()
        update = apply_update(x.to(matrix_t.dtype), part.rows_t(), matrix_t, part.columns_t)
    else:
        update = view.call(module, x, part.dense().to(x.dtype), bias=False)
    return output + update.to(output.dtype)


Form = Callable[[nn.Module, View, Tensor, Slice], Tensor]
FORMS: dict[str, Form] = {
    "gather": gather,
    "factored": factored,
    "materialised": materialised,
    "spectral": spectral,
    "merged": merged,
}


def possible_forms(view: View, *, has_rows: bool, in_block: bool = False) -> tuple[str, ...]:
    """The forms that can compute a layer.

    Args:
        view: of the layer's weight.
        has_rows: whether the slice stands alone, with rows of its own base weight.
        in_block: whether it is one of a coupled block, whose updates may be computed together.
    """
    linear = ("factored", "merged", *(("spectral",) if in_block else ())) if view.is_linear else ()
    return (("gather",) if has_rows else ()) + linear + ("materialised",)
