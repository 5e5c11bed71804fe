"""The training loop: one adapter's factors moved over one data set, for every engine.

An engine computes loss and gradients, `edge_tcur_runtime.optimizer` moves the factors, a guard watches the
peak memory between passes, and a keeper is told of every update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_tcur_runtime.budget import Budget, Memory, choose_micro_batch, read_memory
from edge_tcur_runtime.checkpoint import Progress
from edge_tcur_runtime.coordinates import Coordinates
from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.engines import StepResult, TrainingEngine
from edge_tcur_runtime.engines.graphs import keeps_within
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.factors import FACTOR_PARTS
from edge_tcur_runtime.keeper import Keeper
from edge_tcur_runtime.optimizer import build_optimizer, schedule
from edge_tcur_runtime.outcome import Outcome, Yardstick, patience_for
from edge_tcur_runtime.preprocess import Preprocessor
from edge_tcur_runtime.privacy import Mechanism, PrivacyPlan, steps_per_epoch
from edge_tcur_runtime.reference import ReferenceSet
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.tasks import DeviceTask, mean_by_weight


@dataclass(frozen=True)
class Batch:
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
        keeper: told of every update; may end the run after any pass.
        graph: role of the graph that the engine runs.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        coordinates: Coordinates,
        data: Batch,
        settings: PersonalizeSettings,
        budget: Budget,
        keeper: Keeper | None = None,
        graph: str = "step",
    ) -> None:
        self._engine = engine
        self.graph = graph
        self._keeper = keeper or Keeper()
        self._coordinates = coordinates
        self._data = data
        self._settings = settings
        self._budget = budget
        self._frozen = {
            name: value
            for name, value in coordinates.start.feeds().items()
            if name.rpartition(".")[2] in FACTOR_PARTS[1:] and name not in coordinates.start.extras
        }
        self._mechanism: Mechanism | None = None
        self._optimizer = build_optimizer(settings.optimizer)
        self._move(coordinates.initial())
        self.micro_batch = settings.batch_size
        self._growth, self._peak_two = 0, 0
        self.step_seconds: list[float] = []

    def protect(self, plan: PrivacyPlan, key: str) -> None:
        """Trains with differential privacy from here on: sample by sample, as each one's gradient is bounded.
        The sum with its noise is not clipped again."""
        self._mechanism = Mechanism(plan, key)
        self._settings = replace(
            self._settings, optimizer=replace(self._settings.optimizer, max_gradient_norm=0.0)
        )
        self._optimizer = build_optimizer(self._settings.optimizer)
        self.micro_batch = 1

    def batch(self, order: np.ndarray, step: int, place: int) -> np.ndarray:
        """Numbers of the samples of update `step`: those of `order` from `place` on, or drawn by the privacy
        mechanism, which knows no order."""
        if self._mechanism is not None:
            return self._mechanism.chosen(step)
        return order[place : place + self._settings.batch_size]

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
        self._growth, self._peak_two = growth, two.peak
        self.micro_batch = choose_micro_batch(
            self._settings.batch_size, self._budget.limit, two.peak - growth, two.peak
        )

    def leaves_room(self, blocks: int) -> bool:
        """Whether the plain step surely fits, after `calibrate` with the graph that recomputes `blocks`."""
        limit = self._budget.limit
        return limit is None or keeps_within(limit, self._peak_two, self._growth, blocks)

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

    def _run(
        self, indices: np.ndarray, data: Batch | ReferenceSet, what: str
    ) -> tuple[StepResult, np.ndarray]:
        inputs, targets = data.take(indices)
        result = self._engine.step(inputs, targets, self._feeds)
        self._budget.check(what)
        self._keeper.check()
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

    def _accumulate_private(
        self, mechanism: Mechanism, indices: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """As `_accumulate`, under the mechanism: of no samples it is all noise, and the loss 0."""
        loss, total = 0.0, {name: np.zeros_like(value) for name, value in self.values.items()}
        for index in indices:
            result, _ = self._run(np.array([index]), self._data, "by a training step")
            loss += result.loss / len(indices)
            for name, gradient in mechanism.bounded(self._coordinates.pull_back(result.gradients)).items():
                total[name] += gradient
        return loss, mechanism.noised(total, self._optimizer.steps)

    def _gradients(self, indices: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        if self._mechanism is not None:
            return self._accumulate_private(self._mechanism, indices)
        return self._accumulate(indices)

    def step(self, indices: np.ndarray, progress: float) -> float:
        """One update over the samples at `indices`; returns their mean loss.

        Args:
            progress: factor of the peak learning rates at this step.

        Raises:
            BudgetError: the memory budget was crossed.
            ConfigError: the loss or a gradient is not finite.
        """
        started = time.perf_counter()
        settings = self._settings.optimizer
        rates = {
            name: progress
            * (settings.learning_rate if self._coordinates.is_core(name) else settings.head_learning_rate)
            for name in self.values
        }
        try:
            loss, total = self._gradients(indices)
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

    def keep(self, outcome: Outcome) -> None:
        """Tells the keeper where the run stands, between two updates."""
        progress = Progress(
            steps=self._optimizer.steps,
            values=self.values,
            first=dict(self._optimizer.first),
            second=dict(self._optimizer.second),
            best={} if not outcome.scores or outcome.values is self.values else outcome.values,
            losses=tuple(outcome.losses),
            scores=tuple(outcome.scores),
            held_out_losses=tuple(outcome.held_out_losses),
            before=outcome.before,
            after=outcome.after,
            reference_before=outcome.reference_before,
            noise_key="" if self._mechanism is None else self._mechanism.key,
            micro_batch=self.micro_batch,
            graph=self.graph,
        )
        self._keeper.reached(progress)

    def restore(self, progress: Progress) -> Outcome:
        """Goes back to where a run stood."""
        self._move(dict(progress.values))
        self._optimizer = build_optimizer(
            self._settings.optimizer, progress.first, progress.second, progress.steps
        )
        self.micro_batch = progress.micro_batch
        return Outcome(
            self._data.task,
            dict(progress.best) or self.values,
            progress.before,
            progress.after,
            list(progress.losses),
            list(progress.scores),
            list(progress.held_out_losses),
            reference_before=progress.reference_before,
        )

    def judge(self, outcome: Outcome, reference: ReferenceSet | None) -> None:
        """Scores the values that `outcome` keeps on the bundle's reference set."""
        if reference is None or outcome.reference_before is None:
            return
        self._move(outcome.values)
        outcome.yardstick = Yardstick(
            reference, self._settings.forget, outcome.reference_before, self.score(reference)
        )

    def score(self, data: Batch | ReferenceSet) -> tuple[float, float]:
        """Metric and mean loss of the current values on other samples.

        The training graph answers too: a second session would hold the base twice.
        """
        what = "held-out samples" if isinstance(data, Batch) else "the bundle's reference set"
        together = self._together(data)
        metrics, losses, weights = [], [], []
        for start in range(0, len(data.targets), together):
            indices = np.arange(start, min(start + together, len(data.targets)))
            result, targets = self._run(indices, data, f"by scoring {what}")
            scored = data.task.score(result.outputs, targets) if result.metric is None else result.metric
            metrics.append(scored)
            losses.append(result.loss)
            weights.append(data.task.weight(targets))
        return mean_by_weight(metrics, weights), mean_by_weight(losses, weights)

    def _together(self, data: Batch | ReferenceSet) -> int:
        """Samples per pass: fewer where a budget was measured with smaller ones."""
        if self._budget.limit is None or isinstance(data, Batch):
            return self.micro_batch
        largest, _ = self._data.take(self._data.longest_first()[:1])
        measured = sum(value.size for value in largest.values())
        return max(1, self.micro_batch * measured // max(measured, data.elements))


def begin(trainer: Trainer, held_out: Batch, reference: ReferenceSet | None = None) -> Outcome:
    """The outcome of no update yet: what the start scores on the held-out part and on the reference set.

    A reference set that the budget has no room for ends the run here, before any training.
    """
    outcome = Outcome(
        held_out.task, trainer.values, trainer.score(held_out) if len(held_out.targets) else None
    )
    if reference is not None:
        outcome.reference_before = trainer.score(reference)
    return outcome


def train(
    trainer: Trainer,
    outcome: Outcome,
    kept: Batch,
    held_out: Batch,
    settings: PersonalizeSettings,
    on_step: Callable[[int, int, float], None] | None,
) -> None:
    """Does the updates that `outcome` does not have yet, and completes it.

    An epoch that is done draws its order all the same, so that the next one gets the order that it would
    have had in a run without a break.
    """
    generator = np.random.Generator(np.random.PCG64(settings.seed))
    outcome.patience = patience_for(settings.patience, len(held_out.targets))
    count, size = len(kept.targets), settings.batch_size
    per_epoch = steps_per_epoch(count, settings)
    total = settings.epochs * per_epoch
    for epoch in range(settings.epochs):
        order, first = generator.permutation(count), epoch * per_epoch
        for done in range(max(first, len(outcome.losses)), first + per_epoch):
            indices = trainer.batch(order, done, (done - first) * size)
            loss = trainer.step(indices, schedule(done, total))
            outcome.losses.append(loss)
            trainer.keep(outcome)
            if on_step is not None:
                on_step(done + 1, total, loss)
        if outcome.before is not None and len(outcome.scores) <= epoch:
            outcome.scored(trainer.values, trainer.score(held_out))
            trainer.keep(outcome)
        if outcome.stalled and len(outcome.scores) < settings.epochs:
            outcome.stopped_early = True
            break
    if not outcome.scores:
        outcome.values = trainer.values
