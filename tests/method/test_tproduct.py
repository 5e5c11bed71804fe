"""The update against a dense reference: W + C * dU * R with an explicit transform matrix in float64."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.forms import FORMS, possible_forms
from edge_tcur.method.spectral import Spectrum
from edge_tcur.method.tproduct import (
    apply_update,
    coupling_constants,
    coupling_matrix,
    dense_update,
    flatten_columns,
    flatten_rows,
)
from edge_tcur_runtime.frame import build_frame
from edge_tcur_runtime.transform import TRANSFORMS, from_domain, structure, to_domain

SIZES = st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7), st.integers(1, 4))
FRAMES = st.sampled_from(("raw", "orthonormal"))
KINDS = st.sampled_from(TRANSFORMS)
SEEDS = st.integers(0, 2**32 - 1)
# Grouping and coupling of a model of two projections of one shape: the slices of a block by number of layers.
COUPLED = {
    ("projection", "none"): lambda layers: 1,
    ("projection", "all"): lambda layers: layers,
    ("shape", "none"): lambda layers: 1,
    ("shape", "layer"): lambda layers: 2,
    ("shape", "all"): lambda layers: 2 * layers,
    ("layer", "layer"): lambda layers: 2,
}
quick = settings(max_examples=40, derandomize=True)


def transform_matrix(kind, size):
    """The transform along the slices, written out."""
    grid = np.arange(size)
    return {
        "dft": np.exp(-2j * np.pi * np.outer(grid, grid) / size),
        "dct": scipy.fft.dct(np.eye(size), axis=0, norm="ortho"),
        "identity": np.eye(size),
    }[kind]


def product(kind, *factors):
    """The product of stacks [p, m, n] by its definition: transform, multiply by slices, transform back."""
    matrix = transform_matrix(kind, len(factors[0]))
    result = np.einsum("fl,lpq->fpq", matrix, factors[0])
    for factor in factors[1:]:
        result = result @ np.einsum("fl,lqs->fqs", matrix, factor)
    result = np.einsum("lf,fps->lps", np.linalg.inv(matrix), result)
    np.testing.assert_allclose(result.imag, 0, atol=1e-8 * max(1, np.abs(result).max()))
    return result.real


class Layers(nn.Module):
    """Numbered layers with two linear modules of one shape each."""

    def __init__(self, layers, n1, n2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(n2, n1), "o": nn.Linear(n2, n1)}) for _ in range(layers)
        )


def update_of(kit, model, group, config):
    """dU's update of every weight of a group, from what its file says and the dense reference."""
    stack = np.stack(
        [model.get_submodule(name).weight.detach().double().numpy() for name in group.spec.modules]
    )
    core = group.frame.to_raw(group.core.detach().double().numpy())
    factors = group.factors()
    np.testing.assert_allclose(factors.core, core, rtol=1e-6, atol=1e-6 * np.abs(core).max())
    updates = []
    for block in range(factors.blocks):
        part = slice(block * group.spec.size, (block + 1) * group.spec.size)
        columns, rows = stack[part][:, :, factors.cols[block]], stack[part][:, factors.rows[block], :]
        updates.append(product(config.domain, columns, core[part], rows))
    return stack, np.concatenate(updates)


@pytest.mark.parametrize(
    ("axes", "transform"),
    [
        (axes, transform)
        for axes in COUPLED
        for transform in TRANSFORMS
        if axes[1] != "none" or transform == "identity"
    ],
)
@settings(max_examples=10, derandomize=True)
@given(sizes=SIZES, frame=FRAMES, alpha=st.sampled_from((1.0, 0.5)), seed=SEEDS)
def test_every_form_gives_the_dense_reference(kit, sizes, frame, axes, transform, alpha, seed):
    layers, n1, n2, rank = sizes
    (grouping, coupling), rank = axes, min(rank, n1, n2)
    config = TCurConfig(
        rank=rank, grouping=grouping, coupling=coupling, frame=frame, alpha=alpha, selection="random",
        seed=seed, transform=transform,
    )  # fmt: skip
    model = Layers(layers, n1, n2, seed)
    injection = kit.adapt(model, config)
    kit.stir(injection, std=1.0, seed=seed)
    model.double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n2, generator=generator, dtype=torch.float64)
    # The frozen factors are kept in float32, which holds raw ones exactly and the DCT and the frame rounded.
    tolerance = 1e-10 if frame == "raw" and config.domain != "dct" else 2e-5
    for group in injection.groups.values():
        group.double()
        assert group.spec.size == COUPLED[axes](layers)
        stack, update = update_of(kit, model, group, config)
        for position, name in enumerate(group.spec.modules):
            layer = model.get_submodule(name)
            bias = layer.base.bias.detach().numpy()
            expected = x.numpy() @ (stack[position] + update[position]).T + bias
            scale = max(1, np.abs(update).max())
            forms = possible_forms(layer.view, has_rows=group.has_rows, in_block=group.in_block)
            assert ("gather" in forms) == (config.domain == "identity" or group.spec.size == 1)
            for form in (*forms, None):
                layer.form = form
                got = layer(x).detach().numpy()
                np.testing.assert_allclose(
                    got, expected, rtol=tolerance, atol=tolerance * scale, err_msg=str(form)
                )


def test_a_sketch_gives_the_dense_reference(kit):
    model = kit.Net()
    config = TCurConfig(rank=2, frame="sketch", alpha=0.5)
    injection = kit.adapt(model, config)
    kit.stir(injection)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    group = injection.groups["up"]
    factors = group.factors()
    np.testing.assert_array_equal(factors.core, 0.5 * group.core.detach().numpy())
    for position, name in enumerate(group.spec.modules):
        layer = model.get_submodule(name)
        left, right = factors.left[position].astype(float), factors.right[position].astype(float)
        left, right = (
            left / np.linalg.norm(left, axis=0),
            right / np.linalg.norm(right, axis=1, keepdims=True),
        )
        weight = layer.base.weight.detach().double().numpy() + left @ factors.core[position] @ right
        expected = x.double().numpy() @ weight.T + layer.base.bias.detach().double().numpy()
        forms = possible_forms(layer.view, has_rows=group.has_rows, in_block=group.in_block)
        assert forms == ("factored", "merged", "materialised")
        for form in forms:
            layer.form = form
            np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@quick
@given(SIZES, KINDS, SEEDS)
def test_dense_update_is_the_product(sizes, kind, seed):
    n3, n1, n2, rank = sizes
    generator = np.random.default_rng(seed)
    columns, core, rows = (
        torch.from_numpy(generator.normal(size=shape))
        for shape in ((n3, n1, rank), (n3, rank, rank), (n3, rank, n2))
    )
    expected = product(kind, columns.numpy(), core.numpy(), rows.numpy())
    rows_t, columns_t = flatten_rows(rows), flatten_columns(columns)
    constants = coupling_constants(kind, n3)
    x = torch.from_numpy(generator.normal(size=(2, 3, n2)))
    tolerance = 1e-10 if kind == "dft" else 1e-6  # the constants of the others are float32
    for place in range(n3):
        matrix_t = coupling_matrix(core, constants[place])
        got = dense_update(rows_t, matrix_t, columns_t)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got.numpy(), expected[place], atol=tolerance * scale)
        np.testing.assert_allclose(
            apply_update(x, rows_t, matrix_t, columns_t).numpy(),
            x.numpy() @ got.numpy().T,
            atol=1e-10 * scale * n2,
        )


@quick
@given(st.integers(1, 6), KINDS, SEEDS)
def test_structure_constants_and_domains(size, kind, seed):
    """T[l, i, j, k] from unit slices, and both directions of the transform, against its matrix."""
    value = np.random.default_rng(seed).normal(size=(2, size, 3, 2))
    matrix = transform_matrix(kind, size)
    domain = to_domain(kind, value)
    np.testing.assert_allclose(
        domain, np.einsum("fl,blpq->bfpq", matrix, value)[:, : domain.shape[1]], atol=1e-12
    )
    np.testing.assert_allclose(from_domain(kind, domain, size), value, atol=1e-12)
    constants = structure(kind, size)
    units = np.eye(size)[:, :, None, None]
    for i, j, k in itertools.product(range(size), repeat=3):
        expected = product(kind, units[i], units[j], units[k])[:, 0, 0]
        np.testing.assert_allclose(constants[:, i, j, k], expected, atol=1e-12)


def linear_case():
    return nn.Linear(5, 6), torch.randn(4, 5, dtype=torch.float64)


def no_bias_case():
    return nn.Linear(5, 6, bias=False), torch.randn(2, 3, 5, dtype=torch.float64)


def conv1d_case():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 5)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(2, 3, 5, dtype=torch.float64)


def pointwise_case():
    return nn.Conv2d(5, 6, 1), torch.randn(2, 5, 3, 2, dtype=torch.float64)


def convolution_case():
    return nn.Conv2d(2, 6, 3, stride=2, padding=1), torch.randn(2, 2, 5, 4, dtype=torch.float64)


def reflected_case():
    return nn.Conv1d(3, 6, 3, padding=2, dilation=2, padding_mode="reflect"), torch.randn(
        2, 3, 7, dtype=torch.float64
    )


def one_picture_case():
    return nn.Conv2d(3, 6, (1, 2)), torch.randn(3, 3, 3, dtype=torch.float64)


def channels_last_case():
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    return nn.Conv2d(3, 6, 1).to(memory_format=torch.channels_last), x


CASES = [
    linear_case, no_bias_case, conv1d_case, pointwise_case, convolution_case, reflected_case,
    one_picture_case, channels_last_case,
]  # fmt: skip


def adapted(kit, module, **options):
    """Two copies of a module, adapted in float64 with random cores; the second of them."""
    torch.manual_seed(1)
    model = nn.Sequential(module, copy.deepcopy(module))
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    injection = kit.adapt(model, TCurConfig(rank=2, selection="leverage", targets="0,1", **options))
    kit.stir(injection, std=0.5)
    model.double()
    (group,) = injection.groups.values()
    return model, group.double()


def spectrum(group):
    """The frozen factors of the group's one block."""
    rank = group.core.shape[1]
    columns = group.columns_t[0].reshape(-1, rank, group.spec.n1).transpose(1, 2)
    return Spectrum(group.frame.transform, columns, group.rows_t[0].T.reshape(-1, rank, group.spec.n2))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"coupling": "all"}, {"coupling": "all", "transform": "dct"}])
def test_every_form_by_finite_differences(kit, case, options):
    """`gradcheck` compares the gradient of input and coupling matrix with differences in float64."""
    torch.manual_seed(0)
    module, x = case()
    model, group = adapted(kit, module, **options)
    layer = model[1]
    part = group.slice(1)
    outputs, gradients = {}, {}
    for form in possible_forms(layer.view, has_rows=group.has_rows, in_block=group.in_block):

        def call(value, inner, form=form):
            own = replace(part, matrix=lambda: inner, update=lambda: spectrum(group).updates(inner)[1])
            return FORMS[form](layer.base, layer.view, value, own)

        inner = group.core if form == "spectral" else part.matrix()
        arguments = [x.clone().requires_grad_(), inner.detach().clone().requires_grad_()]
        assert torch.autograd.gradcheck(call, arguments)
        outputs[form] = call(*arguments)
        weights = torch.linspace(-1, 2, outputs[form].numel(), dtype=torch.float64).reshape(
            outputs[form].shape
        )
        layer.form = form
        group.core.grad = None
        value = x.clone().requires_grad_()
        (layer(value).sin() * weights).sum().backward()
        gradients[form] = (value.grad, group.core.grad)
        assert layer.weight.grad is None
    assert len(outputs) >= 2 if options == {} or layer.view.is_linear else len(outputs) == 1
    first = next(iter(outputs))
    weight = layer.view.matrix(layer.base) + part.dense()
    expected = layer.view.call(layer.base, x, weight)
    for form, output in outputs.items():
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        for own, other in zip(gradients[form], gradients[first], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_zero_core_is_the_layer_in_every_form(kit, case):
    torch.manual_seed(0)
    module, x = case()
    model, group = adapted(kit, module)
    with torch.no_grad():
        group.core.zero_()
        for form in possible_forms(model[1].view, has_rows=True):
            model[1].form = form
            # The merged form adds the bias after the product, which may round otherwise.
            tolerance = 1e-14 if form == "merged" else 0
            torch.testing.assert_close(model[1](x), model[1].base(x), rtol=tolerance, atol=tolerance)


@quick
@given(SIZES, st.integers(1, 3), FRAMES, KINDS, SEEDS)
def test_frame_round_trip_and_pull_back(sizes, blocks, kind, transform, seed):
    size, n1, n2, rank = sizes
    n1, n2, n3 = max(n1, rank + 1), max(n2, rank + 1), blocks * size
    generator = np.random.default_rng(seed)
    columns, rows = generator.normal(size=(n3, n1, rank)), generator.normal(size=(n3, rank, n2))
    frame = build_frame(kind, columns, rows, transform=transform, blocks=blocks, alpha=0.75)
    core, gradient = generator.normal(size=(2, n3, rank, rank))
    np.testing.assert_allclose(frame.from_raw(frame.to_raw(core)), core, atol=1e-6)
    # The frame is linear, so central differences of <gradient, to_raw(core)> are exact but for rounding.
    direction = generator.normal(size=core.shape)
    step = 1e-3
    change = frame.to_raw(core + step * direction) - frame.to_raw(core - step * direction)
    difference = np.vdot(gradient, change) / (2 * step)
    assert np.vdot(frame.pull_back(gradient), direction) == pytest.approx(difference, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_orthonormal_frame_is_orthonormal(transform):
    """In every frequency of every block: (C S)^H (C S) = 1 and (T R) (T R)^H = 1."""
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(8, 9, 3)), generator.normal(size=(8, 3, 7))
    frame = build_frame("orthonormal", columns, rows, transform=transform, blocks=2)
    left = to_domain(transform, columns.reshape(2, 4, 9, 3)) @ frame.left
    right = frame.right @ to_domain(transform, rows.reshape(2, 4, 3, 7))
    identity = np.broadcast_to(np.eye(3), (*left.shape[:2], 3, 3))
    np.testing.assert_allclose(left.conj().swapaxes(-1, -2) @ left, identity, atol=1e-7)
    np.testing.assert_allclose(right @ right.conj().swapaxes(-1, -2), identity, atol=1e-7)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equal_slices_leave_the_frame_finite(transform):
    """`nn.TransformerEncoder` starts as copies of one layer: only the frequency zero has energy."""
    generator = np.random.default_rng(0)
    columns = np.repeat(generator.normal(size=(1, 6, 2)), 3, axis=0)
    rows = np.repeat(generator.normal(size=(1, 2, 5)), 3, axis=0)
    frame = build_frame("orthonormal", columns, rows, transform=transform)
    core = np.repeat(generator.normal(size=(1, 2, 2)), 3, axis=0)
    raw = frame.to_raw(core)
    assert np.isfinite(raw).all()
    np.testing.assert_allclose(frame.from_raw(raw), core, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="polar"):
        build_frame("polar", np.zeros((1, 2, 1)), np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match="wavelet"):
        to_domain("wavelet", np.zeros((1, 2, 1)))
