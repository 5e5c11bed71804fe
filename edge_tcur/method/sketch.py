"""Ternary sketches of a gradient or a learnt update: the frozen factors of the ``sketch`` frame.

The core between the leading singular vectors of the task's gradient follows the steepest directions of
full fine-tuning (the idea of LoRA-SB, arXiv 2411.19557); rounded to -1, 0 and 1 the vectors take two bits an
entry and ship with the adapter.

A gradient names directions to start in, and every vector is another one. An update is there to be kept: what
rounding loses of one vector the next ones hold, chosen one after another on what is left (Kolda and O'Leary's
semidiscrete decomposition, ACM TOMS 1998, with a core in the place of their diagonal).
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIRECTIONS = 4  # times the rank: leading singular directions that are looked at
_TINY = 1e-12  # of the largest energy: a part below it counts as empty


def sketch_gradient(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ternary sketches of the leading singular vectors.

    Args:
        gradient: [n1, n2].
        rank: r, at most min(n1, n2).

    Returns:
        left int8 [n1, r] and right int8 [r, n2].
    """
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    # The driver chooses signs; fixed here, so that the sketch does not depend on the machine.
    signs = torch.sign(left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0])
    return round_ternary(left[:, :rank] * signs[:rank]), round_ternary(
        (right[:rank] * signs[:rank, None]).T
    ).T.contiguous()


def sketch_update(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ternary vectors whose spans hold most of an update.

    Args:
        update: [n1, n2].
        rank: r, at most min(n1, n2).

    Returns:
        left int8 [n1, r] and right int8 [r, n2].
    """
    target = update.double()
    left, basis = _pursue(target, rank)
    right, _ = _pursue(target.T @ basis, rank)  # on the part that the left vectors span
    return left, right.T.contiguous()


def _pursue(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ternary vectors int8 [n, r] that span most of `target` [n, k], and an orthonormal basis of theirs.

    Each is the rounding of the leading left singular vector of what those before it leave. The search
    goes on in the leading singular directions alone.
    """
    rest = _leading(target, _DIRECTIONS * rank)
    floor = _TINY * max(float(rest[:, 0].square().sum()), torch.finfo(torch.float64).tiny)
    basis, chosen = target.new_zeros(len(target), 0), []
    for number in range(rank):
        energies, directions = torch.linalg.eigh(rest.T @ rest)
        direction = rest @ directions[:, -1]
        if float(energies[-1]) <= floor:  # nothing is left: any vector will do
            direction = torch.eye(len(target), 1, dtype=target.dtype, device=target.device)[:, 0].roll(number)
        vector = round_ternary(direction[:, None])[:, 0]
        # The driver chooses signs; fixed here, so that the sketch does not depend on the machine.
        vector = vector * vector[vector.abs().argmax()]
        chosen.append(vector)
        unit = _orthogonal(vector.double(), basis)
        basis = torch.cat((basis, unit[:, None]), dim=1)
        rest = rest - unit[:, None] * (unit @ rest)
    return torch.stack(chosen, dim=1), basis


def _leading(target: Tensor, count: int) -> Tensor:
    """The leading left singular vectors times their values, [n, at most count], the largest first."""
    wide = target.shape[0] <= target.shape[1]
    energies, vectors = torch.linalg.eigh(target @ target.T if wide else target.T @ target)
    energies, vectors = energies.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    leading: Tensor = vectors * energies.sqrt() if wide else target @ vectors
    return leading


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector that `basis` [n, m] does not span, at unit length; zero where there is none."""
    part = vector / vector.norm()
    for _ in range(2):  # twice is enough
        part = part - basis @ (basis.T @ part)
    length = part.norm()
    return part / length if float(length) > 1e-9 else torch.zeros_like(part)


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
