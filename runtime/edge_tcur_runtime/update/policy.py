"""Which adapter a device should use: pure decisions from the signed offers and the device's own state.

The signed list is the law. The device wants the highest version that is listed, fits it and is rolled
out to it. An adapter that came by update and is no longer listed was withdrawn: the next best listed
one takes its place, or the base. Everything else the device decides for itself: a personal adapter is
kept, a version that failed here or that the user went back from is not tried again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES
from edge_tcur_runtime.formats.offer import FULL_ROLLOUT, Offer, parse_runtime


class Personal(Enum):
    """What a published adapter does to a personal one."""

    KEEP = "keep-personal"
    REPLACE = "replace"
    COMBINE = "combine"


class Action(Enum):
    """What an update does."""

    NOTHING = "nothing"
    INSTALL = "install"
    COMBINE = "combine"  # the new adapter plus what the personal one had learned on the old
    BASE = "base"  # the adapter in use was withdrawn and nothing else fits


@dataclass(frozen=True)
class Device:
    """What an adapter must fit, and what its owner chose.

    Attributes:
        base_digest, fit, tokenizer: of the bundle (`edge_tcur_runtime.feeds.fit_digest`).
        runtime: version of this runtime.
        format_version: the newest adapter format that it reads.
        channel: ``stable``, or ``beta`` (which takes stable ones too).
        device_id: random and stable; never sent.
        name: the line of adapters to follow; None where the repository has only one that fits.
        max_bytes: the largest adapter file that it takes.
    """

    base_digest: str
    fit: str
    tokenizer: str | None
    runtime: str
    format_version: int
    channel: str
    device_id: str
    name: str | None = None
    max_bytes: int = MAX_FILE_BYTES


@dataclass(frozen=True)
class Committed:
    """The last adapter that an update put in use."""

    digest: str
    name: str
    version: int


@dataclass(frozen=True)
class Situation:
    """What is in use now, and how it came there.

    Attributes:
        active: digest of the adapter in use; None is the base.
        committed: what the last update put in use; None before the first, and after a withdrawal to the base.
        published: digests that came by update.
        rejected: digest -> why it is not tried again on this device.
        personal: what to do where the adapter in use did not come by update.
        origin: what a personal adapter in use started from: a digest, ``base``, or None where not known.
        obstacle: why a personal adapter in use cannot be combined with a published one; None where it can.
        went_back: the store's state lost its last change: nobody took `committed` out of use.
        failed: digests that were in use and did not work (a damaged file), so that what was before came back
            by itself; nobody has chosen another one since.
        mixed: whether one of these was a combination with a personal adapter.
    """

    active: str | None = None
    committed: Committed | None = None
    published: frozenset[str] = frozenset()
    rejected: Mapping[str, str] = field(default_factory=dict)
    personal: Personal = Personal.KEEP
    origin: str | None = None
    obstacle: str | None = None
    went_back: bool = False
    failed: frozenset[str] = frozenset()
    mixed: bool = False

    @property
    def lost(self) -> str | None:
        """`committed`'s digest where it was in use until it failed; None where it was not."""
        found = None if self.committed is None else self.committed.digest
        return found if found in self.failed else None


@dataclass(frozen=True)
class Decision:
    """What to do, with which adapter, and why.

    Attributes:
        action: see `Action`.
        reason: for people.
        offer: the adapter to install, or the one that is kept from being installed; None: there is none.
        withdrawn: digest of the adapter in use that is no longer listed.
        skipped: path -> why an adapter is not for this device.
    """

    action: Action
    reason: str
    offer: Offer | None = None
    withdrawn: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


def bucket(device_id: str, name: str, version: int) -> int:
    """Where a device stands in the rollout of one version: 0 to 9999, another place for each version."""
    raw = hashlib.sha256(f"{device_id}\0{name}\0{version}".encode()).digest()
    return int.from_bytes(raw[:8], "big") % FULL_ROLLOUT


def misfit(offer: Offer, device: Device) -> str | None:
    """Why an adapter cannot work on this device; None where it can."""
    facts = offer.facts
    if facts.base.digest != device.base_digest:
        return f"for another base ({facts.base.digest[:19]}...)"
    if facts.base.tokenizer is not None and facts.base.tokenizer != device.tokenizer:
        return "for another tokenizer"
    if facts.fit != device.fit:
        return f"for other groups, labels or another head (task {facts.base.task})"
    return _too_new(offer, device)


def _too_new(offer: Offer, device: Device) -> str | None:
    facts = offer.facts
    if facts.format_version > device.format_version:
        return f"format version {facts.format_version}; this runtime reads {device.format_version}"
    if parse_runtime(facts.runtime, offer.entry.path) > parse_runtime(device.runtime, "this runtime"):
        return f"needs edge-tcur-runtime {facts.runtime}; here is {device.runtime}"
    if offer.entry.size > device.max_bytes:
        return f"{offer.entry.size} bytes; this device takes at most {device.max_bytes}"
    return None


def not_now(offer: Offer, device: Device, situation: Situation) -> str | None:
    """Why a fitting adapter is not to be installed on this device; None where it is."""
    facts = offer.facts
    if offer.digest in situation.rejected:
        return situation.rejected[offer.digest]
    if facts.channel not in ("stable", device.channel):
        return f"on the channel {facts.channel}"
    if bucket(device.device_id, facts.name, facts.version) >= facts.rollout:
        return f"rolled out to {facts.rollout / 100:g} % of the devices, not yet to this one"
    return None


def decide(offers: tuple[Offer, ...], device: Device, situation: Situation) -> Decision:
    """What an update should do now; see the module.

    Raises:
        UsageError: several lines of adapters fit and none was chosen.
    """
    skipped = {offer.entry.path: why for offer in offers if (why := misfit(offer, device)) is not None}
    fitting = [offer for offer in offers if offer.entry.path not in skipped]
    name = _choose_name(fitting, device, situation)
    for offer in fitting:
        if offer.facts.name != name:
            skipped[offer.entry.path] = f"another line of adapters ({offer.facts.name})"
    fitting = [offer for offer in fitting if offer.facts.name == name]
    listed = frozenset(offer.digest for offer in offers)
    personal = situation.active is not None and situation.active not in situation.published | listed
    current = next((offer for offer in fitting if offer.digest == situation.active), None)
    for offer in fitting:
        why = not_now(offer, device, situation)
        if why is None and not personal:
            why = _held(offer, listed, situation)
        if why is not None and offer is not current:
            skipped[offer.entry.path] = why
    candidates = [offer for offer in fitting if offer.entry.path not in skipped]
    best = max(candidates, key=lambda offer: (offer.facts.version, offer is current), default=None)
    # A personal adapter that only came back because the published one failed was replaced by choice.
    back = any(offer.digest == situation.lost for offer in candidates)
    if personal and not back:
        return _with_personal(best, situation, skipped)
    gone = situation.active if situation.active not in listed and not personal else None
    if best is not None and best.digest == situation.lost:
        label = f"{best.facts.name} version {best.facts.version}"
        reason = f"{label} was in use until it did not work; nobody took it out of use"
        return Decision(Action.INSTALL, reason, best, gone, skipped)
    return _without_personal(best, current, gone, skipped)


def _choose_name(fitting: list[Offer], device: Device, situation: Situation) -> str | None:
    names = sorted({offer.facts.name for offer in fitting})
    if device.name is not None:
        return device.name
    if situation.committed is not None and (situation.committed.name in names or len(names) != 1):
        return situation.committed.name
    if len(names) > 1:
        raise UsageError(
            f"several lines of adapters fit this device: {', '.join(names)}", hint="choose one with --name"
        )
    return names[0] if names else None


def _held(offer: Offer, listed: frozenset[str], situation: Situation) -> str | None:
    """Why a version is not taken again after the user went back from it or from a later one."""
    committed = situation.committed
    if committed is None or committed.digest == situation.active or committed.digest not in listed:
        return None
    if situation.went_back or situation.lost is not None:
        return None
    if offer.facts.name != committed.name or offer.facts.version > committed.version:
        return None
    return f"version {committed.version} was taken out of use on this device"


def _with_personal(best: Offer | None, situation: Situation, skipped: Mapping[str, str]) -> Decision:
    if best is None:
        return Decision(Action.NOTHING, "a personal adapter is in use", skipped=skipped)
    label = f"{best.facts.name} version {best.facts.version}"
    committed = None if situation.committed is None or situation.mixed else situation.committed.digest
    combine = situation.personal is Personal.COMBINE
    known = best.digest in (committed, situation.origin)
    if situation.personal is Personal.KEEP or (combine and (known or situation.obstacle is not None)):
        why = f": {situation.obstacle}" if combine and not known else ""
        how = "" if combine else " (--personal combine adds it, replace takes it alone)"
        reason = f"a personal adapter is in use and kept{why}; published: {label}{how}"
        return Decision(Action.NOTHING, reason, best, skipped=skipped)
    if combine:
        return Decision(Action.COMBINE, f"{label}, with what the personal one learned", best, skipped=skipped)
    return Decision(Action.INSTALL, f"{label} replaces the personal adapter", best, skipped=skipped)


def _without_personal(
    best: Offer | None, current: Offer | None, gone: str | None, skipped: Mapping[str, str]
) -> Decision:
    """`gone`: digest of the adapter in use where it is not listed any more."""
    if best is None:
        if gone is None:
            return Decision(Action.NOTHING, "nothing is published for this device", skipped=skipped)
        reason = "the adapter in use was withdrawn; nothing else fits"
        return Decision(Action.BASE, reason, None, gone, skipped)
    label = f"{best.facts.name} version {best.facts.version}"
    if best is current:
        reason = f"{label} is in use and the newest for this device"
        return Decision(Action.NOTHING, reason, best, skipped=skipped)
    reason = f"{label} takes the place of a withdrawn adapter" if gone else f"{label} is new"
    return Decision(Action.INSTALL, reason, best, gone, skipped)
