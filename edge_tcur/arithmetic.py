"""Adapter arithmetic: exact combinations, and least-squares fits onto other rows and columns.

The exact part, `combine`, is the device's too (`edge_tcur_runtime.arithmetic`). Pure numpy, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_tcur.method.fit import fit_core
from edge_tcur_runtime.arithmetic import combine
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.factors import AnyFactors, Factors, SketchFactors
from edge_tcur_runtime.transform import from_domain, to_domain

__all__ = ["Fit", "combine", "frozen_vectors", "move_to_base", "reduce_rank", "refit"]


@dataclass(frozen=True)
class Fit:
    """A least-squares fit of one group.

    Attributes:
        factors: the fitted core between the new frozen factors.
        residual: norm of the part of the update that was lost, relative to the update's; 0 to 1.
    """

    factors: AnyFactors
    residual: float


Stack = np.ndarray  # float64 [n3, n1, n2], the weights of a group in slice order


def frozen_vectors(factors: AnyFactors, weights: Stack) -> tuple[np.ndarray, np.ndarray]:
    """C [n3, n1, r] and R [n3, r, n2] (float64) of a group's factors over the weights."""
    if isinstance(factors, SketchFactors):
        left, right = factors.vectors()
        return left.astype(np.float64), right.astype(np.float64)
    block = np.arange(len(weights)) // (len(weights) // factors.blocks)
    columns = np.take_along_axis(weights, factors.cols[block][:, None, :].astype(np.int64), axis=2)
    rows = np.take_along_axis(weights, factors.rows[block][:, :, None].astype(np.int64), axis=1)
    return columns.astype(np.float64), rows.astype(np.float64)


def move_to_base(factors: AnyFactors, transform: str, old: Stack, new: Stack) -> Fit:
    """The same rows and columns over a new version of the weights.

    Args:
        factors: over the old weights.
        transform: of the adapter.
        old, new: the group's weights, float64 [n3, n1, n2].

    Returns:
        the core whose update over the new weights is nearest to the old update.
    """
    if isinstance(factors, SketchFactors):
        return Fit(factors, 0.0)  # the vectors are the adapter's own: the update is the same
    return _fit(factors, frozen_vectors(factors, old), factors, frozen_vectors(factors, new), transform)


def reduce_rank(factors: AnyFactors, transform: str, weights: Stack, rank: int) -> Fit:
    """The update with `rank` of its rows and columns (or sketch vectors), those that hold most of it.

    Columns are picked one by one by the part of the update that they span, rows in the same way;
    the core is the least-squares fit.

    Raises:
        ConfigError: `rank` is not between 1 and the present one.
    """
    if not 1 <= rank <= factors.rank:
        raise ConfigError(f"the rank is {rank}; expected 1 to {factors.rank}", where="rank")
    columns, rows = frozen_vectors(factors, weights)
    blocks = factors.blocks
    left, core, right = (
        to_domain(transform, value.reshape(blocks, -1, *value.shape[1:]))
        for value in (columns, factors.core.astype(np.float64), rows)
    )
    keep_cols, keep_rows = [], []
    for block in range(blocks):
        update = left[block] @ core[block] @ right[block]
        cols = _pursue(left[block], update, rank)
        lines = _pursue(right[block].conj().swapaxes(1, 2), update.conj().swapaxes(1, 2), rank)
        keep_cols.append(cols)
        keep_rows.append(lines)
    smaller = _subset(factors, np.array(keep_rows), np.array(keep_cols), rank)
    return _fit(factors, (columns, rows), smaller, frozen_vectors(smaller, weights), transform)


def _subset(factors: AnyFactors, rows: np.ndarray, cols: np.ndarray, rank: int) -> AnyFactors:
    """Factors with the frozen parts at these positions [b, rank] and a core of zero."""
    core = np.zeros((len(factors.core), rank, rank), np.float32)
    if isinstance(factors, Factors):
        return Factors(
            core, np.take_along_axis(factors.rows, rows, 1), np.take_along_axis(factors.cols, cols, 1)
        )
    return SketchFactors.pack(
        core,
        np.take_along_axis(factors.left, cols[:, None, :], 2),
        np.take_along_axis(factors.right, rows[:, :, None], 1),
    )


def _pursue(atoms: np.ndarray, target: np.ndarray, count: int) -> np.ndarray:
    """Sorted positions of the atoms [f, m, r] whose span holds most of `target` [f, m, k], greedily."""
    rest, atoms, taken = target, atoms.copy(), list[int]()
    for _ in range(count):
        energy = (np.abs(atoms) ** 2).sum(axis=1)  # [f, r]
        aligned = (np.abs(atoms.conj().swapaxes(1, 2) @ rest) ** 2).sum(axis=2)
        score = np.divide(aligned, energy, out=np.zeros_like(energy), where=energy > 1e-12 * energy.max())
        gains = score.sum(axis=0)
        gains[taken] = -1
        best = int(gains.argmax())
        taken.append(best)
        unit = atoms[:, :, best] / np.sqrt(np.maximum(energy[:, best], 1e-300))[:, None]
        for_all = unit.conj()[:, None, :]
        atoms = atoms - unit[:, :, None] * (for_all @ atoms)
        rest = rest - unit[:, :, None] * (for_all @ rest)
    return np.array(sorted(taken))


def _fit(
    old: AnyFactors,
    old_vectors: tuple[np.ndarray, np.ndarray],
    new: AnyFactors,
    new_vectors: tuple[np.ndarray, np.ndarray],
    transform: str,
) -> Fit:
    """Least squares of the old update onto the new vectors."""
    size = len(old.core) // old.blocks

    def update(columns: np.ndarray, core: np.ndarray, rows: np.ndarray) -> np.ndarray:
        left, middle, right = (
            to_domain(transform, value.astype(np.float64).reshape(old.blocks, -1, *value.shape[1:]))
            for value in (columns, core, rows)
        )
        return from_domain(transform, left @ middle @ right, size).reshape(
            len(columns), columns.shape[1], rows.shape[2]
        )

    before = update(old_vectors[0], old.core, old_vectors[1])
    raw = fit_core(before, *new_vectors, transform=transform, blocks=old.blocks).astype(np.float32)
    lost = before - update(new_vectors[0], raw, new_vectors[1])
    scale = float(np.linalg.norm(before))
    return Fit(new.with_core(raw), float(np.linalg.norm(lost)) / scale if scale else 0.0)


def refit(adapter: Adapter, fits: Mapping[str, Fit], base_digest: str) -> Adapter:
    """The adapter with these factors, of the base with this digest."""
    factors = {name: fit.factors for name, fit in fits.items()}
    return Adapter(replace(adapter.header, base_digest=base_digest), factors, adapter.extras)
