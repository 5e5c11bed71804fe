"""What a signed repository says of its adapters and bundles: the custom fields of TUF's targets role.

The targets metadata is signed and its size is paid by every device at every change, so facts that
adapters share stand once:

    signed["x-edge-tcur"]   {"format_version": 1, "bases": {id: base}, "versions": {name: last used}}
                            (the last used version only where it is above every listed one),
                            "usual"?: base, fit, rank, runtime of an adapter that leaves them out
    base                    {"digest", "task", "tokenizer"?, "canary"?}
    target["custom"]        adapter: {"base"?: id, "fit"?, "rank"?, "runtime"?, "channel"?, "rollout"?,
                            "format"?, "metrics"?, "canary"?, "card"?}
                            bundle:  {"base": digest}
    path                    adapters/<name>/<version>.safetensors, bundles/<name>/<version>.json

Signed JSON (OLPC canonical) has no fractions: `rollout` counts hundredths of a percent, canary outputs
thousandths, metrics are decimal strings. What is left out is stable, for all devices, format 1.
An entry that this version does not understand is skipped with the reason; the others stay usable.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edge_tcur_runtime.errors import EdgeError, FileFormatError, UsageError
from edge_tcur_runtime.formats.adapter import check_version
from edge_tcur_runtime.formats.digest import PREFIX, digest_bytes
from edge_tcur_runtime.formats.schema import Fields

FORMAT_VERSION = 1
EXTRA = "x-edge-tcur"
CHANNELS = ("stable", "beta")  # a device on beta takes stable ones too
TARGETS = "targets"  # directory of the repository
USUAL = ("base", "fit", "rank", "runtime")  # what lines of adapters mostly have in common
FULL_ROLLOUT = 10_000  # hundredths of a percent
MAX_CANARY = 16  # samples
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")
_PATH = re.compile(r"([a-z]+)/([a-z0-9][a-z0-9._-]{0,47})/([1-9][0-9]{0,8})\.([a-z]+)")
_RUNTIME = re.compile(r"\d{1,5}(\.\d{1,5}){0,3}")


@dataclass(frozen=True)
class BaseFacts:
    """What a bundle must be for an adapter to fit.

    Attributes:
        digest: ``sha256:<hex>`` of the base's tensors.
        task: task name.
        tokenizer: ``sha256:<hex>`` of ``tokenizer.json``; None for images.
        canary: ``sha256:<hex>`` of the canary's inputs; None where none was known.
    """

    digest: str
    task: str
    tokenizer: str | None = None
    canary: str | None = None


@dataclass(frozen=True)
class CanaryAnswers:
    """What the adapter answers to the first canary samples: the place of each one's largest raw output (of a
    classification its class), and that output in thousandths."""

    answers: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFacts:
    """The signed custom metadata of one adapter.

    Attributes:
        name: of the line of adapters; `version` counts within it and never comes back.
        channel: one of `CHANNELS`.
        rollout: part of the devices that take it, in hundredths of a percent.
        base: what it fits.
        fit: 16 hex digits over groups, labels, task and head (`edge_tcur_runtime.feeds.fit_digest`).
        rank: the largest rank of its groups.
        format_version: of the adapter file.
        runtime: the least version of edge-tcur-runtime, e.g. ``"0.1.0"``.
        metrics: name -> decimal number, as the publisher measured it.
        canary: expected answers; None where no bundle was given.
        card: the first 32 hex digits of the SHA-256 of its model card; None without.
    """

    name: str
    version: int
    channel: str
    rollout: int
    base: BaseFacts
    fit: str
    rank: int
    format_version: int
    runtime: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    canary: CanaryAnswers | None = None
    card: str | None = None


@dataclass(frozen=True)
class BundleFacts:
    """The signed custom metadata of a published bundle; `base` is its base digest."""

    name: str
    version: int
    base: str


@dataclass(frozen=True)
class Entry:
    """A target as TUF describes it: path in the repository, bytes, SHA-256 (hex), custom object."""

    path: str
    size: int
    sha256: str
    custom: object = None


def target_place(path: str, sha256: str) -> str:
    """Where the file of a target lies in the repository: under its consistent name."""
    folder, _, name = path.rpartition("/")
    return f"{TARGETS}/{folder}/{sha256}.{name}"


@dataclass(frozen=True)
class Offer:
    """An adapter in the repository."""

    entry: Entry
    facts: AdapterFacts

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the adapter's file, its name in the device's store."""
        return PREFIX + self.entry.sha256


@dataclass(frozen=True)
class BundleOffer:
    """A bundle in the repository; the entry is that of its index (`formats.chunks`)."""

    entry: Entry
    facts: BundleFacts


@dataclass(frozen=True)
class Catalogue:
    """Everything that the targets role offers.

    Attributes:
        adapters, bundles: in the order of their paths.
        skipped: path -> why the entry could not be understood.
        versions: name -> the highest version ever used.
        usual: of `USUAL`, what an entry that leaves it out has.
    """

    adapters: tuple[Offer, ...] = ()
    bundles: tuple[BundleOffer, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    usual: Mapping[str, object] = field(default_factory=dict)


def check_offer_name(name: str) -> None:
    """Raises UsageError for a name that cannot be part of a path and a URL."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a published adapter",
            hint="use at most 48 lower-case letters, digits, '.', '_' or '-', first a letter or digit",
        )


def parse_runtime(text: str, where: str) -> tuple[int, ...]:
    """A version such as ``0.1.0`` as numbers; FileFormatError for anything else."""
    if not _RUNTIME.fullmatch(text):
        raise FileFormatError(f"{text!r} is not a version such as 0.1.0", where=where)
    return tuple(int(part) for part in text.split("."))


def release_of(version: str) -> str:
    """The release that a version belongs to: ``0.1.0`` for ``0.1.0.dev3+local``; ``0`` where it has none."""
    match = _RUNTIME.match(version)
    return match.group() if match else "0"


def adapter_path(name: str, version: int) -> str:
    """Target path of an adapter."""
    return f"adapters/{name}/{version}.safetensors"


def bundle_path(name: str, version: int) -> str:
    """Target path of a bundle's index."""
    return f"bundles/{name}/{version}.json"


def base_id(base: BaseFacts) -> str:
    """The short name of a base's facts in the table of bases."""
    return digest_bytes(json.dumps(_serialize_base(base), sort_keys=True).encode())[len(PREFIX) :][:8]


def serialize_extra(catalogue: Catalogue) -> dict[str, Any]:
    """The object under `EXTRA` for these offers."""
    bases = {base_id(offer.facts.base): _serialize_base(offer.facts.base) for offer in catalogue.adapters}
    listed = dict[str, int]()
    for offer in catalogue.adapters:
        listed[offer.facts.name] = max(listed.get(offer.facts.name, 0), offer.facts.version)
    versions = {name: last for name, last in catalogue.versions.items() if last > listed.get(name, 0)}
    extra = {"format_version": FORMAT_VERSION, "bases": bases, "versions": versions}
    usual = usual_facts(catalogue)
    return extra | ({"usual": usual} if usual else {})


def usual_facts(catalogue: Catalogue) -> dict[str, object]:
    """What at least two adapters, and more than any other, have in common.

    An entry that this version does not understand may lean on what is there: then nothing changes.
    """
    if catalogue.skipped:
        return dict(catalogue.usual)
    entries = [serialize_adapter_facts(offer.facts) for offer in catalogue.adapters]
    usual = dict[str, object]()
    for key in USUAL:
        counts = Counter(entry[key] for entry in entries).most_common(1)
        if counts and counts[0][1] > 1:
            usual[key] = counts[0][0]
    return usual


def serialize_adapter_facts(
    facts: AdapterFacts, usual: Mapping[str, object] = MappingProxyType({})
) -> dict[str, Any]:
    """The custom object of an adapter's target, without what is `usual`."""
    custom: dict[str, Any] = {
        "base": base_id(facts.base),
        "fit": facts.fit,
        "rank": facts.rank,
        "runtime": facts.runtime,
    }
    if facts.canary is not None:
        custom["canary"] = [list(facts.canary.answers), list(facts.canary.outputs)]
    more = {
        "channel": (facts.channel, CHANNELS[0]),
        "rollout": (facts.rollout, FULL_ROLLOUT),
        "format": (facts.format_version, 1),
        "metrics": (dict(facts.metrics), {}),
        "card": (facts.card, None),
    }
    custom |= {key: value for key, (value, default) in more.items() if value != default}
    return {key: value for key, value in custom.items() if key not in usual or usual[key] != value}


def serialize_bundle_facts(facts: BundleFacts) -> dict[str, Any]:
    """The custom object of a bundle's target."""
    return {"base": facts.base}


def parse_catalogue(extra: object, entries: list[Entry], where: str) -> Catalogue:
    """The offers of verified targets metadata.

    Args:
        extra: the object under `EXTRA`; None where the repository has none.
        entries: every target.
        where: names the metadata in messages.

    Raises:
        FormatVersionError: written by a newer version of the publisher.
        FileFormatError: the object under `EXTRA` is malformed. A malformed entry is only skipped.
    """
    fields = Fields(extra if isinstance(extra, dict) else {"format_version": 0}, f"{where}: {EXTRA}")
    if extra is None:
        return Catalogue(skipped={entry.path: "not published by edge-tcur" for entry in entries})
    check_version(fields, FORMAT_VERSION)
    bases = fields.children("bases")
    versions = fields.child("versions")
    usual = {} if fields.is_null("usual") else dict(fields.mapping("usual"))
    adapters, bundles, skipped = [], [], {}
    for entry in sorted(entries, key=lambda entry: entry.path):
        found = _parse_entry(entry, bases, usual, f"{where}: {entry.path}")
        if isinstance(found, Offer):
            adapters.append(found)
        elif isinstance(found, BundleOffer):
            bundles.append(found)
        else:
            skipped[entry.path] = found
    known = {name: versions.integer(name) for name in versions.mapping_keys()}
    for offer in adapters:
        known[offer.facts.name] = max(known.get(offer.facts.name, 0), offer.facts.version)
    return Catalogue(tuple(adapters), tuple(bundles), skipped, known, usual)


def _serialize_base(base: BaseFacts) -> dict[str, str]:
    more = {"tokenizer": base.tokenizer, "canary": base.canary}
    return {"digest": base.digest, "task": base.task} | {
        key: value for key, value in more.items() if value is not None
    }


def _parse_base(fields: Fields) -> BaseFacts:
    fields.only("digest", "task", "tokenizer", "canary")
    return BaseFacts(
        fields.text("digest"),
        fields.text("task"),
        fields.optional_text("tokenizer"),
        fields.optional_text("canary"),
    )


def _parse_entry(
    entry: Entry, bases: Mapping[str, Fields], usual: Mapping[str, object], where: str
) -> Offer | BundleOffer | str:
    """An offer, or why the entry cannot be understood."""
    given = entry.custom if isinstance(entry.custom, dict) else {}
    try:
        if entry.path.startswith("bundles/"):
            return BundleOffer(entry, _parse_bundle(Fields(given, where), entry))
        return Offer(entry, _parse_adapter(Fields({**usual, **given}, where), entry, bases))
    except EdgeError as error:
        return f"cannot be understood by this version: {error.message}"


def _parse_adapter(fields: Fields, entry: Entry, bases: Mapping[str, Fields]) -> AdapterFacts:
    fields.only(
        "base", "fit", "rank", "runtime", "channel", "rollout", "format", "metrics", "canary", "card"
    )  # fmt: skip
    name, version = _parse_path(entry, "adapters", "safetensors", fields.where)
    base = bases.get(fields.text("base"))
    if base is None:
        raise FileFormatError("its base is not in the table of bases", where=fields.where)
    runtime = fields.text("runtime")
    parse_runtime(runtime, fields.where)
    metrics = Fields({}, "") if fields.is_null("metrics") else fields.child("metrics")
    return AdapterFacts(
        name,
        version,
        CHANNELS[0] if fields.is_null("channel") else fields.choice("channel", CHANNELS),
        FULL_ROLLOUT if fields.is_null("rollout") else fields.integer("rollout", high=FULL_ROLLOUT),
        _parse_base(base),
        fields.text("fit"),
        fields.integer("rank", low=1),
        1 if fields.is_null("format") else fields.integer("format", low=1),
        runtime,
        {key: metrics.text(key) for key in metrics.mapping_keys()},
        _parse_canary(fields),
        fields.optional_text("card"),
    )


def _parse_bundle(fields: Fields, entry: Entry) -> BundleFacts:
    fields.only("base")
    return BundleFacts(*_parse_path(entry, "bundles", "json", fields.where), fields.text("base"))


def _parse_canary(fields: Fields) -> CanaryAnswers | None:
    if fields.is_null("canary"):
        return None
    parts = fields.items("canary")
    if len(parts) != 2 or not all(isinstance(part, list) and len(part) <= MAX_CANARY for part in parts):
        raise FileFormatError(f"'canary' must hold two lists of at most {MAX_CANARY}", where=fields.where)
    numbers = [number for part in parts for number in part]
    if len(parts[0]) != len(parts[1]) or not all(type(number) is int for number in numbers):
        raise FileFormatError("'canary' must hold two lists of integers, of one length", where=fields.where)
    return CanaryAnswers(tuple(parts[0]), tuple(parts[1]))


def _parse_path(entry: Entry, folder: str, ending: str, where: str) -> tuple[str, int]:
    """Name and version from a target's path."""
    match = _PATH.fullmatch(entry.path)
    if match is None or match.group(1, 4) != (folder, ending) or not _HEX.fullmatch(entry.sha256):
        raise FileFormatError(f"expected {folder}/<name>/<version>.{ending}, with a SHA-256", where=where)
    return match.group(2), int(match.group(3))
