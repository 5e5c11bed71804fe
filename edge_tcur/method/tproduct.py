"""The t-product in its real, slice-by-slice form, as training and export both use it.

The update of slice ``l`` of a stack ``W`` [n3, n1, n2] is
``dW[l] = sum over i + j + k = l (mod n3) of C[i] @ core[j] @ R[k]`` (He et al., *tCURLoRA*,
arXiv 2501.02227, section 2; the t-product is Kilmer and Martin's). With the columns of all slices
side by side and the rows on top of each other this is one matrix product
``C_flat @ M_l(core) @ R_flat``, where block (i, k) of ``M_l`` is ``core[(l - i - k) mod n3]``.
No complex number and no FFT appears, so the same code exports to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coupling_index(n3: int) -> Tensor:
    """int64 [n3, n3 * n3]: for slice ``l``, the core slice in each block of the transposed ``M_l``.

    Entry ``k * n3 + i`` of row ``l`` is ``(l - i - k) mod n3``.
    """
    steps = torch.arange(n3)
    return ((steps[:, None, None] - steps[None, :, None] - steps[None, None, :]) % n3).reshape(n3, -1)


def coupling_matrix(core: Tensor, index: Tensor) -> Tensor:
    """The transposed coupling matrix of one slice.

    Args:
        core: [n3, r, r].
        index: int64 [n3 * n3], a row of `coupling_index`.

    Returns:
        [n3 * r, n3 * r]: block (k, i) is ``core[(l - i - k) mod n3]`` transposed.
    """
    n3, rank = core.shape[0], core.shape[1]
    blocks = torch.index_select(core, 0, index).reshape(n3, n3, rank, rank)
    return blocks.permute(0, 3, 1, 2).reshape(n3 * rank, n3 * rank)


def flatten_columns(columns: Tensor) -> Tensor:
    """``C_flat`` transposed, [n3 * r, n1], from C [n3, n1, r]."""
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def flatten_rows(rows: Tensor) -> Tensor:
    """``R_flat`` transposed, [n2, n3 * r], from R [n3, r, n2]."""
    return rows.reshape(-1, rows.shape[2]).transpose(0, 1)


def apply_update(x: Tensor, rows_t: Tensor, matrix_t: Tensor, columns_t: Tensor) -> Tensor:
    """``x @ dW[l]^T`` in factored form, never building dW.

    Args:
        x: [..., n2].
        rows_t: [n2, n3 * r] from `flatten_rows`.
        matrix_t: [n3 * r, n3 * r] from `coupling_matrix`.
        columns_t: [n3 * r, n1] from `flatten_columns`.

    Returns:
        [..., n1].
    """
    return ((x @ rows_t) @ matrix_t) @ columns_t


def dense_update(core: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """``dW`` [n3, n1, n2] of raw C [n3, n1, r], core [n3, r, r] and R [n3, r, n2]; for merging."""
    rows_flat, columns_flat = flatten_rows(rows).T, flatten_columns(columns).T
    return torch.stack(
        [columns_flat @ coupling_matrix(core, index).T @ rows_flat for index in coupling_index(len(core))]
    )
