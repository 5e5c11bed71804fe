"""Whether the adapter in use works with a bundle, and what takes its place where it does not.

A new adapter is on trial (`State.pending`) until it has answered the bundle's canary: `put_in_use` asks it
at once where there is a bundle, else whoever next opens the store with one (`serve`). One that fails is taken
out of use, and the one before it comes back by itself; where that one fails too, the one before that, and in
the end the base, which needs no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.errors import (
    BadInputError,
    EdgeError,
    FileFormatError,
    IncompatibleError,
    IntegrityError,
    MissingEngineError,
)
from edge_tcur_runtime.feeds import check_fit
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, Bundle
from edge_tcur_runtime.origin import content_digest
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.store import State, Store

Check = Callable[[Adapter], object]  # raises what `_is_fault` knows where the adapter does not work

_SESSION_BYTES = 32 * 2**20  # what the canary's session takes beside the base, at most
_TRIES = 8  # looks at a store that others change; each needs another change in between


@dataclass(frozen=True)
class PassedOver:
    """An adapter that should have been used and does not work; its digest and the reason."""

    digest: str
    reason: str


@dataclass(frozen=True)
class Serving:
    """What is used.

    Attributes:
        adapter, digest: None is the base.
        passed_over: what stood before it and does not work.
        notes: what was done, for people.
    """

    adapter: Adapter | None
    digest: str | None
    passed_over: tuple[PassedOver, ...] = ()
    notes: tuple[str, ...] = ()


def affordable(bundle: Bundle, budget: int | None) -> bool:
    """Whether `edge_tcur_runtime.examine` fits the budget of this process (bytes; None is no limit)."""
    base = bundle.manifest.files[BASE_FILE].size
    return budget is None or read_memory().resident + base + _SESSION_BYTES <= budget


def put_in_use(
    store: Store,
    ref: str,
    check: Check | None,
    *,
    expected_base: str | None = None,
    name: str | None = None,
    seen: State | None = None,
) -> str | None:
    """Puts an installed adapter on trial, checks it, and makes it the active one.

    Args:
        check: None leaves it on trial, to be confirmed by `serve`.
        name, seen: see `Store.activate`; a name goes back to who had it where the check fails.

    Returns:
        its digest; None is the base.

    Raises:
        EdgeError: what `Store.activate` and `check` raise; what was in use before is in use again.
    """
    before = store.state
    digest = store.activate(ref, pending=True, expected_base=expected_base, name=name, seen=seen)
    if digest is None or check is None:
        return digest
    try:
        check(store.verified(digest))
    except BaseException:
        with suppress(EdgeError):  # the first error is the one to tell
            store.withdraw(digest, before)
        raise
    store.confirm(digest)
    return digest


def serve(store: Store, works: Check, *, confirm: bool = True, change: bool = True) -> Serving:
    """The first that works of the adapter on trial, the active one, the previous one and the base.

    The store is repaired, old or new: a trial ends, and a damaged adapter is no longer referred to but by its
    name. A confirmed one of another base stays what it is, as the store may serve several bundles.

    Args:
        works: raises where an adapter does not work; where it does, a trial ends well.
        confirm: whether `works` is enough to end a trial; change: False leaves the store alone.

    Raises:
        EdgeError: of `works`, what says nothing about the adapter (memory, a missing library).
    """
    for _ in range(_TRIES):
        seen = store.state
        choice = _choose(store, seen, works)
        if not choice.passed or not _differ(store.state, seen):
            break  # else what was passed over may only have been replaced meanwhile
    keep = next((digest for digest in _order(seen) if digest not in choice.out), None)
    notes = _tell(seen, choice.passed, choice.digest)
    ended = seen.pending is not None and (keep != seen.pending or confirm)
    if change and (ended or keep != seen.in_use):
        notes += _settle(store, seen, keep)
    return Serving(choice.adapter, choice.digest, tuple(choice.passed), tuple(notes))


def serve_with(store: Store, model: Model, *, change: bool = True) -> Serving:
    """`serve` for what answers with `model`, from any thread.

    What is served is loaded under its digest, once: ``with model.adapter(found.digest):`` answers with it and
    with nothing else, whatever other threads serve meanwhile (a digest of None is the base). It stays loaded
    until `Model.unload`.

    Raises:
        EdgeError: see `serve`.
    """

    def works(adapter: Adapter) -> None:
        digest = content_digest(adapter)  # an adapter has one file, and so this is its digest in the store
        if digest not in model.loaded:
            model.load(digest, adapter)

    return serve(store, works, change=change)


@dataclass
class _Choice:
    """What one look at the store found.

    Attributes:
        adapter, digest: that works; None is the base.
        passed: what stood before it; out: of these, what is to be taken out of use.
    """

    adapter: Adapter | None = None
    digest: str | None = None
    passed: list[PassedOver] = field(default_factory=list)
    out: set[str | None] = field(default_factory=set)


def _choose(store: Store, seen: State, works: Check) -> _Choice:
    choice = _Choice()
    for digest in _order(seen):
        if digest is None:
            break
        try:
            adapter = store.verified(digest)
            works(adapter)
        except EdgeError as error:
            if not _is_fault(error):
                raise
            choice.passed.append(PassedOver(digest, str(error)))
            if digest == seen.pending or isinstance(error, (IntegrityError, FileFormatError)):
                choice.out.add(digest)
            continue
        choice.adapter, choice.digest = adapter, digest
        break
    return choice


def _differ(state: State, other: State) -> bool:
    """Whether other adapters are in use or would be."""
    return replace(state, names={}) != replace(other, names={})


@dataclass
class Incumbent:
    """The adapter in use when it is called, which a new adapter must beat.

    Attributes:
        place: of the store, which need not be there yet.
        bundle: that it must fit.
        seen: the state when it was last asked for; None before.
    """

    place: Path
    bundle: Bundle
    seen: State | None = None

    def __call__(self) -> Adapter | None:
        """The adapter; None is the base, also where what is in use does not fit."""
        self.seen = State()
        if not self.place.is_dir():
            return None
        store = Store.open(self.place, create=False)
        self.seen = store.state
        return serve(store, partial(check_fit, self.bundle.manifest), change=False).adapter


def _order(state: State) -> Iterator[str | None]:
    """What is tried, each once; None is the base."""
    on_trial = () if state.pending is None else (state.pending,)
    for digest in dict.fromkeys((*on_trial, state.active, state.previous, None)):
        yield digest
        if digest is None:
            return


def _is_fault(error: EdgeError) -> bool:
    """Whether it says that the adapter does not work, and not that the device lacks something."""
    faults = (IntegrityError, IncompatibleError, BadInputError)
    return isinstance(error, faults) and not isinstance(error, MissingEngineError)


def _tell(state: State, passed: list[PassedOver], digest: str | None) -> list[str]:
    if not passed:
        return []
    lines = [
        f"the adapter {one.digest} {'on trial ' if one.digest == state.pending else ''}does not work here: "
        f"{one.reason}"
        for one in passed
    ]
    return [*lines, f"used instead: {digest or 'the base without an adapter'}"]


def _settle(store: Store, seen: State, keep: str | None) -> list[str]:
    """Writes what is in use from now on; a store that cannot be written is tried again the next time."""
    try:
        if not store.settle(seen, keep):
            return ["the store was changed by another process meanwhile and is left as it is"]
    except EdgeError as error:
        return [f"the store could not be changed, the next start tries again: {error}"]
    confirmed = keep is not None and keep == seen.pending
    return [f"the adapter {keep} passed its health check and is confirmed"] if confirmed else []
