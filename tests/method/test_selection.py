"""The paper's rule, computed as it is written: norms summed over the Fourier domain."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur.method.selection import SELECTIONS, select_by_norm


def largest(energy, count):
    return np.sort(np.argsort(-energy, kind="stable")[:count])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_rule_in_the_fourier_domain(n3, n1, n2, seed):
    generator = np.random.default_rng(seed)
    rank = int(generator.integers(1, min(n1, n2) + 1))
    stack = generator.normal(size=(n3, n1, n2)).astype(np.float32)
    energy = np.abs(np.fft.fft(stack.astype(np.float64), axis=0)) ** 2
    expected_columns = largest(energy.sum(axis=(0, 1)), rank)
    expected_rows = largest(energy[:, :, expected_columns].sum(axis=(0, 2)), rank)
    rows, columns = select_by_norm(torch.from_numpy(stack), rank)
    np.testing.assert_array_equal(columns.numpy(), expected_columns)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)


def test_indices_are_sorted_int64_and_ties_go_to_the_lower_index():
    rows, columns = select_by_norm(torch.ones(2, 5, 4), 3)
    assert rows.dtype == columns.dtype == torch.int64
    assert rows.tolist() == columns.tolist() == [0, 1, 2]


def test_bfloat16_weights_are_compared_in_float64():
    stack = torch.tensor([[[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]]], dtype=torch.bfloat16)
    assert [index.tolist() for index in SELECTIONS["norm"](stack, 1)] == [[1], [2]]
