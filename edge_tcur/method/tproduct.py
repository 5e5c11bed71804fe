"""The t-product in its real, slice-by-slice form, as training and export both use it.

The update of slice ``l`` of a block ``W`` [p, n1, n2] is the sum over i, j, k of
``T[l, i, j, k] C[i] @ core[j] @ R[k]`` with the structure constants ``T`` of the transform
(`edge_tcur_runtime.transform`); for the DFT ``T`` is one where ``i + j + k = l (mod p)`` (He et al.,
*tCURLoRA*, arXiv 2501.02227, section 2). With the columns of all slices side by side and the rows on top
of each other this is one matrix product ``C_flat @ M_l(core) @ R_flat``, where block (i, k) of ``M_l`` is
the sum over j of ``T[l, i, j, k] core[j]``. No complex number and no FFT appears, so the same code exports
to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_tcur_runtime.transform import structure


def coupling_constants(transform: str, size: int) -> Tensor:
    """What `coupling_matrix` needs of the transform, for each slice l of a block of `size` = p.

    Returns:
        for ``dft`` int64 [p, p * p]: entry ``k * p + i`` of row l is the one core slice of block
        (k, i), ``(l - i - k) mod p``; otherwise f32 [p, p * p, p]: its weights of the core slices.
    """
    constants = torch.from_numpy(structure(transform, size)).permute(0, 3, 1, 2)  # [l, k, i, j]
    if transform == "dft":
        return constants.argmax(dim=3).reshape(size, size * size)
    return constants.reshape(size, size * size, size).float()


def coupling_matrix(core: Tensor, constants: Tensor) -> Tensor:
    """The transposed coupling matrix of one slice.

    Args:
        core: [p, r, r], of one block.
        constants: the slice's row of `coupling_constants`.

    Returns:
        [p * r, p * r]: block (k, i) of it, transposed, couples row slice k to column slice i.
    """
    size, rank = core.shape[0], core.shape[1]
    if constants.dim() == 1:
        blocks = torch.index_select(core, 0, constants)
    else:
        blocks = constants.to(core.dtype) @ core.reshape(size, rank * rank)
    return blocks.reshape(size, size, rank, rank).permute(0, 3, 1, 2).reshape(size * rank, size * rank)


def flatten_columns(columns: Tensor) -> Tensor:
    """``C_flat`` transposed, [p * r, n1], from C [p, n1, r]."""
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def flatten_rows(rows: Tensor) -> Tensor:
    """``R_flat`` transposed, [n2, p * r], from R [p, r, n2]."""
    return rows.reshape(-1, rows.shape[2]).transpose(0, 1)


def apply_update(x: Tensor, rows_t: Tensor, matrix_t: Tensor, columns_t: Tensor) -> Tensor:
    """``x @ dW[l]^T`` in factored form, never building dW.

    Args:
        x: [..., n2].
        rows_t: [n2, p * r] from `flatten_rows`.
        matrix_t: [p * r, p * r] from `coupling_matrix`.
        columns_t: [p * r, n1] from `flatten_columns`.

    Returns:
        [..., n1].
    """
    return ((x @ rows_t) @ matrix_t) @ columns_t


def dense_update(rows_t: Tensor, matrix_t: Tensor, columns_t: Tensor) -> Tensor:
    """``dW[l]`` [n1, n2] from the arguments of `apply_update`."""
    return columns_t.T @ (rows_t @ matrix_t).T
