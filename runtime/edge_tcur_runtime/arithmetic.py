"""Exact combinations of adapters of the same base, rows and columns.

The update is linear in the core while rows and columns stay, so sums, differences and averages of such
adapters are exact (LoRA's are not: mean(A) mean(B) is not mean(AB)). Pure numpy, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edge_tcur_runtime.errors import BaseMismatchError, ConfigError, IncompatibleError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.origin import DELTA, EPSILON, PERSONAL, START, judged_together, spent_together

_SUM_TOLERANCE = 1e-9


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], *, extras_from: int | None = None
) -> Adapter:
    """The linear combination of adapters: add (1, 1), subtract (1, -1), scale (w), interpolate, average.

    Args:
        adapters: of the same base, groups, rows and columns, task and labels.
        weights: one for each, finite.
        extras_from: position of the adapter whose head and modules trained in full are taken; None
            combines them with the weights too, which must then sum to 1: they are no updates.

    Raises:
        BaseMismatchError: of different bases; both digests are named.
        IncompatibleError: other groups, rows, columns or labels.
        ConfigError: no adapters, or weights that are not allowed.
    """
    if not adapters or len(weights) != len(adapters) or not np.isfinite(weights).all():
        raise ConfigError("every adapter needs one finite weight", where="weights")
    if extras_from is not None and not 0 <= extras_from < len(adapters):
        raise ConfigError(
            f"there is no adapter {extras_from}; expected 0 to {len(adapters) - 1}", where="extras_from"
        )
    first = adapters[0]
    for other in adapters[1:]:
        _check_alike(first, other)
    if first.extras and extras_from is None and abs(sum(weights) - 1) > _SUM_TOLERANCE:
        raise ConfigError(
            f"the weights sum to {sum(weights):g}; a head is no update and can only be averaged",
            where="weights",
            hint="let the weights sum to 1, or say which adapter's head to take",
        )

    def total(values: Sequence[np.ndarray]) -> np.ndarray:
        pairs = zip(weights, values, strict=True)
        result: np.ndarray = sum((w * value.astype(np.float64) for w, value in pairs), np.zeros(()))
        if not (np.abs(result) <= np.finfo(np.float32).max).all():
            raise ConfigError("these weights make numbers that no float32 holds", where="weights")
        return result.astype(np.float32)

    factors = {
        name: own.with_core(total([adapter.factors[name].core for adapter in adapters]))
        for name, own in first.factors.items()
    }
    extras = (
        {name: total([adapter.extras[name] for adapter in adapters]) for name in first.extras}
        if extras_from is None
        else dict(adapters[extras_from].extras)
    )
    header = replace(first.header, provenance=_provenance(adapters, sum(weights)))
    return Adapter(header, factors, extras)


def _provenance(adapters: Sequence[Adapter], total: float) -> dict[str, str]:
    """That of the first adapter, with what all of them spent of privacy. What they started from is kept where
    the difference to it is still all that was learned: in an average of adapters that name the same one."""
    starts = {adapter.header.provenance.get(START) for adapter in adapters}
    lost = {*PERSONAL, EPSILON, DELTA}
    if len(starts) > 1 or abs(total - 1) > _SUM_TOLERANCE:
        lost.add(START)
    own = {key: value for key, value in adapters[0].header.provenance.items() if key not in lost}
    return own | spent_together(adapters) | judged_together(adapters)


def _check_alike(first: Adapter, other: Adapter) -> None:
    a, b = first.header, other.header
    if a.base_digest != b.base_digest:
        raise BaseMismatchError(
            f"one adapter is of the base {a.base_digest}, another of {b.base_digest}",
            hint="bring one to the other's base with 'edge-tcur migrate'",
        )
    for what in ("groups", "task", "labels", "coupling", "transform"):
        if getattr(a, what) != getattr(b, what):
            raise IncompatibleError(f"the adapters' {what} differ", where=what)
    for name, own in first.factors.items():
        theirs = other.factors[name].stored()
        for part, value in own.stored().items():
            if part != "core" and not (part in theirs and np.array_equal(value, theirs[part])):
                raise IncompatibleError(
                    f"the adapters have other {part} in this group: their cores cannot be added",
                    where=name,
                    hint="train them from one parent adapter, or with the same selection and seed",
                )
    if {n: v.shape for n, v in first.extras.items()} != {n: v.shape for n, v in other.extras.items()}:
        raise IncompatibleError("the adapters carry other heads or modules", where="extras")
