"""From an adapter to the tensors that a bundle's graphs are fed, after checking that the two fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_tcur_runtime.errors import BaseMismatchError, IncompatibleError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Manifest
from edge_tcur_runtime.formats.factors import factor_parts


def build_feeds(manifest: Manifest, adapter: Adapter) -> dict[str, np.ndarray]:
    """The factors and extras of `adapter` by their names in the graphs.

    Returns:
        ``<group>.core`` f32 [n3, r, r], ``<group>.rows`` and ``<group>.cols`` i32 [b, r] or, of a sketch,
        ``<group>.left`` f32 [n3, n1, r] and ``<group>.right`` f32 [n3, r, n2]; extras f32.

    Raises:
        BaseMismatchError: made for another base; both digests are named.
        IncompatibleError: other groups, labels, task or head than the bundle's.
    """
    check_fit(manifest, adapter)
    return adapter.feeds()


def check_fit(manifest: Manifest, adapter: Adapter) -> None:
    """Refuses an adapter that was not made for this bundle's base, task and head; see `build_feeds`."""
    header = adapter.header
    if header.base_digest != manifest.base_digest:
        raise BaseMismatchError(
            f"the adapter was made for the base {header.base_digest}; "
            f"this bundle holds {manifest.base_digest}",
            hint="use an adapter that was trained on this bundle's base",
        )
    wanted = facts_of_manifest(manifest)
    for what, actual in facts_of_adapter(adapter).items():
        expected = wanted[what]
        if actual != expected:
            first, second = _apart(actual, expected)
            raise IncompatibleError(
                f"the adapter's {what} differ from the bundle's: {_short(first)} and {_short(second)}",
                hint="export a bundle from the run that made this adapter",
            )


def facts_of_adapter(adapter: Adapter) -> dict[str, Any]:
    """All that must be equal in an adapter and a bundle (`facts_of_manifest`), the base apart."""
    header = adapter.header
    return {
        "task": header.task,
        "labels": header.labels,
        "coupling": header.coupling,
        "transform": header.transform,
        "factors": factor_parts(header.frame),
        "groups": {
            name: (spec.parameters, spec.n1, spec.n2, adapter.factors[name].blocks)
            for name, spec in header.groups.items()
        },
        "head": {name: tuple(value.shape) for name, value in adapter.extras.items()},
    }


def facts_of_manifest(manifest: Manifest) -> dict[str, Any]:
    """All that must be equal in a bundle and an adapter (`facts_of_adapter`), the base apart."""
    return {
        "task": manifest.task,
        "labels": manifest.labels,
        "coupling": manifest.coupling,
        "transform": manifest.transform,
        "factors": manifest.parts,
        "groups": {
            name: (spec.parameters, spec.n1, spec.n2, spec.blocks) for name, spec in manifest.groups.items()
        },
        "head": {name: tuple(shape) for name, shape in manifest.extras.items()},
    }


def fit_digest(base_digest: str, facts: Mapping[str, Any]) -> str:
    """16 hex digits over a base's digest and the facts: equal where an adapter fits a bundle.

    A label, not a proof: that an adapter fits is checked when it is there (`check_fit`).
    """
    document = {"base": base_digest, **facts}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _apart(actual: object, expected: object) -> tuple[object, object]:
    """The two values, of mappings only the entries that differ."""
    if not isinstance(actual, dict) or not isinstance(expected, dict):
        return actual, expected
    shared = {key for key in actual.keys() & expected.keys() if actual[key] == expected[key]}
    first, second = ({k: v for k, v in part.items() if k not in shared} for part in (actual, expected))
    return first, second


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
