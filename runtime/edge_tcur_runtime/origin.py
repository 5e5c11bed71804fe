"""What training on the device starts from, and how a personal adapter remembers it.

It is kept in the adapter's provenance, so that what it learned can be told apart.

``start`` is ``base``, or the digest of the adapter that the personal one started from. A chain of
personalisations keeps the first start: the difference to it is all that was learned here. An adapter
without the entry (of an older version, or continued from one) has an unknown start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load

from edge_tcur_runtime.errors import IncompatibleError
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES, Adapter, parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.formats.content import read_content
from edge_tcur_runtime.formats.digest import digest_bytes

BASE = "base"
PERSONAL = {"personal": "true"}
UNJUDGED = {"unjudged": "true"}  # nothing showed that it answers any better than what it started from
EPSILON, DELTA = "epsilon", "delta"  # what is spent of privacy (`edge_tcur_runtime.privacy`)
START = "start"


def content_digest(adapter: Adapter) -> str:
    """``sha256:<hex>`` of the adapter's file as this version writes it."""
    return digest_bytes(serialize_adapter(adapter))


def starting_from(start: Adapter | None) -> dict[str, str]:
    """The entry of the provenance for an adapter that starts from `start` (None is the base)."""
    if start is None:
        return {START: BASE}
    if PERSONAL.items() <= start.header.provenance.items():
        known = start_of(start)
        return {} if known is None else {START: known}
    return {START: content_digest(start)}


def start_of(adapter: Adapter) -> str | None:
    """`BASE`, or the digest of the adapter that this one started from; None where it does not say."""
    return adapter.header.provenance.get(START)


def is_judged(adapter: Adapter) -> bool:
    """Whether anything judged it before it was kept: a device's samples, the bundle's reference set, or its
    publisher."""
    return not UNJUDGED.items() <= adapter.header.provenance.items()


def judged_together(adapters: Sequence[Adapter]) -> dict[str, str]:
    """What the provenance of an adapter that is made of these says of being judged: one that nothing judged
    leaves the whole unjudged."""
    return {} if all(map(is_judged, adapters)) else dict(UNJUDGED)


def spent_by(provenance: Mapping[str, str]) -> tuple[float, float]:
    """Epsilon and delta of all runs on the way to an adapter with this provenance: 0 where it is not
    personal, infinity where one of them was without privacy."""
    if not PERSONAL.items() <= provenance.items():
        return 0.0, 0.0
    return _number(provenance.get(EPSILON)), _number(provenance.get(DELTA))


def spent_together(adapters: Sequence[Adapter]) -> dict[str, str]:
    """What the provenance of an adapter that is made of these says of personal data: at worst, all have the
    same samples. Nothing where none is personal."""
    sources = [adapter.header.provenance for adapter in adapters]
    if not any(PERSONAL.items() <= source.items() for source in sources):
        return {}
    spent = [math.fsum(values) for values in zip(*map(spent_by, sources), strict=True)]
    if not all(map(math.isfinite, spent)):
        return dict(PERSONAL)
    return {**PERSONAL, EPSILON: repr(spent[0]), DELTA: repr(spent[1])}


def _number(text: str | None) -> float:
    """A number that is at least 0; infinity for anything else."""
    try:
        value = float(text or "inf")
    except ValueError:
        return math.inf
    return value if value >= 0 else math.inf


def blank_adapter(bundle: Bundle) -> Adapter:
    """The bundle's own adapter with cores and a head of zero: the base, ready to be trained.

    Raises:
        IncompatibleError: the bundle carries no adapter.
        IntegrityError: one of its files is not what the manifest promises.
    """
    own = bundle_adapter(bundle)
    zero = {group: part.with_core(np.zeros_like(part.core)) for group, part in own.factors.items()}
    extras = {name: np.zeros_like(value) for name, value in own.extras.items()}
    if bundle.manifest.base_extras is not None:
        extras |= load(read_content(bundle.root, bundle.manifest.files, bundle.manifest.base_extras))
    return Adapter(own.header, zero, extras)


def bundle_adapter(bundle: Bundle) -> Adapter:
    """The adapter that was exported with the bundle.

    Raises:
        IncompatibleError: there is none.
        IntegrityError: it is not what the manifest promises.
    """
    if bundle.manifest.adapter is None:
        raise IncompatibleError("the bundle carries no adapter", where=str(bundle.root))
    name = bundle.manifest.adapter
    raw = read_content(bundle.root, bundle.manifest.files, name, MAX_FILE_BYTES)
    return parse_adapter(raw, str(bundle.path(name)))
