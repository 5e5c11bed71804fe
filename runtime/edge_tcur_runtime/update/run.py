"""One update from its start to its end: check, fetch, verify, stage, health-check, commit.

The adapter in use changes in one old-or-new write of the store's state, after the new adapter has been
read back from the disk and has passed its health check. Until then the device answers with what it had, also
while the check runs and wherever the process is killed; the next update finds out by itself how far
the last one came. The floor rises only when an update ended well.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_tcur_runtime import __version__
from edge_tcur_runtime.atomic import disk_error, remove_tree
from edge_tcur_runtime.canary import no_memory
from edge_tcur_runtime.errors import (
    BadInputError,
    EdgeError,
    HealthCheckError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.feeds import facts_of_manifest, fit_digest
from edge_tcur_runtime.formats.adapter import (
    FORMAT_VERSION,
    MAX_FILE_BYTES,
    Adapter,
    read_bounded,
    serialize_adapter,
)
from edge_tcur_runtime.formats.bundle import MANIFEST, Bundle, open_bundle
from edge_tcur_runtime.formats.content import read_content
from edge_tcur_runtime.formats.offer import CHANNELS, Offer, release_of, target_place
from edge_tcur_runtime.store import Store, check_name
from edge_tcur_runtime.update.blend import Learnt, blend, origin_of, read_learnt
from edge_tcur_runtime.update.client import Verified, refresh, repository_id, signed_content
from edge_tcur_runtime.update.fetch import (
    CacheTransport,
    Counters,
    Deadline,
    Download,
    FileTransport,
    HttpTransport,
    Limits,
    Progress,
    discard,
    fetch,
    open_transport,
)
from edge_tcur_runtime.update.floor import StateFile, UpdateState, check_floor, check_time
from edge_tcur_runtime.update.health import check_health
from edge_tcur_runtime.update.policy import (
    Action,
    Committed,
    Decision,
    Device,
    Personal,
    Situation,
    decide,
)

FOLDER = "update"  # in the store
ROOT_FILE = "trusted-root.json"  # in a bundle
MAX_ROOT_BYTES = 64 * 2**10
_COMBINED = "personal-combined"
TOKENIZER = "tokenizer.json"

HealthCheck = Callable[[Bundle, Adapter, Offer], str]
Place = HttpTransport | FileTransport


@dataclass(frozen=True)
class UpdateSettings:
    """One declaration of what an update may be told.

    Attributes:
        url: of the repository: ``http(s)://``, ``file://`` or a directory; None takes what was fetched
            before (only with `offline`).
        channel: one of `CHANNELS`.
        name: the line of adapters to follow.
        personal: see `Personal`.
        check_only: decide, and change nothing in the store.
        offline: open no socket.
        retry: try again what failed here, or was taken out of use by hand.
        root: file of the trusted root; None takes the bundle's.
        limits: bounds of time and size.
    """

    url: str | None = None
    channel: str = "stable"
    name: str | None = None
    personal: Personal = Personal.KEEP
    check_only: bool = False
    offline: bool = False
    retry: bool = False
    root: Path | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Attributes:
        action: what the decision was; with `check_only` it was not carried out.
        changed: whether another adapter (or the base) is in use now.
        active: digest of the adapter in use; None is the base.
        decision: with its reason, and why other adapters were skipped.
        health: what the health check saw; None where none ran.
        requests, received: what it cost, in requests and bytes of bodies.
        notes: for people.
    """

    action: Action
    changed: bool
    active: str | None
    decision: Decision
    health: str | None
    requests: int
    received: int
    notes: tuple[str, ...] = ()


def run_update(
    bundle_root: Path,
    store_root: Path,
    settings: UpdateSettings,
    *,
    progress: Progress | None = None,
    health: HealthCheck | None = None,
    transport: Place | None = None,
) -> UpdateResult:
    """Updates the adapter that a bundle is used with; see the module.

    Args:
        bundle_root: the bundle on this device.
        store_root: the store; made where it is missing.
        progress: called with bytes so far and bytes in all.
        health: replaces the health check (an application's own, say).
        transport: replaces the one that `settings.url` names.

    Raises:
        TrustError, IntegrityError: 6. NetworkError: 8. DiskError: 7.
        IncompatibleError, HealthCheckError: 4. BudgetError: 5. BadInputError: 3. UsageError: 2.
        In every case the adapter in use is the one from before.
    """
    bundle = open_bundle(bundle_root, verify=False)  # the manifest; its files are verified before use
    trusted = read_trusted_root(bundle, settings.root)
    store = Store.open(store_root)
    states = StateFile(store_root / FOLDER)
    place = transport or choose_transport(settings, states.folder)
    with states.locked(), contextlib.closing(place):
        update = _Update(bundle, store, states, settings, place)
        update.progress = progress or update.progress
        update.health = health or _check
        return update.run(trusted)


def read_trusted_root(bundle: Bundle, given: Path | None) -> bytes:
    """The root metadata that everything else is verified against.

    Raises:
        UsageError: the bundle has none and none was given.
        IntegrityError: it is not the one in the bundle's manifest.
    """
    if given is not None:
        return read_bounded(given, MAX_ROOT_BYTES)
    if ROOT_FILE not in bundle.manifest.files:
        raise UsageError(
            "this bundle was shipped without the publisher's root, so that nothing can be verified",
            where=str(bundle.root),
            hint="give the publisher's root with --root, or ship it ('edge-tcur publish trust BUNDLE')",
        )
    return read_content(bundle.root, bundle.manifest.files, ROOT_FILE, MAX_ROOT_BYTES)


def choose_transport(settings: UpdateSettings, folder: Path) -> Place:
    """Where the repository is read from.

    Raises:
        UsageError: no URL, or a socket would be opened offline.
    """
    deadline = Deadline(settings.limits.total_seconds)
    if settings.url is None:
        if not settings.offline:
            raise UsageError("no repository was named", hint="give it with --url, or use --offline")
        return CacheTransport(folder / "metadata", folder / "downloads", deadline)
    place = open_transport(settings.url, deadline, settings.limits)
    if settings.offline and isinstance(place, HttpTransport):
        raise UsageError(
            "--offline opens no connection", where=settings.url, hint="give a directory or file://"
        )
    return place


class _Update:
    """One update; holds the lock."""

    def __init__(
        self, bundle: Bundle, store: Store, states: StateFile, settings: UpdateSettings, place: Place
    ) -> None:
        self.bundle, self.store, self.states = bundle, store, states
        self.settings, self.place = settings, place
        self.state = UpdateState("")
        self.progress: Progress = lambda _done, _size: None
        self.health: HealthCheck = _check
        self.notes: list[str] = []
        self._read_learnt = Learnt(None)

    @property
    def counters(self) -> Counters:
        return self.place.counters

    def run(self, trusted: bytes) -> UpdateResult:
        """See `run_update`."""
        before = self.states.read()
        repository = repository_id(trusted)
        self.state = before.of_repository(repository)
        if self.state.floor != before.floor:  # of another repository: its roots would not follow ours
            remove_tree(self.states.folder / "metadata")
        self.state = self.state.recover(self.store.state.in_use, self.store.state.previous)
        if self.settings.retry:
            committed = None if self._was_taken_out() else self.state.committed
            self.state = replace(self.state, rejected={}, attempts=0, committed=committed)
        self.notes += self.states.warnings
        if (
            self.states.missing
            or self.states.warnings
            or (self.state != before and not self.settings.check_only)
        ):
            self.states.write(self.state)
        verified = refresh(self.place, trusted, self.states.folder / "metadata", self.settings.limits)
        check_floor(verified.versions, self.state.floor)
        now = int(time.time())
        check_time(now, max(self.state.known_good, verified.issued), verified.expires)
        decision = decide(verified.catalogue.adapters, self._device(), self._situation())
        for path, why in verified.catalogue.skipped.items():
            self.notes.append(f"{path}: {why}")
        seen = None if self.settings.check_only else self._carry_out(decision)
        changed = not self.settings.check_only and decision.action is not Action.NOTHING
        if not self.settings.check_only:
            self._end(verified, now)
        active = self.store.active_digest()
        counters = self.counters
        return UpdateResult(
            decision.action,
            changed,
            active,
            decision,
            seen,
            counters.requests,
            counters.received,
            tuple(self.notes),
        )

    def _was_taken_out(self) -> bool:
        """Whether the user went back from what the last update put in use (and has no adapter of his own)."""
        committed, active = self.state.committed, self.store.active_digest()
        if committed is not None and committed.digest in self.store.state.failed:
            return False
        own = active is not None and active not in self.state.published
        return committed is not None and committed.digest != active and not own

    def _went_back(self) -> bool:
        """Whether the store's state lost its last change, and with it what the last update put in use.

        Who goes back by hand leaves it as the one to go back to.
        """
        committed, state = self.state.committed, self.store.state
        known = committed is None or committed.digest in (state.active, state.previous, state.pending)
        if known or not self.store.may_be_behind:
            return False
        self.notes.append(f"{self.store.root}: the store's state was damaged and is an older one")
        return True

    def _device(self) -> Device:
        manifest = self.bundle.manifest
        if self.settings.channel not in CHANNELS:
            raise UsageError(f"no channel {self.settings.channel!r}", hint=f"one of {', '.join(CHANNELS)}")
        tokenizer = manifest.files.get(TOKENIZER)
        return Device(
            manifest.base_digest,
            fit_digest(manifest.base_digest, facts_of_manifest(manifest)),
            None if tokenizer is None else tokenizer.sha256,
            release_of(__version__),
            FORMAT_VERSION,
            self.settings.channel,
            self.state.device_id,
            self.settings.name,
            min(self.settings.limits.adapter_bytes, MAX_FILE_BYTES),
        )

    def _situation(self) -> Situation:
        state = self.store.state
        active, failed = state.in_use, frozenset(() if state.pending else state.failed)
        situation = Situation(
            active,
            self.state.committed,
            frozenset(self.state.published),
            self.state.rejected,
            self.settings.personal,
            went_back=self._went_back(),
            failed=failed,
            mixed=not failed.isdisjoint(self.state.combined),
        )
        if active is None or active in situation.published or situation.personal is not Personal.COMBINE:
            return situation
        learnt = self._learnt(active)
        return replace(situation, origin=learnt.origin, obstacle=learnt.obstacle)

    def _learnt(self, digest: str | None) -> Learnt:
        """What an adapter in use learned here; read once, unless another one came in use meanwhile."""
        if digest != self._read_learnt.digest:
            self._read_learnt = read_learnt(digest, self.store, self.bundle)
        return self._read_learnt

    def _carry_out(self, decision: Decision) -> str | None:
        """Does what was decided and returns what the health check saw."""
        if decision.action is Action.BASE:
            self.store.activate("base")
            self._save(replace(self.state, committed=None))
            return "the base without an adapter"
        if decision.action is Action.NOTHING:
            self._repair(decision.offer)
            return None
        offer = decision.offer
        assert offer is not None
        digest = replacing = self._stage(offer)
        if decision.action is Action.COMBINE:
            replacing = self._combine(digest)
        self._save(self.state.begin(Committed(digest, offer.facts.name, offer.facts.version), replacing))
        try:
            adapter = self.store.load(replacing)  # read back: what was verified is what lies on the disk
            seen = self._examine(adapter, offer, decision.action)
            name = _COMBINED if decision.action is Action.COMBINE else self._free_name(offer)
            base = self.bundle.manifest.base_digest
            self.store.activate(replacing, expected_base=base, name=name)
        except (EdgeError, MemoryError) as error:
            with contextlib.suppress(EdgeError):  # the first error is the one to tell
                self._save(self.state.abandon())
            if isinstance(error, EdgeError):
                raise
            raise no_memory() from error
        self._save(self.state.commit())
        return seen

    def _stage(self, offer: Offer) -> str:
        """Fetches an adapter, verifies it and keeps it in the store, not in use; returns its digest."""
        base = self.bundle.manifest.base_digest
        if not self._is_whole(offer.digest):
            raw = self._fetch(offer)
            with signed_content("no adapter"):
                self.store.install(raw, expected_base=base, where=offer.entry.path)
        discard(self._downloads / offer.entry.sha256)
        return offer.digest

    def _is_whole(self, digest: str) -> bool:
        """Whether an adapter is in the store and not damaged."""
        if digest not in self.store.digests():
            return False
        try:
            self.store.load(digest)
        except EdgeError:
            return False
        return True

    def _repair(self, offer: Offer | None) -> None:
        """Fetches the adapter in use again where its file is damaged or gone."""
        if offer is None or offer.digest != self.store.active_digest():
            return
        try:
            self.store.load("active")
        except IntegrityError as error:
            self._stage(offer)
            self.notes.append(f"fetched again: {error}")

    def _free_name(self, offer: Offer) -> str | None:
        """The line's name, where it names nothing of the user's own in the store."""
        name = offer.facts.name
        try:
            check_name(name)
        except UsageError:
            return None
        holder = self.store.state.names.get(name)
        return name if holder is None or holder in self.state.published else None

    @property
    def _downloads(self) -> Path:
        return self.states.folder / "downloads"

    def _fetch(self, offer: Offer) -> bytes:
        entry = offer.entry
        part = self._downloads / entry.sha256
        try:
            self._downloads.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self._downloads) from error
        path = target_place(entry.path, entry.sha256)
        fetch(Download(path, entry.size, entry.sha256, part, self.progress), self.place)
        return read_bounded(part, MAX_FILE_BYTES)

    def _combine(self, digest: str) -> str:
        """Installs the new adapter plus what the personal one learned here; returns its digest.

        Raises:
            IncompatibleError: other rows or columns; the personal adapter stays in use.
        """
        mixed = blend(self.store.load(digest), self._learnt(self.store.active_digest()))
        found = self.store.install(serialize_adapter(mixed))
        self._save(replace(self.state, combined=(*self.state.combined, found)))
        return found

    def _examine(self, adapter: Adapter, offer: Offer, action: Action) -> str:
        """Runs the health check; an adapter that fails is remembered and not tried again."""
        facts = offer.facts
        if action is Action.COMBINE:  # its answers are its own: only finite ones can be asked for
            offer = replace(offer, facts=replace(facts, canary=None))
        try:
            return self.health(self.bundle, adapter, offer)
        except HealthCheckError as error:
            self._save(self.state.reject(f"failed its health check here: {error.message}"))
            raise HealthCheckError(
                f"{facts.name} version {facts.version} failed its health check: {error.message}",
                where=error.where,
                hint="the adapter in use stays, and this version is not tried again (--retry does)",
            ) from error

    def _end(self, verified: Verified, now: int) -> None:
        """Raises the floor, and removes published adapters that are no longer needed or were withdrawn."""
        kept = self._drop_old(frozenset(offer.digest for offer in verified.catalogue.adapters))
        combined = self._drop_combined()
        for part in self._downloads.glob("*"):  # of a broken download that nobody wants any more
            discard(part)
        state = replace(self.state, published=kept, combined=combined)
        self._save(state.raised(verified.versions, now))

    def _drop_old(self, listed: frozenset[str]) -> tuple[str, ...]:
        """Digests that came by update and are kept: in use, or referred to and still listed.

        The one that a personal adapter started from is kept too: `blend` subtracts it.
        """
        state, committed = self.store.state, self.state.committed
        personal = state.in_use is not None and state.in_use not in self.state.published
        held = self.store.digests()
        starts = {origin_of(digest, self.store) for digest in held.difference(self.state.published)}
        kept = []
        for digest in self.state.published:
            last = committed is not None and digest == committed.digest
            wanted = digest in listed and (last or digest in state.referenced)
            needed = digest in (state.active, state.pending) or digest in starts or (last and personal)
            if wanted or needed or not self._drop(digest, held):
                kept.append(digest)
        return tuple(kept)

    def _drop(self, digest: str, held: frozenset[str]) -> bool:
        """Removes an adapter, where it is there; False where a prediction has gone back to it meanwhile."""
        try:
            if digest in held:
                self.store.remove(digest)
        except UsageError:
            return False
        return True

    def _drop_combined(self) -> tuple[str, ...]:
        """Removes combinations that nothing refers to; returns the others."""
        referenced, held = self.store.state.referenced, self.store.digests()
        return tuple(
            digest
            for digest in dict.fromkeys(self.state.combined)
            if digest in referenced or not self._drop(digest, held)
        )

    def _save(self, state: UpdateState) -> None:
        if state != self.state:
            self.states.write(state)
            self.state = state


def _check(bundle: Bundle, adapter: Adapter, offer: Offer) -> str:
    """The health check, after every file of the bundle was verified."""
    opened = open_bundle(bundle.root)
    if opened.manifest != bundle.manifest:
        raise BadInputError("the bundle changed during the update", where=str(bundle.root / MANIFEST))
    return check_health(opened, adapter, offer.facts.canary, offer.facts.base.canary)
