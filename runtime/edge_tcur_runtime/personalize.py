"""Personalisation: fine-tune the factors on the user's own data, under a memory budget.

From a bundle and a data set to a better adapter, or none; the loop itself is in `edge_tcur_runtime.trainer`.
Nothing leaves the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edge_tcur_runtime import __version__
from edge_tcur_runtime.batch import Batch
from edge_tcur_runtime.budget import Budget, read_memory
from edge_tcur_runtime.checkpoint import ENGINE, Checkpoints, Progress, identify
from edge_tcur_runtime.coordinates import Coordinates, read_coordinates, still_parts
from edge_tcur_runtime.data import Dataset, check_trainable, encode_targets, split
from edge_tcur_runtime.engines import choose_engine, open_engine
from edge_tcur_runtime.engines.graphs import LAST, engine_for, graph_to_try
from edge_tcur_runtime.engines.providers import AUTO, CPU
from edge_tcur_runtime.engines.selfcheck import Choice, choose_again, choose_for_training
from edge_tcur_runtime.errors import EdgeError, IncompatibleError, IntegrityError, UsageError
from edge_tcur_runtime.feeds import check_fit
from edge_tcur_runtime.fitting import Site, fit, preview
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, Bundle
from edge_tcur_runtime.formats.digest import digest_bytes, digest_file
from edge_tcur_runtime.formats.weights import FP32
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.keeper import Keeper, open_keeper
from edge_tcur_runtime.origin import (
    PERSONAL,
    UNJUDGED,
    blank_adapter,
    bundle_adapter,
    content_digest,
    is_judged,
    starting_from,
)
from edge_tcur_runtime.outcome import Outcome, judges, patience_for
from edge_tcur_runtime.planner import Plan
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.privacy import new_key, plan_privacy
from edge_tcur_runtime.reference import read_reference
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings
from edge_tcur_runtime.tasks import ACCURACY, find_device_task
from edge_tcur_runtime.trainer import Trainer, begin, train

__all__ = ["PersonalizeResult", "blank_adapter", "bundle_adapter", "personalize"]

_ON = " on "  # between engine and provider
_PROVENANCE = {"tool": f"edge-tcur-runtime {__version__}", **PERSONAL}
_LIBRARIES_BYTES = 32 * 2**20  # what loading an engine adds apart from the base: sessions and graphs
# What the same command needs, started again, differs: over 20 processes by 0.15 % (71.4 to 71.5 MiB) before
# loading, by 0.4 % at the end. Named to the byte, a budget was refused by the next process in 7 of 20 trials.
_VARIATION = 64  # so the budget that is named has this part more, four times as much


@dataclass(frozen=True)
class PersonalizeResult:
    """What a personalisation did.

    Attributes:
        adapter: the new adapter.
        better: whether it is kept, and put in use unless it is `withheld`: it beats the adapter that it
            started from, and the one in use, on the held-out part, or where there is none is no worse on what
            it was trained on, and does not fall behind on the bundle's reference set, where there is one.
            verdict: why, in words.
        judged_by: what judged it, of ``held-out``, ``reference`` and ``training``; empty where nothing did.
        withheld: why it is kept and not put in use (nothing judged it, and the one in use was); None where it
            is.
        metric: name of the score (`edge_tcur_runtime.tasks`).
        score_before, score_after: on the held-out part; None without one.
        loss_before, loss_after: mean loss on the held-out part; None without one.
        losses: mean loss of every step; scores, held_out_losses: on the held-out part, of every epoch.
        kept_epoch: number (from 1) of the epoch whose values the adapter has (`edge_tcur_runtime.outcome`);
            None without a held-out part, where it is the last one. stopped_early: epochs were left out.
        reference: scores on the bundle's reference set (`edge_tcur_runtime.outcome.Yardstick`); None without.
        training: scores on what was trained on, where nothing was held out. in_use: score of the adapter in
            use on the held-out part, or there; None where it is the start.
        engine, engine_reason: which engine ran, and why.
        graph: role of the bundle's graph that it ran; threads: CPU threads that it ran on.
        provider, provider_reason: which execution provider ran it, and why.
        micro_batch: samples per pass that the budget allowed.
        step_seconds: median seconds of an update.
        peak_rss_bytes: highest resident memory of this process (VmHWM).
        predicted_peak_bytes: by the plan that the run was accepted under, in its first process where it went
            on; None where nothing was planned.
        base_digest_before, base_digest_after: digest of ``base.bin``.
        privacy: what was spent (`edge_tcur_runtime.privacy.PrivacyPlan`); None without privacy.
        resumed_from: updates that an earlier process had done; notes: what happened to checkpoints.
    """

    adapter: Adapter
    better: bool
    verdict: str
    judged_by: list[str]
    withheld: str | None
    metric: str
    score_before: float | None
    score_after: float | None
    loss_before: float | None
    loss_after: float | None
    losses: list[float]
    scores: list[float]
    held_out_losses: list[float]
    kept_epoch: int | None
    stopped_early: bool
    reference: dict[str, Any] | None
    engine: str
    engine_reason: str
    micro_batch: int
    step_seconds: float
    seconds: float
    peak_rss_bytes: int
    budget_bytes: int | None
    samples: int
    holdout_samples: int
    base_digest_before: str
    base_digest_after: str
    graph: str
    resumed_from: int
    predicted_peak_bytes: int | None
    notes: tuple[str, ...]
    privacy: dict[str, Any] | None
    provider: str = CPU
    provider_reason: str = ""
    threads: int = 0
    training: dict[str, Any] | None = None
    in_use: dict[str, Any] | None = None

    @property
    def accuracy_before(self) -> float | None:
        """`score_before` where the metric is accuracy, 0 to 1."""
        return self.score_before if self.metric == ACCURACY else None

    @property
    def accuracy_after(self) -> float | None:
        """`score_after` where the metric is accuracy, 0 to 1."""
        return self.score_after if self.metric == ACCURACY else None

    @property
    def accuracies(self) -> list[float]:
        """`scores` where the metric is accuracy."""
        return self.scores if self.metric == ACCURACY else []


@dataclass(frozen=True)
class RunPlan:
    """What a personalisation would do.

    Attributes:
        plan: the candidates, and the one that is taken.
        updates: of the whole run; where `patience` may end it earlier, the most there can be.
        advice: what else would help where nothing fits.
        samples, holdout_samples: to train on, and kept apart to judge the new adapter by.
        reference_samples: of the bundle's reference set, which judges it too; 0 without one.
        patience: epochs without a lower held-out loss that end the run; 0 for none
            (`edge_tcur_runtime.outcome.patience_for`).
        privacy: what the run will spend (`edge_tcur_runtime.privacy.PrivacyPlan`); None without privacy.
    """

    plan: Plan
    updates: int
    advice: tuple[str, ...]
    samples: int
    holdout_samples: int
    reference_samples: int
    patience: int
    privacy: dict[str, Any] | None

    @property
    def judged_by(self) -> list[str]:
        """What will judge the new adapter (`edge_tcur_runtime.outcome.Outcome.judged_by`)."""
        return judges(
            self.holdout_samples > 0,
            self.reference_samples > 0,
            self.holdout_samples == 0 and self.privacy is None,
        )

    def to_dict(self) -> dict[str, object]:
        """JSON values; sizes in bytes."""
        plan = self.plan
        return {
            "fits": plan.chosen is not None,
            "budget_bytes": plan.limit,
            "updates": self.updates,
            "chosen": None if plan.chosen is None else plan.chosen.to_dict(self.updates),
            "candidates": [candidate.to_dict(self.updates) for candidate in plan.candidates],
            "smallest_budget_bytes": plan.named * 2**20,
            "advice": list(self.advice),
            "samples": self.samples,
            "holdout_samples": self.holdout_samples,
            "reference_samples": self.reference_samples,
            "judged_by": self.judged_by,
            "patience": self.patience,
            "privacy": self.privacy,
        }


def personalize(
    bundle: Bundle,
    dataset: Dataset,
    settings: PersonalizeSettings,
    *,
    start: Adapter | None = None,
    keep: KeepSettings | None = None,
    in_use: Callable[[], Adapter | None] | None = None,
    accept_unjudged: bool = False,
    on_step: Callable[[int, int, float], None] | None = None,
) -> PersonalizeResult:
    """Fine-tunes the factors on `dataset`.

    Args:
        bundle: an opened bundle.
        dataset: the user's labelled samples.
        start: the adapter to start from; None starts from the bundle's own adapter with a core of
            zero, that is from the base.
        keep: where checkpoints go and when the run must wait; None keeps nothing.
        in_use: called after training: the adapter in use then (None is the base), which the new one must beat
            too where it is another than `start`; None compares with `start` alone.
        accept_unjudged: nothing is `withheld`.
        on_step: called with steps done, steps in all and the loss.

    Raises:
        PausedError: a signal or a gate stopped the run; the same call goes on from its checkpoint.
        DataError: no samples, one class only, or a label that the bundle does not have.
        BudgetError: the budget cannot be met, or was crossed.
        IntegrityError: ``base.bin`` changed meanwhile.
        BaseMismatchError, IncompatibleError, MissingEngineError, ConfigError: see the parts.
    """
    started = time.perf_counter()
    budget = Budget(settings.budget)
    _refuse_early(bundle, dataset, budget)
    before = digest_file(bundle.path(BASE_FILE))
    origin = starting_from(start)
    begin_from, keep = start or blank_adapter(bundle), keep or KeepSettings()
    identity = identify(bundle, begin_from, dataset, settings)
    site, reason = _prepare(bundle, dataset, settings, begin_from, _went_on(keep, identity, settings))
    name, chosen = site.default, site.chosen
    keeper = open_keeper(keep, {**identity, ENGINE: _runner(name, chosen)})
    with keeper.listening():
        progress = keeper.resume()
        trainer, outcome = _run(site, budget, keeper, progress, on_step)
        _weigh(trainer, outcome, site, in_use)
        outcome.guarded = outcome.guarded and not accept_unjudged
    memory = budget.check("at the end")
    return PersonalizeResult(
        adapter=trainer.coordinates.adapter(outcome.values, _provenance(site, outcome) | origin),
        **outcome.facts(),
        engine=trainer.engine,
        engine_reason=reason if trainer.engine == name else "the plan: the fastest that fits the budget",
        micro_batch=trainer.micro_batch,
        step_seconds=float(np.median(trainer.step_seconds or [0.0])),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=memory.peak,
        budget_bytes=settings.budget,
        samples=len(site.data[0].targets),
        holdout_samples=len(site.data[1].targets),
        base_digest_before=before,
        base_digest_after=_digest_again(bundle, before),
        graph=trainer.graph,
        resumed_from=0 if progress is None else progress.steps,
        predicted_peak_bytes=trainer.predicted or None,
        notes=(*chosen.notes, *keeper.notes, *trainer.notes, *_notes(site, outcome, trainer)),
        privacy=site.spent(),
        provider=chosen.placement.provider.name,
        provider_reason=chosen.reason,
        threads=trainer.threads,
    )


def _run(
    site: Site,
    budget: Budget,
    keeper: Keeper,
    progress: Progress | None,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[Trainer, Outcome]:
    """The updates from `progress` on, and the judgement on them."""
    (kept, held_out), settings = site.data, site.settings
    trainer, _ = fit(site, partial(_open_trainer, site, budget, keeper), budget, progress)
    if site.privacy is not None and settings.privacy is not None:
        key = "" if progress is None else progress.noise_key
        trainer.protect(site.privacy, key or new_key(settings.privacy))
    outcome = begin(trainer, held_out, site.reference) if progress is None else trainer.restore(progress)
    train(trainer, outcome, kept, held_out, settings, on_step)
    trainer.judge(outcome, site.reference)
    return trainer, outcome


def _weigh(
    trainer: Trainer, outcome: Outcome, site: Site, in_use: Callable[[], Adapter | None] | None
) -> None:
    """Scores what the new adapter is compared with beside the start's score on the held-out part: the adapter
    in use, and where nothing was held out the start and itself on the samples that it was trained on.

    These a private run does not look at: whether the adapter is put in use would tell of them without noise.
    """
    kept, held_out = site.data
    used = None if in_use is None else in_use()
    outcome.guarded = used is not None and is_judged(used)
    if outcome.before is None:
        if site.privacy is not None:
            return
        outcome.own = trainer.score_adapter(site.start, kept), trainer.score_values(outcome.values, kept)
    rival = None if in_use is None else used or blank_adapter(site.bundle)
    if rival is None or content_digest(rival) == content_digest(site.start):
        return
    try:
        outcome.rival = trainer.score_adapter(rival, kept if outcome.before is None else held_out)
    except IncompatibleError as error:
        outcome.unmatched = f"the adapter in use, another than the start, could not be scored: {error}"


def plan_personalize(
    bundle: Bundle, dataset: Dataset, settings: PersonalizeSettings, *, start: Adapter | None = None
) -> RunPlan:
    """What `personalize` would choose; a few passes are run, nothing is kept.

    Raises:
        IncompatibleError: the bundle has no tables.
        BudgetError: by the tables it fits, by what was measured it does not.
        DataError, BaseMismatchError, MissingEngineError, ConfigError: as `personalize`.
    """
    budget = Budget(settings.budget)
    _refuse_early(bundle, dataset, budget)
    site, _ = _prepare(bundle, dataset, settings, start or blank_adapter(bundle))
    make = partial(_open_trainer, site, budget, Keeper())
    plan, advice = preview(site, make, budget)
    trained, held_out = (len(part.targets) for part in site.data)
    return RunPlan(
        plan,
        site.load.updates,
        tuple(advice),
        samples=trained,
        holdout_samples=held_out,
        reference_samples=0 if site.reference is None else site.reference.spec.samples,
        patience=patience_for(settings.patience, held_out),
        privacy=site.spent(),
    )


def _prepare(
    bundle: Bundle,
    dataset: Dataset,
    settings: PersonalizeSettings,
    start: Adapter,
    went_on: str | None = None,
) -> tuple[Site, str]:
    """What the run is planned for, and why its engine is the default.

    Args:
        went_on: the provider of the checkpoint that the run goes on from; None leaves the choice open.
    """
    check_fit(bundle.manifest, start)
    task = find_device_task(bundle.manifest.task)
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root, bundle.manifest.files)
    kept, held_out = (
        Batch(part, encode_targets(part, bundle.manifest.labels), preprocess, task)
        for part in split(dataset, settings.held_out_part, settings.seed)
    )
    reference, privacy = read_reference(bundle), plan_privacy(settings, len(kept.targets))
    provider = went_on or settings.provider
    name, reason = choose_engine(engine_for(settings), bundle, find_onnxruntime(), start, provider)
    graph = graph_to_try(name, bundle, settings)
    if went_on is None:
        chosen = choose_for_training(name, graph, bundle, settings)
    else:
        chosen = choose_again(name, graph, bundle, replace(settings, provider=went_on))
    return Site(bundle, start, settings, (kept, held_out), name, chosen, reference, privacy), reason


def _coordinates(bundle: Bundle, start: Adapter, graph: str) -> Coordinates:
    """Of the adapter to start from; what the graph gives no gradient stands still."""
    coordinates = read_coordinates(bundle, start)
    if graph != LAST:
        return coordinates
    return replace(coordinates, still=still_parts(bundle.manifest))


def _provenance(site: Site, outcome: Outcome) -> dict[str, str]:
    """Where the adapter comes from; rows, columns and core were trained against the dequantised weights."""
    result, precision = dict(_PROVENANCE), site.bundle.manifest.precision
    if precision != FP32:
        result["base precision"] = precision
    if site.privacy is not None:
        result |= site.privacy.provenance(site.start.header.provenance)
    return result if outcome.judged_by else result | UNJUDGED


def _notes(site: Site, outcome: Outcome, trainer: Trainer) -> list[str]:
    """What the user should know about what was trained, how the new adapter was judged, and about privacy."""
    notes, plan, last = [], site.privacy, site.bundle.manifest.last_blocks
    if trainer.graph == LAST and not site.settings.last_blocks and last is not None:
        notes.append(
            f"nothing else fits the budget: the last {last.count} blocks alone learned (--allow-last-blocks)"
        )
    if outcome.before is None:
        reason = "of a class with one sample none is" if site.settings.held_out_part else "nothing was"
        named = {"reference": "the bundle's reference set", "training": "the samples that it was trained on"}
        found = [named[name] for name in outcome.judged_by]
        judge = f"{' and '.join(found)} judge it" if found else "nothing judges it"
        notes.append(f"{reason} kept apart to judge the new adapter by: {judge}")
    elif plan is not None:
        notes.append("the held-out samples are looked at without noise: for them nothing is promised")
    if plan is not None and not plan.promised:
        notes.append("the noise comes from a seed, which is no secret: nothing is promised")
    return notes


def _runner(engine: str, chosen: Choice) -> str:
    """What must be the same for a run to end with the same bits: a checkpoint belongs to it."""
    placement = chosen.placement
    if placement.provider.name == CPU:
        return engine
    pinned = f" without {digest_bytes(repr(placement.pinned).encode())}" if placement.pinned else ""
    return f"{engine}{_ON}{placement.provider.name}{pinned}"


def _went_on(keep: KeepSettings, identity: Mapping[str, str], settings: PersonalizeSettings) -> str | None:
    """The provider of this run's checkpoint, where ``auto`` might now take another one; else None."""
    if keep.directory is None or keep.resume == "no" or settings.provider != AUTO:
        return None
    with contextlib.suppress(EdgeError):  # the keeper tells
        runner = Checkpoints(keep.directory, identity).engine()
        return None if runner is None else runner.partition(_ON)[2].partition(" ")[0] or CPU
    return None


def _open_trainer(site: Site, budget: Budget, keeper: Keeper, name: str, graph: str, threads: int) -> Trainer:
    bundle = site.bundle
    engine = open_engine(name, bundle, threads=threads, graph=graph, placement=site.chosen.placement)
    coordinates = _coordinates(bundle, site.start, graph)
    return Trainer(engine, coordinates, site.data[0], site.settings, budget, keeper, graph, threads)


def _refuse_early(bundle: Bundle, dataset: Dataset, budget: Budget) -> None:
    """What can be known before anything is loaded: data without use, unknown labels, too small a budget."""
    task = find_device_task(bundle.manifest.task)
    if dataset.reads != task.reads:
        raise UsageError(
            f"the targets were read as {dataset.reads!r}; the task {task.name} takes {task.reads!r}",
            hint="read them with edge_tcur_runtime.data.read_dataset and Layout(reads=...)",
        )
    check_trainable(dataset)
    encode_targets(dataset, bundle.manifest.labels)
    if bundle.manifest.memory is not None:
        return  # the plan knows better, and is made before anything is loaded too
    memory, base_size = read_memory(), bundle.manifest.files[BASE_FILE].size
    needed = max(memory.peak, memory.resident + base_size + _LIBRARIES_BYTES)
    budget.require(needed, "the base and the libraries", needed // _VARIATION)


def _digest_again(bundle: Bundle, before: str) -> str:
    path = bundle.path(BASE_FILE)
    after = digest_file(path)
    if after != before:
        raise IntegrityError(
            f"the base changed during the run: its digest was {before} and is {after}",
            where=str(path),
            hint="nothing was installed; copy or download the bundle again",
        )
    return after
