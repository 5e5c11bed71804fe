"""What ``--adapter`` may name: the base, the bundle's own adapter, a file, or one in the store."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from edge_tcur_runtime.examine import trial_model, try_out
from edge_tcur_runtime.feeds import check_fit
from edge_tcur_runtime.formats.adapter import Adapter, read_adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.output import Sink
from edge_tcur_runtime.personalize import bundle_adapter
from edge_tcur_runtime.store import Store
from edge_tcur_runtime.trial import affordable, serve


def load_reference(ref: str, bundle: Bundle, store: Path) -> Adapter | None:
    """The adapter that `ref` names, verified; None is the base.

    Args:
        ref: ``base``, ``bundle``, ``active`` (the base where none is, or there is no store), the path
            of an adapter file, or a name or digest in the store.

    Raises:
        UsageError: nothing of that name. Others: see `read_adapter` and `Store.load`; what looks like
            a path (it has a separator, or ends in ``.safetensors``) is read as one.
    """
    if ref == "base":
        return None
    if ref == "bundle":
        return bundle_adapter(bundle)
    if ref == "active" and not store.is_dir():
        return None
    path = Path(ref)
    if path.suffix == ".safetensors" or path.name != ref or (ref != "active" and os.path.isfile(ref)):
        return read_adapter(path)
    opened = Store.open(store, create=False)
    digest = opened.resolve(ref)
    return None if digest is None else opened.load(digest)


def load_start(
    ref: str, bundle: Bundle, store: Path, sink: Sink, *, budget: int | None = None, change: bool = True
) -> Adapter | None:
    """`load_reference` for a run that starts from an adapter: where the one in use does not work, what comes
    before it is taken, with a note.

    Args:
        budget: bytes that this process may take; where the health check does not fit, an adapter on trial
            stays on trial. change: False leaves the store alone.
    """
    if ref != "active" or not store.is_dir():
        return load_reference(ref, bundle, store)
    opened = Store.open(store, create=False)
    whole = change and opened.state.pending is not None and affordable(bundle, budget)
    works = partial(try_out, bundle, trial_model(bundle)) if whole else partial(check_fit, bundle.manifest)
    found = serve(opened, works, confirm=whole, change=change)
    for note in found.notes:
        sink.note(note)
    return found.adapter
