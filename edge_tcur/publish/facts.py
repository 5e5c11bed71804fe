"""What is signed about an adapter: read from its file, from the run beside it and from the bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_tcur_runtime import __version__ as runtime_version
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.feeds import facts_of_adapter, fit_digest
from edge_tcur_runtime.formats.adapter import FORMAT_VERSION as ADAPTER_VERSION
from edge_tcur_runtime.formats.adapter import Adapter, read_bounded
from edge_tcur_runtime.formats.bundle import MANIFEST, Bundle, open_bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.offer import (
    CHANNELS,
    FULL_ROLLOUT,
    AdapterFacts,
    BaseFacts,
    CanaryAnswers,
    check_offer_name,
    parse_runtime,
    release_of,
)
from edge_tcur_runtime.formats.schema import Fields, parse_json
from edge_tcur_runtime.update.health import canary_answers, canary_digest

TOKENIZER = "tokenizer.json"
RUN_FILE = "run.json"
_MAX_RUN_BYTES = 16 * 2**20
MAX_METRICS = 8
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
_METRIC = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class Description:
    """What the publisher says of an adapter; everything else is read from files.

    Attributes:
        name: of the line of adapters; None takes the file's name.
        channel, rollout: who gets it; `rollout` in hundredths of a percent.
        runtime: least version of the device's runtime; None takes this one's.
        metrics: name -> number, besides or instead of the run's.
        data: what it was trained on, for the model card.
        note: free text for the model card.
    """

    name: str | None = None
    channel: str = "stable"
    rollout: int = FULL_ROLLOUT
    runtime: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    data: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class RunFacts:
    """What ``run.json`` says: the resolved configuration, and what was measured."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Sources:
    """The files that facts are read from: the bundle and the run, where they are known."""

    bundle: Bundle | None
    run: RunFacts | None
    tokenizer: str | None


def find_sources(adapter: Path, bundle: Path | None) -> Sources:
    """The bundle that was named, or holds the adapter, and the run beside it.

    Raises:
        IntegrityError and others: see `open_bundle`; every file of the bundle is verified.
    """
    folder = adapter.parent
    if bundle is None and (folder / MANIFEST).is_file():
        bundle = folder
    opened = None if bundle is None else open_bundle(bundle)
    run = _read_run(folder / RUN_FILE)
    tokenizer = folder / TOKENIZER
    if opened is not None:
        entry = opened.manifest.files.get(TOKENIZER)
        return Sources(opened, run, None if entry is None else entry.sha256)
    return Sources(None, run, digest_file(tokenizer) if tokenizer.is_file() else None)


def describe(adapter: Adapter, path: Path, said: Description, version: int, sources: Sources) -> AdapterFacts:
    """The signed facts of an adapter, its answers to the canary computed with the bundle.

    Raises:
        UsageError: a name, channel, rollout or metric that cannot be published.
        HealthCheckError, BaseMismatchError: it does not work with the bundle.
    """
    name = said.name or default_name(path)
    check_offer_name(name)
    if said.channel not in CHANNELS or not 0 <= said.rollout <= FULL_ROLLOUT:
        raise UsageError(f"channel {said.channel!r}, rollout {said.rollout / 100:g} %: not possible")
    runtime = said.runtime or release_of(runtime_version)
    parse_runtime(runtime, "--min-runtime")
    base, canary = _base_facts(adapter, sources)
    return AdapterFacts(
        name,
        version,
        said.channel,
        said.rollout,
        base,
        fit_digest(adapter.header.base_digest, facts_of_adapter(adapter)),
        max(factors.rank for factors in adapter.factors.values()),
        ADAPTER_VERSION,
        runtime,
        _metrics(sources.run, said.metrics),
        canary,
    )


def default_name(path: Path) -> str:
    """A line's name from a file's name."""
    return _NOT_IN_NAMES.sub("-", path.stem.lower()).strip("-._") or "adapter"


def _base_facts(adapter: Adapter, sources: Sources) -> tuple[BaseFacts, CanaryAnswers | None]:
    digest, task = adapter.header.base_digest, adapter.header.task
    if sources.bundle is None:
        return BaseFacts(digest, task, sources.tokenizer), None
    bundle = sources.bundle
    answers = canary_answers(bundle, adapter)
    inputs = None if answers is None else canary_digest(bundle.root, bundle.manifest)
    return BaseFacts(digest, task, sources.tokenizer, inputs), answers


def _read_run(path: Path) -> RunFacts | None:
    """The run beside an adapter; None where there is none.

    Read here and not with `edge_tcur.training`, which takes torch and seconds to import.

    Raises:
        FileFormatError: it is damaged.
    """
    if not path.is_file():
        return None
    fields = Fields(parse_json(read_bounded(path, _MAX_RUN_BYTES), str(path)), str(path))
    return RunFacts(fields.mapping("config"), fields.mapping("metrics"))


def _metrics(run: RunFacts | None, said: Mapping[str, float]) -> dict[str, str]:
    found = dict[str, float]()
    if run is not None:
        found = {
            key: float(value)
            for key, value in run.metrics.items()
            if isinstance(value, float) and 0 <= value <= 1 and _METRIC.fullmatch(key)
        }
    found = dict(list((found | dict(said)).items())[-MAX_METRICS:])
    for key in said:
        if not _METRIC.fullmatch(key):
            raise UsageError(
                f"{key!r} cannot be the name of a metric", hint="lower-case letters, digits, '_'"
            )
    return {key: f"{value:.4f}" for key, value in found.items()}
