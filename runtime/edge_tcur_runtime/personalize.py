"""Personalisation: fine-tune the factors on the user's own data, under a memory budget.

From a bundle and a data set to a better adapter, or none; the loop itself is in `edge_tcur_runtime.trainer`.
Nothing leaves the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from edge_tcur_runtime import __version__
from edge_tcur_runtime.budget import Budget, read_memory
from edge_tcur_runtime.checkpoint import identify
from edge_tcur_runtime.coordinates import Coordinates, read_coordinates, still_parts
from edge_tcur_runtime.data import Dataset, check_trainable, encode_targets, split
from edge_tcur_runtime.engines import choose_engine, open_engine
from edge_tcur_runtime.engines.graphs import engine_for, graph_to_try
from edge_tcur_runtime.errors import IntegrityError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, Bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.weights import FP32
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.keeper import Keeper, open_keeper
from edge_tcur_runtime.origin import PERSONAL, blank_adapter, bundle_adapter, starting_from
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings
from edge_tcur_runtime.tasks import ACCURACY, find_device_task
from edge_tcur_runtime.trainer import Batch, Trainer, begin, train

__all__ = ["PersonalizeResult", "blank_adapter", "bundle_adapter", "personalize"]

_PROVENANCE = {"tool": f"edge-tcur-runtime {__version__}", **PERSONAL}
_LIBRARIES_BYTES = 32 * 2**20  # what loading an engine adds apart from the base: sessions and graphs


@dataclass(frozen=True)
class PersonalizeResult:
    """What a personalisation did.

    Attributes:
        adapter: the new adapter.
        better: whether it beats the adapter that it started from on the held-out part; True where
            there was no held-out part.
        metric: name of the score (`edge_tcur_runtime.tasks`).
        score_before, score_after: on the held-out part; None without one.
        loss_before, loss_after: mean loss on the held-out part; None without one.
        losses: mean loss of every step; scores: held-out score of every epoch.
        engine, engine_reason: which engine ran, and why.
        graph: role of the bundle's graph that it ran.
        micro_batch: samples per pass that the budget allowed.
        step_seconds: median seconds of an update.
        peak_rss_bytes: highest resident memory of this process (VmHWM).
        base_digest_before, base_digest_after: digest of ``base.bin``.
        resumed_from: updates that an earlier process had done; notes: what happened to checkpoints.
    """

    adapter: Adapter
    better: bool
    metric: str
    score_before: float | None
    score_after: float | None
    loss_before: float | None
    loss_after: float | None
    losses: list[float]
    scores: list[float]
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
    notes: tuple[str, ...]

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


def personalize(
    bundle: Bundle,
    dataset: Dataset,
    settings: PersonalizeSettings,
    *,
    start: Adapter | None = None,
    keep: KeepSettings | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> PersonalizeResult:
    """Fine-tunes the factors on `dataset`.

    Args:
        bundle: an opened bundle.
        dataset: the user's labelled samples.
        start: the adapter to start from; None starts from the bundle's own adapter with a core of
            zero, that is from the base.
        keep: where checkpoints go and when the run must wait; None keeps nothing.
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
    start = start or blank_adapter(bundle)
    build_feeds(bundle.manifest, start)
    task = find_device_task(bundle.manifest.task)
    name, reason = choose_engine(engine_for(settings), bundle, find_onnxruntime(), start)
    graph = graph_to_try(name, bundle, settings)
    coordinates = _coordinates(bundle, start, graph)
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    kept, held_out = (
        Batch(part, encode_targets(part, bundle.manifest.labels), preprocess, task)
        for part in split(dataset, settings.holdout, settings.seed)
    )
    identity = identify(bundle, start, dataset, settings, name)
    keeper = open_keeper(keep or KeepSettings(), identity)
    with keeper.listening():
        progress = keeper.resume()
        make = partial(_open_trainer, name, bundle, coordinates, kept, settings, budget, keeper)
        if progress is None:
            trainer = _calibrated(make, graph, bundle, settings)
            outcome = begin(trainer, held_out)
        else:
            trainer = make(progress.graph)
            outcome = trainer.restore(progress)
        train(trainer, outcome, kept, held_out, settings, on_step)
    memory = budget.check("at the end")
    return PersonalizeResult(
        adapter=coordinates.adapter(outcome.values, _provenance(bundle) | origin),
        **outcome.facts(),
        engine=name,
        engine_reason=reason,
        micro_batch=trainer.micro_batch,
        step_seconds=float(np.median(trainer.step_seconds or [0.0])),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=memory.peak,
        budget_bytes=settings.budget,
        samples=len(kept.targets),
        holdout_samples=len(held_out.targets),
        base_digest_before=before,
        base_digest_after=_digest_again(bundle, before),
        graph=trainer.graph,
        resumed_from=0 if progress is None else progress.steps,
        notes=keeper.notes,
    )


def _coordinates(bundle: Bundle, start: Adapter, graph: str) -> Coordinates:
    """Of the adapter to start from; what the graph gives no gradient stands still."""
    coordinates = read_coordinates(bundle, start)
    if graph != "step_last":
        return coordinates
    return replace(coordinates, still=still_parts(bundle.manifest))


def _provenance(bundle: Bundle) -> dict[str, str]:
    """Where the adapter comes from; rows, columns and core were trained against the dequantised weights."""
    precision = bundle.manifest.precision
    return _PROVENANCE if precision == FP32 else {**_PROVENANCE, "base precision": precision}


def _open_trainer(
    name: str,
    bundle: Bundle,
    coordinates: Coordinates,
    data: Batch,
    settings: PersonalizeSettings,
    budget: Budget,
    keeper: Keeper,
    graph: str,
) -> Trainer:
    engine = open_engine(name, bundle, threads=settings.threads, graph=graph)
    return Trainer(engine, coordinates, data, settings, budget, keeper, graph)


def _calibrated(
    make: Callable[[str], Trainer], graph: str, bundle: Bundle, settings: PersonalizeSettings
) -> Trainer:
    """A trainer with the micro-batch that fits, on the plain step where that fits too."""
    trainer = make(graph)
    trainer.calibrate()
    if graph == "step_recompute" and _plain_fits(trainer, bundle, settings):
        del trainer  # two sessions would hold the base twice
        trainer = make("step")
        trainer.calibrate()
    return trainer


def _plain_fits(trainer: Trainer, bundle: Bundle, settings: PersonalizeSettings) -> bool:
    """Whether the plain step may take over from the one that recomputes."""
    blocks = bundle.manifest.recomputed_blocks
    if settings.recompute != "auto" or blocks is None or bundle.graph("step") is None:
        return False
    return trainer.leaves_room(blocks)


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
    memory, base_size = read_memory(), bundle.manifest.files[BASE_FILE].size
    budget.require(
        max(memory.peak, memory.resident + base_size + _LIBRARIES_BYTES), "the base and the libraries"
    )


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
