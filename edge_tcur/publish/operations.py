"""What a publisher does: add, withdraw, roll out, rotate keys, sign anew, and look."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from securesystemslib.signer import Key

from edge_tcur.publish.card import render_card
from edge_tcur.publish.facts import Description, describe, find_sources
from edge_tcur.publish.keys import ROLES
from edge_tcur.publish.repository import CARDS, Change, Repository
from edge_tcur_runtime.errors import BadInputError, UsageError
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES, parse_adapter, read_bounded
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.offer import (
    EXTRA,
    FULL_ROLLOUT,
    AdapterFacts,
    Catalogue,
    Entry,
    Offer,
    adapter_path,
    parse_runtime,
    serialize_adapter_facts,
    serialize_extra,
    target_place,
)

LATER = ("targets", "snapshot", "timestamp")


@dataclass(frozen=True)
class Published:
    """An adapter that was published: its offer, and the paths of those that it superseded.

    With `put_back` it was published before, and its file was missing or damaged.
    """

    offer: Offer
    superseded: tuple[str, ...]
    canary: bool
    put_back: bool = False


@dataclass(frozen=True)
class RoleStatus:
    """A role's version, days until its signature expires, key names and threshold."""

    version: int
    days_left: float
    keys: tuple[str, ...]
    threshold: int


def add_adapter(repository: Repository, path: Path, said: Description, bundle: Path | None) -> Published:
    """Publishes an adapter file as the next version of its line.

    Args:
        bundle: the bundle that it is for; None takes the one that holds the file, if any.

    Raises:
        BadInputError: not an adapter, or published already.
        HealthCheckError, BaseMismatchError: it does not work with the bundle.
    """
    raw = read_bounded(path, MAX_FILE_BYTES)
    adapter = parse_adapter(raw, str(path))
    digest = digest_bytes(raw)
    sources = find_sources(path, bundle)
    with repository.changing() as change:
        catalogue = change.catalogue
        for offer in catalogue.adapters:
            if offer.digest == digest:
                if _put_back(repository, offer, raw):
                    return Published(offer, (), offer.facts.canary is not None, put_back=True)
                label = f"{offer.facts.name} version {offer.facts.version}"
                hint = "'edge-tcur publish rollout' changes who gets it"
                raise BadInputError(f"already published as {label}", where=str(path), hint=hint)
        facts = describe(adapter, path, said, 1, sources)
        facts = replace(facts, version=catalogue.versions.get(facts.name, 0) + 1)
        card = render_card(adapter, facts, said, sources, len(raw)).encode()
        facts = replace(facts, card=digest_bytes(card).removeprefix("sha256:")[:32])
        repository.write_file(f"{CARDS}/{facts.name}-{facts.version}.md", card)
        target = adapter_path(facts.name, facts.version)
        repository.add_file(target, raw, custom=serialize_adapter_facts(facts), change=change)
        _enter(change, facts)
        versions = {**catalogue.versions, facts.name: facts.version}
        dropped = superseded(change.catalogue.adapters, facts.name)
        for offer in dropped:
            repository.remove_target(change, offer.entry.path)
        _tidy(change, versions)
    for offer in dropped:
        repository.drop_file(offer.entry.path, offer.entry.sha256)
        repository.remove_file(f"{CARDS}/{offer.facts.name}-{offer.facts.version}.md")
    offer = _find(change, facts.name, facts.version)
    return Published(offer, tuple(o.entry.path for o in dropped), facts.canary is not None)


def _put_back(repository: Repository, offer: Offer, raw: bytes) -> bool:
    """Writes the file of a listed adapter again where it is missing or damaged; False where it is whole."""
    place = target_place(offer.entry.path, offer.entry.sha256)
    if repository.holds(place, offer.entry.sha256):
        return False
    repository.write_file(place, raw)
    return True


def withdraw(repository: Repository, name: str, version: int) -> Offer:
    """Takes an adapter out of the list; devices that use it go to the next best one, or the base.

    Raises:
        UsageError: no such adapter.
    """
    with repository.changing() as change:
        offer, versions = _find(change, name, version), change.catalogue.versions
        repository.remove_target(change, offer.entry.path)
        _tidy(change, versions)
    repository.drop_file(offer.entry.path, offer.entry.sha256)
    repository.remove_file(f"{CARDS}/{name}-{version}.md")
    return offer


def set_rollout(repository: Repository, name: str, version: int, rollout: int, channel: str | None) -> Offer:
    """Changes who gets an adapter; devices that have it keep it.

    Args:
        rollout: hundredths of a percent.

    Raises:
        UsageError: no such adapter, or such a rollout.
    """
    if not 0 <= rollout <= FULL_ROLLOUT:
        raise UsageError(f"{rollout / 100:g} % is not possible", hint="0 to 100 %")
    with repository.changing() as change:
        offer = _find(change, name, version)
        facts = replace(offer.facts, rollout=rollout, channel=channel or offer.facts.channel)
        target = change.targets.signed.targets[offer.entry.path]
        target.unrecognized_fields["custom"] = serialize_adapter_facts(facts)
        _tidy(change, change.catalogue.versions)
    return _find(change, name, version)


def rotate(
    repository: Repository,
    roles: tuple[str, ...],
    external: tuple[str, Path] | None = None,
    replaces: str | None = None,
) -> Change:
    """Gives roles new keys; the root's old keys sign the change. Thresholds stay as they are.

    Args:
        roles: of `ROLES`. Where a key of targets or snapshot was stolen, give all of `LATER`.
        external: private key URI of securesystemslib and file of the public key (PEM), for one role;
            None makes new key files. One for the root joins its other keys.
        replaces: name of the root's key that leaves when an external one comes.

    Raises:
        UsageError: an unknown role, an external key for several, or no such key.
        BadInputError: too few of the root's keys are here.
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles or (external is not None and len(roles) != 1):
        raise UsageError(
            f"roles: {', '.join(roles) or 'none'}", hint=f"of {', '.join(ROLES)}; one with --signer"
        )
    if replaces is not None and (external is None or roles != ("root",)):
        raise UsageError("only 'rotate root --signer' replaces one key", hint="leave out --replaces")
    with repository.keys.locked():
        change = repository.load()
        replaced: dict[str, list[Key]] = {}
        for role in dict.fromkeys(roles):
            if external is not None:
                kept = _kept(change, replaces) if role == "root" else []
                change.ring, signer = repository.keys.enroll(change.ring, role, *external)
                replaced[role] = [*kept, signer.public_key]
                continue
            count = len(change.root.signed.roles[role].keyids) if role == "root" else 1
            change.ring, signers = repository.keys.generate(change.ring, role, count)
            replaced[role] = [signer.public_key for signer in signers]
        repository.rotate(change, replaced)
    return change


def _kept(change: Change, replaces: str | None) -> list[Key]:
    """The root's keys without the one named `replaces`."""
    signed = change.root.signed
    names = {
        keyid: change.ring.keys[keyid].name if keyid in change.ring.keys else keyid[:12]
        for keyid in signed.roles["root"].keyids
    }
    if replaces is not None and replaces not in names.values():
        raise UsageError(f"the root has no key {replaces!r}", hint=f"it has {', '.join(names.values())}")
    return [signed.keys[keyid] for keyid, name in names.items() if name != replaces]


def refresh(repository: Repository, *, everything: bool = False) -> tuple[str, ...]:
    """Signs anew what is more than half way to its expiry (the timestamp always), or everything.

    The root is signed anew only with `everything`: its keys are meant to be offline.

    Returns:
        the roles that were signed.
    """
    with repository.keys.locked():
        change = repository.load()
        due = [role for role in ("targets", "snapshot") if everything or _is_due(change, role)]
        if everything:
            repository.renew_root(change)
        if "targets" in due:
            repository.publish(change)
            due = ["targets", "snapshot"]
        elif due:
            repository.publish_snapshot(change)
        else:
            repository.publish_timestamp(change)
    return (*(["root"] if everything else []), *due, "timestamp")


def status(repository: Repository) -> tuple[dict[str, RoleStatus], Change]:
    """Versions, expiry and keys of the four roles, and everything that is offered; needs no passphrase."""
    change = repository.load()
    roles = {}
    for role in ROLES:
        signed = getattr(change, role).signed
        entry = change.root.signed.roles[role]
        names = tuple(
            change.ring.keys[keyid].name if keyid in change.ring.keys else keyid[:12]
            for keyid in entry.keyids
        )
        left = (signed.expires.timestamp() - time.time()) / 86400
        roles[role] = RoleStatus(signed.version, left, names, entry.threshold)
    return roles, change


def metadata_size(change: Change) -> int:
    """Bytes of metadata that an update fetches: timestamp, snapshot and targets (a new root apart)."""
    return sum(len(part.to_bytes()) for part in (change.timestamp, change.snapshot, change.targets))


def superseded(offers: tuple[Offer, ...], name: str) -> tuple[Offer, ...]:
    """The versions of a line that no device needs any more.

    A version is needed while no newer one of the same base and no greater runtime is on the stable channel
    for all devices; of those that are not needed the newest stays, for devices to go back to.
    """
    line = sorted((o for o in offers if o.facts.name == name), key=lambda o: -o.facts.version)
    old: dict[str, list[Offer]] = {}
    for offer in line:
        if any(_covers(other, offer) for other in line):
            old.setdefault(offer.facts.fit, []).append(offer)
    return tuple(offer for found in old.values() for offer in found[1:])


def _covers(newer: Offer, older: Offer) -> bool:
    a, b = newer.facts, older.facts
    return (
        a.version > b.version
        and a.fit == b.fit
        and a.base.tokenizer in (None, b.base.tokenizer)
        and (a.channel, a.rollout) == ("stable", FULL_ROLLOUT)
        and parse_runtime(a.runtime, a.name) <= parse_runtime(b.runtime, b.name)
    )


def _enter(change: Change, facts: AdapterFacts) -> None:
    """Adds the base of a new entry to the table of bases, so that the entry can be read."""
    offer = Offer(Entry(adapter_path(facts.name, facts.version), 0, ""), facts)
    added = serialize_extra(Catalogue((offer,)))
    change.targets.signed.unrecognized_fields[EXTRA]["bases"].update(added["bases"])


def _tidy(change: Change, versions: Mapping[str, int]) -> None:
    """Drops bases that no adapter refers to, and keeps the last used versions: none comes back.

    What adapters have in common is written once.
    """
    signed, catalogue = change.targets.signed, replace(change.catalogue, versions=versions)
    signed.unrecognized_fields[EXTRA] = extra = serialize_extra(catalogue)
    for offer in catalogue.adapters:
        custom = serialize_adapter_facts(offer.facts, extra.get("usual", {}))
        signed.targets[offer.entry.path].unrecognized_fields["custom"] = custom


def _find(change: Change, name: str, version: int) -> Offer:
    for offer in change.catalogue.adapters:
        if (offer.facts.name, offer.facts.version) == (name, version):
            return offer
    listed = ", ".join(f"{o.facts.name} {o.facts.version}" for o in change.catalogue.adapters) or "nothing"
    raise UsageError(f"no adapter {name!r} of version {version} is published", hint=f"published: {listed}")


def _is_due(change: Change, role: str) -> bool:
    signed = getattr(change, role).signed
    return bool(signed.expires.timestamp() - time.time() < change.ring.days[role] * 86400 / 2)
