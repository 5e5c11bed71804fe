"""Ternary sketches of a gradient or a learnt update: the frozen factors of the ``sketch`` frame.

The core between the leading singular vectors of the task's gradient follows the steepest directions of
full fine-tuning (the idea of LoRA-SB, arXiv 2411.19557); rounded to -1, 0 and 1 the vectors take two bits an
entry and ship with the adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sketch_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ternary sketches of the leading singular vectors.

    Args:
        matrix: the gradient or update, [n1, n2].
        rank: r, at most min(n1, n2).

    Returns:
        left int8 [n1, r] and right int8 [r, n2].
    """
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    # The driver chooses signs; fixed here, so that the sketch does not depend on the machine.
    signs = torch.sign(left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0])
    return round_ternary(left[:, :rank] * signs[:rank]), round_ternary(
        (right[:rank] * signs[:rank, None]).T
    ).T.contiguous()


def round_ternary(vectors: Tensor) -> Tensor:
    """The ternary vector at the smallest angle to each column, int8 of the shape of `vectors` [n, r].

    It keeps the signs of the k largest entries; k maximises the cosine, which is the sum of their
    sizes divided by the square root of k.
    """
    sizes, order = vectors.abs().sort(dim=0, descending=True, stable=True)
    counts = torch.arange(1, len(vectors) + 1, dtype=vectors.dtype, device=vectors.device)[:, None]
    best = (sizes.cumsum(dim=0) / counts.sqrt()).argmax(dim=0, keepdim=True)
    keep = torch.zeros_like(vectors).scatter_(0, order, (counts - 1 <= best).to(vectors.dtype))
    return (vectors.sign() * keep).to(torch.int8)
