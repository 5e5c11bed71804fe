"""Personalisation: fine-tune the factors on the user's own data, under a memory budget.

The loop is one for all engines: an engine computes loss and gradients, `edge_tcur_runtime.optimizer`
moves the factors, a guard watches the peak memory between steps. Nothing leaves the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load_file

from edge_tcur_runtime import __version__
from edge_tcur_runtime.budget import Budget, Memory, choose_micro_batch, read_memory
from edge_tcur_runtime.coordinates import Coordinates, read_coordinates
from edge_tcur_runtime.data import Dataset, check_trainable, encode_targets, split
from edge_tcur_runtime.engines import StepResult, TrainingEngine, choose_engine, open_engine
from edge_tcur_runtime.errors import ConfigError, IncompatibleError, IntegrityError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter, read_adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, Bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import FACTOR_PARTS
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.optimizer import AdamW, schedule
from edge_tcur_runtime.preprocess import Preprocessor, build_preprocessor
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.tasks import ACCURACY, DeviceTask, find_device_task, mean_by_weight, ranks

_PROVENANCE = {"tool": f"edge-tcur-runtime {__version__}", "personal": "true"}
_LIBRARIES_BYTES = 24 * 2**20  # what loading an engine adds apart from the base: sessions and graphs


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
        micro_batch: samples per pass that the budget allowed.
        step_seconds: median seconds of an update.
        peak_rss_bytes: highest resident memory of this process (VmHWM).
        base_digest_before, base_digest_after: digest of ``base.bin``.
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
class _Batch:
    """Encoded samples: preprocessing of any part of a data set, and its targets."""

    dataset: Dataset
    targets: np.ndarray
    preprocess: Preprocessor
    task: DeviceTask

    def take(self, indices: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """Model inputs and targets of the samples at `indices`."""
        inputs = self.preprocess(self.dataset.select(indices).samples)
        return inputs, self.task.batch_targets(self.targets[indices], inputs)

    def longest_first(self) -> np.ndarray:
        """Indices of the samples, the ones that need most memory first."""
        samples = self.dataset.samples
        if isinstance(samples, np.ndarray):  # pictures are all of one size
            return np.arange(len(samples))
        return np.argsort([-len(text) for text in samples], kind="stable")


class Trainer:
    """Moves the factors of one adapter over one data set.

    Args:
        engine: computes loss and gradients.
        coordinates: of the adapter that training starts from.
        data: the training samples.
        settings: see `PersonalizeSettings`.
        budget: checked after every pass.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        coordinates: Coordinates,
        data: _Batch,
        settings: PersonalizeSettings,
        budget: Budget,
    ) -> None:
        self._engine = engine
        self._coordinates = coordinates
        self._data = data
        self._settings = settings
        self._budget = budget
        self._frozen = {
            name: value
            for name, value in coordinates.start.feeds().items()
            if name.rpartition(".")[2] in FACTOR_PARTS[1:] and name not in coordinates.start.extras
        }
        self._optimizer = AdamW(settings.optimizer)
        self._move(coordinates.initial())
        self.micro_batch = settings.batch_size
        self.step_seconds: list[float] = []

    def calibrate(self) -> None:
        """Runs steps of one and two samples, the longest ones, and chooses the micro-batch that fits.

        Raises:
            BudgetError: not even two samples fit.
        """
        if self._budget.limit is None:
            return
        longest = self._data.longest_first()
        one, two = (self._measure(longest[:count]) for count in (1, 2))
        # Loading may have left a peak above what a step needs; what is resident then shows the growth.
        growth = max(two.peak - one.peak, two.resident - one.resident)
        self.micro_batch = choose_micro_batch(
            self._settings.batch_size, self._budget.limit, two.peak - growth, two.peak
        )

    def _measure(self, indices: np.ndarray) -> Memory:
        self._run(indices, self._data, "by a step of one or two samples")
        return read_memory()

    def _move(self, values: dict[str, np.ndarray]) -> None:
        """Takes these values (float64) as the trained ones.

        Raises:
            FloatingPointError: one of them is beyond float32; the old ones stay.
        """
        raw = self._coordinates.raw(values)
        if not all(np.isfinite(value).all() for value in raw.values()):
            raise FloatingPointError("a factor is too large for float32")
        self.values, self._feeds = values, {**self._frozen, **raw}

    def _run(self, indices: np.ndarray, data: _Batch, what: str) -> tuple[StepResult, np.ndarray]:
        inputs, targets = data.take(indices)
        result = self._engine.step(inputs, targets, self._feeds)
        self._budget.check(what)
        return result, targets

    def _accumulate(self, indices: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss and its gradients over all samples, micro-batch by micro-batch: each counts by its
        weight, so that the update is that of one batch of all of them."""
        loss, total = 0.0, {name: np.zeros_like(value) for name, value in self.values.items()}
        weights = 0
        for start in range(0, len(indices), self.micro_batch):
            chosen = indices[start : start + self.micro_batch]
            result, targets = self._run(chosen, self._data, "by a training step")
            weight = self._data.task.weight(targets)
            weights += weight
            loss += result.loss * weight
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused in `step`
                for name, gradient in self._coordinates.pull_back(result.gradients).items():
                    total[name] += gradient * weight
        scale = 1 / max(1, weights)
        with np.errstate(invalid="ignore"):
            return loss * scale, {name: value * scale for name, value in total.items()}

    def step(self, indices: np.ndarray, progress: float) -> float:
        """One update over the samples at `indices`; returns their mean loss.

        Args:
            progress: factor of the peak learning rates at this step.

        Raises:
            BudgetError: the memory budget was crossed.
            ConfigError: the loss or a gradient is not finite.
        """
        started = time.perf_counter()
        loss, total = self._accumulate(indices)
        settings = self._settings.optimizer
        rates = {
            name: progress
            * (settings.learning_rate if self._coordinates.is_core(name) else settings.head_learning_rate)
            for name in self.values
        }
        try:
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            self._move(self._optimizer.step(self.values, total, rates))
        except FloatingPointError as error:
            raise ConfigError(
                f"training diverged: {error}",
                where="learning_rate",
                hint="use a lower --learning-rate; nothing was installed",
            ) from error
        self.step_seconds.append(time.perf_counter() - started)
        return loss

    def score(self, data: _Batch) -> tuple[float, float]:
        """Metric and mean loss on other samples.

        The training graph answers too: a second session would hold the base twice.
        """
        metrics, losses, weights = [], [], []
        for start in range(0, len(data.targets), self.micro_batch):
            indices = np.arange(start, min(start + self.micro_batch, len(data.targets)))
            result, targets = self._run(indices, data, "by scoring held-out samples")
            scored = data.task.score(result.outputs, targets) if result.metric is None else result.metric
            metrics.append(scored)
            losses.append(result.loss)
            weights.append(data.task.weight(targets))
        return mean_by_weight(metrics, weights), mean_by_weight(losses, weights)


def personalize(
    bundle: Bundle,
    dataset: Dataset,
    settings: PersonalizeSettings,
    *,
    start: Adapter | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> PersonalizeResult:
    """Fine-tunes the factors on `dataset`.

    Args:
        bundle: an opened bundle.
        dataset: the user's labelled samples.
        start: the adapter to start from; None starts from the bundle's own adapter with a core of
            zero, that is from the base.
        on_step: called with steps done, steps in all and the loss.

    Raises:
        DataError: no samples, one class only, or a label that the bundle does not have.
        BudgetError: the budget cannot be met, or was crossed.
        IntegrityError: ``base.bin`` changed meanwhile.
        BaseMismatchError, IncompatibleError, MissingEngineError, ConfigError: see the parts.
    """
    started = time.perf_counter()
    budget = Budget(settings.budget)
    _refuse_early(bundle, dataset, budget)
    before = digest_file(bundle.path(BASE_FILE))
    start = start or blank_adapter(bundle)
    build_feeds(bundle.manifest, start)
    task = find_device_task(bundle.manifest.task)
    name, reason = choose_engine(settings.engine, bundle, find_onnxruntime(), start)
    coordinates = read_coordinates(bundle, start)
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    kept, held_out = (
        _Batch(part, encode_targets(part, bundle.manifest.labels), preprocess, task)
        for part in split(dataset, settings.holdout, settings.seed)
    )
    engine = open_engine(name, bundle, threads=settings.threads)
    trainer = Trainer(engine, coordinates, kept, settings, budget)
    trainer.calibrate()
    outcome = _train(trainer, kept, held_out, settings, on_step)
    memory = budget.check("at the end")
    return PersonalizeResult(
        adapter=coordinates.adapter(outcome.values, _PROVENANCE),
        better=outcome.better,
        metric=task.metric.name,
        score_before=outcome.before[0] if outcome.before else None,
        score_after=outcome.after[0] if outcome.after else None,
        loss_before=outcome.before[1] if outcome.before else None,
        loss_after=outcome.after[1] if outcome.after else None,
        losses=outcome.losses,
        scores=outcome.scores,
        engine=name,
        engine_reason=reason,
        micro_batch=trainer.micro_batch,
        step_seconds=float(np.median(trainer.step_seconds)),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=memory.peak,
        budget_bytes=settings.budget,
        samples=len(kept.targets),
        holdout_samples=len(held_out.targets),
        base_digest_before=before,
        base_digest_after=_digest_again(bundle, before),
    )


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


@dataclass
class _Outcome:
    """Values of the last epoch, and scores (metric, loss) on the held-out part."""

    task: DeviceTask
    values: dict[str, np.ndarray]
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def better(self) -> bool:
        """A better metric than before, or the same at a lower loss, which must be a number."""
        if self.before is None or self.after is None:
            return True
        return bool(np.isfinite(self.after[1])) and ranks(self.task, *self.after) > ranks(
            self.task, *self.before
        )


def _train(
    trainer: Trainer,
    kept: _Batch,
    held_out: _Batch,
    settings: PersonalizeSettings,
    on_step: Callable[[int, int, float], None] | None,
) -> _Outcome:
    generator = np.random.Generator(np.random.PCG64(settings.seed))
    count = len(kept.targets)
    total = settings.epochs * -(-count // settings.batch_size)
    outcome = _Outcome(kept.task, trainer.values, trainer.score(held_out) if len(held_out.targets) else None)
    for _ in range(settings.epochs):
        order = generator.permutation(count)
        for begin in range(0, count, settings.batch_size):
            done = len(outcome.losses)
            loss = trainer.step(order[begin : begin + settings.batch_size], schedule(done, total))
            outcome.losses.append(loss)
            if on_step is not None:
                on_step(done + 1, total, loss)
        if outcome.before is not None:
            outcome.after = trainer.score(held_out)
            outcome.scores.append(outcome.after[0])
    # The last epoch, where the learning rate has come down to zero: picking the best of many epochs on
    # a few held-out samples picks the luckiest one.
    outcome.values = trainer.values
    return outcome


def blank_adapter(bundle: Bundle) -> Adapter:
    """The bundle's own adapter with cores and a head of zero: the base, ready to be trained.

    Raises:
        IncompatibleError: the bundle carries no adapter.
    """
    own = bundle_adapter(bundle)
    zero = {group: part.with_core(np.zeros_like(part.core)) for group, part in own.factors.items()}
    extras = {name: np.zeros_like(value) for name, value in own.extras.items()}
    if bundle.manifest.base_extras is not None:
        extras |= load_file(bundle.path(bundle.manifest.base_extras))
    return Adapter(own.header, zero, extras)


def bundle_adapter(bundle: Bundle) -> Adapter:
    """The adapter that was exported with the bundle.

    Raises:
        IncompatibleError: there is none.
    """
    if bundle.manifest.adapter is None:
        raise IncompatibleError("the bundle carries no adapter", where=str(bundle.root))
    return read_adapter(bundle.path(bundle.manifest.adapter))
