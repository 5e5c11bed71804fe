"""A published adapter plus what the personal one learned here: new + personal - start, exactly.

The start is the base, an adapter in the store, or the bundle's own. Where it is not known or not here
any more, the difference cannot be told, and nothing is combined: guessing would count what both hold twice.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from edge_tcur_runtime import __version__
from edge_tcur_runtime.arithmetic import combine
from edge_tcur_runtime.errors import ConfigError, EdgeError, IncompatibleError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.origin import (
    BASE,
    PERSONAL,
    blank_adapter,
    bundle_adapter,
    content_digest,
    judged_together,
    spent_together,
    start_of,
    starting_from,
)
from edge_tcur_runtime.store import Store


def origin_of(digest: str | None, store: Store) -> str | None:
    """What a stored adapter started from (`edge_tcur_runtime.origin`); None where nothing says so."""
    if digest is None:
        return None
    try:
        return start_of(store.load(digest))
    except EdgeError:  # damaged: told where it is used
        return None


@dataclass(frozen=True)
class Learnt:
    """What a personal adapter learned here: itself, and what it started from.

    Attributes:
        digest: in the store; None is the base.
        adapter: None where it is damaged.
        origin: what it says that it started from (`edge_tcur_runtime.origin`).
        start: the adapter that `origin` stands for; None where it is not here any more.
    """

    digest: str | None
    adapter: Adapter | None = None
    origin: str | None = None
    start: Adapter | None = None

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be combined with another one; None where it can."""
        if self.origin is None:
            return "it does not say what it started from (train it once more), so it cannot be combined"
        if self.start is None:
            return (
                f"what it started from ({self.origin[:19]}...) is not here any more, so it cannot be combined"
            )
        return None


def read_learnt(digest: str | None, store: Store, bundle: Bundle) -> Learnt:
    """Reads a personal adapter of the store and what it started from, each once."""
    if digest is None:
        return Learnt(None)
    try:
        adapter = store.load(digest)
    except EdgeError:  # damaged: told where it is used
        return Learnt(digest)
    origin = start_of(adapter)
    return Learnt(digest, adapter, origin, None if origin is None else _find(origin, store, bundle))


def blend(new: Adapter, learnt: Learnt) -> Adapter:
    """`new` plus the difference between a personal adapter and what it started from.

    Returns:
        a personal adapter that says that it started from `new`.

    Raises:
        IncompatibleError: other rows or columns, or the start is not here; the personal adapter stays in use.
    """
    hint = "the personal adapter stays in use; '--personal replace' takes the published one alone"
    personal, start = learnt.adapter, learnt.start
    if personal is None or start is None:
        raise IncompatibleError("what the personal adapter started from is not here", hint=hint)
    try:
        mixed = combine([new, personal, start], [1.0, 1.0, -1.0])
    except (IncompatibleError, ConfigError) as error:
        raise IncompatibleError(f"cannot be combined: {error.message}", hint=hint) from error
    provenance = {
        "tool": f"edge-tcur-runtime {__version__}",
        "method": "published and personal, combined",
        **starting_from(new),
        **PERSONAL,
        **spent_together((new, personal)),
        **judged_together((new, personal)),
    }
    return replace(mixed, header=replace(new.header, provenance=provenance))


def _find(origin: str, store: Store, bundle: Bundle) -> Adapter | None:
    """The adapter that `origin` stands for, from the base, the store or the bundle."""
    try:
        if origin == BASE:
            return blank_adapter(bundle)
        if origin in store.digests():
            with contextlib.suppress(EdgeError):  # damaged: the bundle may have it
                return store.load(origin)
        own = bundle_adapter(bundle)
    except IncompatibleError:  # the bundle has none
        return None
    return own if content_digest(own) == origin else None
