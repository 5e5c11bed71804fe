"""Operators that a target lacks, written in ones that it has; torch.export applies them as it traces.

`BACKWARD`: torch keeps the backward pass of a convolution (and of a few others) as one operator, which has
no ONNX form. `FLAT`: ExecuTorch's portable kernels have convolutions over one and two axes only, so those
over three are made of ones over two. Each is compared with torch's own operator in
tests/export/test_decompositions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.export import ExportedProgram

from edge_tcur_export.quiet import quiet_torch

_aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    *settings: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten.convolution_backward`` by convolutions.

    Args:
        gradient: of the output; `settings` are stride, padding, dilation, transposed, output_padding,
            groups, and which of the gradients of x, weight and bias are wanted.
    """
    stride, padding, dilation, transposed, extra, groups, (on_x, on_weight, on_bias) = settings
    sizes = (stride, padding, dilation)
    axes = (0, *range(2, gradient.dim()))
    return (
        _on_input(gradient, x, weight, sizes, extra if transposed else None, groups) if on_x else None,
        _on_weight(gradient, x, weight, sizes, transposed, groups) if on_weight else None,
        gradient.sum(axes) if on_bias and bias_sizes is not None else None,
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    result: Tensor = _aten.convolution(x, weight, bias, *settings)
    return result


_Sizes = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _on_input(
    gradient: Tensor, x: Tensor, weight: Tensor, sizes: _Sizes, extra: Sequence[int] | None, groups: int
) -> Tensor:
    """`extra` is the output padding of a transposed convolution, None of another."""
    stride, padding, dilation = sizes
    if extra is not None:
        none = [0] * len(stride)
        result = _convolve(gradient, weight, None, stride, padding, dilation, False, none, groups)
        for axis, more in enumerate(extra, 2):  # with a dilation it can hold one more place
            result = result.narrow(axis, 0, x.shape[axis]) if more else result
        return result
    # What a stride leaves over at the end was not read: it is the padding of the transposed convolution.
    rest = [
        x.shape[axis + 2]
        - ((gradient.shape[axis + 2] - 1) * stride[axis] - 2 * padding[axis])
        - (dilation[axis] * (weight.shape[axis + 2] - 1) + 1)
        for axis in range(len(stride))
    ]
    return _convolve(gradient, weight, None, stride, padding, dilation, True, rest, groups)


def _on_weight(
    gradient: Tensor, x: Tensor, weight: Tensor, sizes: _Sizes, transposed: bool, groups: int
) -> Tensor:
    """Samples and channels change places: the sum over samples is that of a convolution over channels."""
    stride, padding, dilation = sizes
    moved, still = (gradient, x) if transposed else (x, gradient)
    parts = []
    for one, other in zip(moved.chunk(groups, 1), still.chunk(groups, 1), strict=True):
        part = _convolve(
            one.transpose(0, 1), other.transpose(0, 1), None, dilation, padding, stride, False,
            [0] * len(stride), 1,
        )  # fmt: skip
        for axis in range(2, weight.dim()):
            part = part.narrow(axis, 0, weight.shape[axis])
        parts.append(part.transpose(0, 1))
    return torch.cat(parts) if groups > 1 else parts[0]


def flat_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Any:
    """``aten.convolution`` over depth, height and width by one over height and width; others are left.

    The steps of the kernel along the depth become channels, so that the weight is only seen in another
    shape: no copy of it appears.

    Args:
        settings: stride, padding, dilation, transposed, output_padding, groups.
    """
    if x.dim() != 5:
        return NotImplemented
    flat = _flat_transposed if settings[3] else _flat
    output = flat(x, weight, settings)
    return output if bias is None else output + bias.reshape(-1, 1, 1, 1)


def _two(settings: Sequence[Any]) -> list[Any]:
    """The settings of the convolution over height and width."""
    stride, padding, dilation, transposed, output_padding, groups = settings
    return [stride[1:], padding[1:], dilation[1:], transposed, output_padding[1:], groups]


def _flat(x: Tensor, weight: Tensor, settings: Sequence[Any]) -> Tensor:
    stride, padding, dilation = (values[0] for values in settings[:3])
    steps = weight.shape[2]
    padded = _pad(x, padding, padding)
    depth = (padded.shape[2] - dilation * (steps - 1) - 1) // stride + 1
    taps = [
        padded[:, :, step * dilation : step * dilation + (depth - 1) * stride + 1 : stride]
        for step in range(steps)
    ]
    pictures = torch.stack(taps, 2).permute(0, 3, 1, 2, 4, 5).reshape(-1, x.shape[1] * steps, *x.shape[3:])
    kernel = weight.reshape(weight.shape[0], -1, *weight.shape[3:])
    output = _convolve(pictures, kernel, None, *_two(settings))
    # The batch is named: a -1 would become a quotient that later guards cannot solve.
    return output.reshape(x.shape[0], depth, *output.shape[1:]).transpose(1, 2)


def _flat_transposed(x: Tensor, weight: Tensor, settings: Sequence[Any]) -> Tensor:
    stride, padding, dilation = (values[0] for values in settings[:3])
    extra, groups = settings[4][0], settings[5]
    depth, steps, channels = x.shape[2], weight.shape[2], weight.shape[1] * groups
    pictures = x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])
    kernel = weight.reshape(weight.shape[0], -1, *weight.shape[3:])
    output = _convolve(pictures, kernel, None, *_two(settings))
    parts = output.reshape(x.shape[0], depth, channels, steps, *output.shape[2:]).permute(0, 2, 3, 1, 4, 5)
    if (stride, padding, dilation, extra) == (steps, 0, 1, 0):  # the steps do not overlap
        return parts.transpose(2, 3).reshape(x.shape[0], channels, depth * steps, *output.shape[2:])
    reach = dilation * (steps - 1)
    shifted = [
        _pad(_spread(parts[:, :, step], stride), step * dilation, reach - step * dilation + extra)
        for step in range(steps)
    ]
    whole = shifted[0]
    for other in shifted[1:]:
        whole = whole + other
    return whole[:, :, padding : whole.shape[2] - padding]


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    """Zeros along the depth. Not by ``constant_pad_nd``, which fixes the batch size inside a joint trace."""
    parts = [x.new_zeros((*x.shape[:2], count, *x.shape[3:])) for count in (before, after)]
    kept = [part for part in (parts[0], x, parts[1]) if part.shape[2] > 0]
    return torch.cat(kept, 2) if len(kept) > 1 else x


def _spread(x: Tensor, stride: int) -> Tensor:
    """[b, c, depth, h, w] with ``stride - 1`` zeros between neighbours along the depth."""
    if stride == 1:
        return x
    zeros = x.new_zeros((*x.shape[:3], stride - 1, *x.shape[3:]))
    wide = torch.cat([x.unsqueeze(3), zeros], 3).reshape(*x.shape[:2], x.shape[2] * stride, *x.shape[3:])
    return wide[:, :, : (x.shape[2] - 1) * stride + 1]


_VOLUMES = (_aten.conv3d.default, _aten.conv3d.padding, _aten.conv_transpose3d.input)


def empty_permuted(size: Sequence[int], _: Sequence[int], **options: Any) -> Tensor:
    """``aten.empty_permuted`` by zeros: its values mean nothing; the backward of SiLU asks for its shape."""
    zeros: Tensor = _aten.full(size, 0, dtype=options.get("dtype"))
    return zeros


def slice_backward(
    gradient: Tensor, sizes: Sequence[int], axis: int, start: int, end: int, step: int
) -> Tensor:
    """``aten.slice_backward`` of neighbours: zeros before and behind. torch's own is a scatter into zeros, in
    ONNX between two transposes of everything."""
    if step != 1:
        spread: Tensor = decomposition_table[_SLICE_BACKWARD](gradient, sizes, axis, start, end, step)
        return spread
    axis, size = axis % len(sizes), sizes[axis]
    before = max(start + size, 0) if start < 0 else start
    if isinstance(before, int) and isinstance(size, int):
        before = min(before, size)
    parts = []
    for count in (before, size - before - gradient.shape[axis]):
        if not isinstance(count, int) or count > 0:
            parts.append(gradient.new_zeros([*sizes[:axis], count, *sizes[axis + 1 :]]))
        parts.append(gradient)
    del parts[-1]
    return torch.cat(parts, axis) if len(parts) > 1 else gradient


_SLICE_BACKWARD = _aten.slice_backward.default
_POOL_BACKWARD = _aten.max_pool2d_with_indices_backward.default
BACKWARD: Table = {
    _aten.convolution_backward.default: convolution_backward,
    _SLICE_BACKWARD: slice_backward,
    _aten.empty_permuted.default: empty_permuted,  # neither ONNX nor ExecuTorch has it
    # By a scatter: ExecuTorch 1.5.1's own kernel gives wrong gradients, and ONNX has none.
    _POOL_BACKWARD: decomposition_table[_POOL_BACKWARD],
}
FLAT: Table = {_aten.convolution.default: flat_convolution}


def flatten_volumes(program: ExportedProgram) -> ExportedProgram:
    """A traced forward program with `FLAT`, where it has convolutions over three axes."""
    if not any(node.target in _VOLUMES for node in program.graph.nodes):
        return program
    table = torch.export.default_decompositions()  # the convolutions have names of their own before them
    table.update(FLAT)  # type: ignore[no-untyped-call]
    with quiet_torch():
        flat: ExportedProgram = program.run_decompositions(table)
    return flat
