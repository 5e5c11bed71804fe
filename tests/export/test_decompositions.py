"""Operators written in others, against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_export.decompositions import (
    convolution_backward,
    flat_convolution,
    flatten_volumes,
    slice_backward,
)
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import trace_backward

aten = torch.ops.aten


@st.composite
def convolutions(draw, dimensions=(1, 2, 3)):
    """Input, weight and settings of a convolution."""
    axes = draw(st.sampled_from(dimensions))
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 2]))

    def each(low, high):
        return [draw(st.integers(low, high)) for _ in range(axes)]

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = [draw(st.integers(0, min(2, d * (k - 1)))) for k, d in zip(kernel, dilation, strict=True)]
    extra = [draw(st.integers(0, max(s, d) - 1)) if transposed else 0
             for s, d in zip(stride, dilation, strict=True)]  # fmt: skip
    sizes = [d * (k - 1) + 1 + more for k, d, more in zip(kernel, dilation, each(0, 4), strict=True)]
    channels, filters = 2 * draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2))
    shape = (channels, filters // groups) if transposed else (filters, channels // groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(1, 3)), channels, *sizes, generator=generator, dtype=torch.float64)
    weight = torch.randn(*shape, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(filters, generator=generator, dtype=torch.float64)
    return x, weight, bias, (stride, padding, dilation, transposed, extra, groups)


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_the_backward_of_a_convolution(case):
    x, weight, bias, options = case
    gradient = torch.randn_like(aten.convolution(x, weight, bias, *options))
    arguments = (gradient, x, weight, [len(bias)], *options)
    expected = aten.convolution_backward(*arguments, [True, True, True])
    found = convolution_backward(*arguments, [True, True, True])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    only = convolution_backward(*arguments, [True, False, False])
    assert only[1] is only[2] is None
    torch.testing.assert_close(only[0], expected[0], rtol=1e-9, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(-2, 1),
    st.integers(-9, 9),
    st.one_of(st.integers(-9, 9), st.just(2**63 - 1)),
    st.integers(1, 3),
)
def test_the_backward_of_a_slice(axis, start, end, step):
    x = torch.randn(5, 6, dtype=torch.float64)
    size = x.shape[axis]
    first, last, _ = slice(start, end).indices(size)  # what torch's own takes for them
    if first >= last:
        return
    gradient = torch.randn_like(aten.slice(x, axis, start, end, step))
    expected = torch.zeros_like(x)
    aten.slice(expected, axis, start, end, step).copy_(gradient)
    found = slice_backward(gradient, list(x.shape), axis, start, end, step)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("start", [6, 8])
def test_the_backward_of_a_slice_of_nothing_has_the_shape_of_all(start):
    found = slice_backward(torch.zeros(2, 0), [2, 6], 1, start, 2**63 - 1, 1)
    torch.testing.assert_close(found, torch.zeros(2, 6))


@settings(max_examples=80, deadline=None)
@given(convolutions(dimensions=(3,)), st.booleans())
def test_a_convolution_over_three_axes_by_one_over_two(case, biased):
    x, weight, bias, options = case
    arguments = (x, weight, bias if biased else None, *options)
    expected, found = aten.convolution(*arguments), flat_convolution(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axes", [1, 2])
def test_convolutions_over_fewer_axes_are_left(axes):
    x, weight = torch.randn(1, 2, *[4] * axes), torch.randn(3, 2, *[2] * axes)
    options = ([1] * axes, [0] * axes, [1] * axes, False, [0] * axes, 1)
    assert flat_convolution(x, weight, None, *options) is NotImplemented


def test_a_program_over_volumes_is_flattened():
    module = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.ConvTranspose3d(2, 1, 2, stride=2)
    )
    x = torch.randn(3, 1, 4, 4, 4)
    shapes = ({0: torch.export.Dim("batch", max=8)},)
    with quiet_torch():
        traced = torch.export.export(module, (x,), dynamic_shapes=shapes)
    program = flatten_volumes(traced)
    values = [n.meta["val"] for n in program.graph.nodes if n.target == aten.convolution.default]
    assert [value.dim() for value in values] == [4, 4]
    torch.testing.assert_close(program.module()(x[:2]), module(x[:2]), rtol=1e-5, atol=1e-5)
    with quiet_torch():
        flat = torch.export.export(torch.nn.Conv2d(1, 2, 3), (torch.randn(2, 1, 4, 4),))
    assert flatten_volumes(flat) is flat


def test_the_backward_of_silu_asks_for_no_empty_tensor():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.nn.functional.silu(x @ self.weight).mean()

    with quiet_torch():
        traced = torch.export.export(Loss(), (torch.randn(3, 4),))
    names = {str(node.target) for node in trace_backward(traced).graph.nodes}
    assert not [name for name in names if "empty" in name]
