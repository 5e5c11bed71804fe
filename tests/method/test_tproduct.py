"""The update against a dense reference: W + C * dU * R with an explicit DFT matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.tproduct import dense_update
from edge_tcur_runtime.frame import build_frame, t_product, t_transpose

SIZES = st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7), st.integers(1, 4))
FRAMES = st.sampled_from(("raw", "orthonormal"))
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=40, derandomize=True)


def dft_product(a, b):
    """The t-product by its definition in the Fourier domain, the DFT written out as a matrix."""
    n3 = len(a)
    grid = np.arange(n3)
    dft = np.exp(-2j * np.pi * np.outer(grid, grid) / n3)
    product = np.einsum("fl,lpq->fpq", dft, a) @ np.einsum("fl,lqs->fqs", dft, b)
    result = np.einsum("lf,fps->lps", dft.conj() / n3, product)
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


@quick
@given(SIZES, FRAMES, st.sampled_from(("projection", "shape")), SEEDS)
def test_layers_give_the_dense_reference(sizes, frame, grouping, seed):
    layers, n1, n2, rank = sizes
    rank = min(rank, n1, n2)
    model = Layers(layers, n1, n2, seed)
    injection = inject(model, TCurConfig(rank=rank, frame=frame, grouping=grouping))
    assert [len(group.modules) for group in injection.targets.groups] == (
        [layers, layers] if grouping == "projection" else [2 * layers]
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n2, generator=generator)
    for spec in injection.targets.groups:
        group = injection.groups[spec.name]
        with torch.no_grad():
            group.core.copy_(torch.randn(group.core.shape, generator=generator))
        adapted = [model.get_submodule(name) for name in spec.modules]
        stack = np.stack([layer.base.weight.detach().double().numpy() for layer in adapted])
        core = group.frame.to_raw(group.core.detach().double().numpy())
        columns, rows = stack[:, :, group.cols.numpy()], stack[:, group.rows.numpy(), :]
        update = dft_product(dft_product(columns, core), rows)
        for position, layer in enumerate(adapted):
            weight = stack[position] + update[position]
            expected = x.double().numpy() @ weight.T + layer.base.bias.detach().double().numpy()
            got = layer(x).detach().double().numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(update).max()))


@quick
@given(SIZES, SEEDS)
def test_dense_update_is_the_t_product(sizes, seed):
    n3, n1, n2, rank = sizes
    generator = np.random.default_rng(seed)
    columns, core, rows = (
        generator.normal(size=shape) for shape in ((n3, n1, rank), (n3, rank, rank), (n3, rank, n2))
    )
    expected = dft_product(dft_product(columns, core), rows)
    got = dense_update(*map(torch.from_numpy, (core, columns, rows))).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(t_product(t_product(columns, core), rows), expected, atol=1e-9)


@quick
@given(SIZES, SEEDS)
def test_the_t_transpose_is_the_adjoint(sizes, seed):
    n3, p, q, s = sizes
    generator = np.random.default_rng(seed)
    a, b, c = (generator.normal(size=shape) for shape in ((n3, p, q), (n3, q, s), (n3, p, s)))
    np.testing.assert_array_equal(t_transpose(t_transpose(a)), a)
    assert np.vdot(t_product(a, b), c) == pytest.approx(np.vdot(b, t_product(t_transpose(a), c)))
    np.testing.assert_allclose(
        t_transpose(t_product(a, b)), t_product(t_transpose(b), t_transpose(a)), atol=1e-9
    )


@quick
@given(SIZES, FRAMES, SEEDS)
def test_frame_round_trip_and_pull_back(sizes, kind, seed):
    n3, n1, n2, rank = sizes
    n1, n2 = max(n1, rank + 1), max(n2, rank + 1)
    generator = np.random.default_rng(seed)
    columns, rows = generator.normal(size=(n3, n1, rank)), generator.normal(size=(n3, rank, n2))
    frame = build_frame(kind, columns, rows)
    core, gradient = generator.normal(size=(2, n3, rank, rank))
    np.testing.assert_allclose(frame.from_raw(frame.to_raw(core)), core, atol=1e-6)
    # The frame is linear, so central differences of <gradient, to_raw(core)> are exact but for rounding.
    direction = generator.normal(size=core.shape)
    step = 1e-3
    change = frame.to_raw(core + step * direction) - frame.to_raw(core - step * direction)
    difference = np.vdot(gradient, change) / (2 * step)
    assert np.vdot(frame.pull_back(gradient), direction) == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_the_orthonormal_frame_is_orthonormal():
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7))
    frame = build_frame("orthonormal", columns, rows)
    identity = np.zeros((4, 3, 3))
    identity[0] = np.eye(3)
    left, right = t_product(columns, frame.left), t_product(frame.right, rows)
    np.testing.assert_allclose(t_product(t_transpose(left), left), identity, atol=1e-7)
    np.testing.assert_allclose(t_product(right, t_transpose(right)), identity, atol=1e-7)


def test_equal_slices_leave_the_frame_finite():
    """`nn.TransformerEncoder` starts as copies of one layer: only the frequency zero has energy."""
    generator = np.random.default_rng(0)
    columns = np.repeat(generator.normal(size=(1, 6, 2)), 3, axis=0)
    rows = np.repeat(generator.normal(size=(1, 2, 5)), 3, axis=0)
    frame = build_frame("orthonormal", columns, rows)
    core = np.repeat(generator.normal(size=(1, 2, 2)), 3, axis=0)
    raw = frame.to_raw(core)
    assert np.isfinite(raw).all()
    np.testing.assert_allclose(frame.from_raw(raw), core, atol=1e-5)


def test_an_unknown_frame_is_refused():
    with pytest.raises(ValueError, match="polar"):
        build_frame("polar", np.zeros((1, 2, 1)), np.zeros((1, 1, 2)))
