"""The training loop: one adapter's factors moved over one data set, for every engine.

An engine computes loss and gradients, `edge_tcur_runtime.optimizer` moves the factors, a guard watches the
peak memory between passes, and a keeper is told of every update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from edge_tcur_runtime.budget import Budget, Memory, choose_micro_batch, read_memory
from edge_tcur_runtime.checkpoint import Progress
from edge_tcur_runtime.coordinates import Coordinates
from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.engines import StepResult, TrainingEngine
from edge_tcur_runtime.engines.graphs import keeps_within
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.factors import FACTOR_PARTS
from edge_tcur_runtime.guard import Guard, taken
from edge_tcur_runtime.keeper import Keeper
from edge_tcur_runtime.optimizer import AdamW, schedule
from edge_tcur_runtime.planner import Footprint, Passes, room
from edge_tcur_runtime.preprocess import Preprocessor
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.tasks import DeviceTask, mean_by_weight, ranks

_MARGIN = 1.02  # of what a pass took, for what the next one may take


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

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample as it is padded, int64 [n]; zeros where samples have no length."""
        return self._survey[0]

    @cached_property
    def picked(self) -> dict[str, np.ndarray]:
        """Model input -> the numbers in it, each once and sorted, over all samples."""
        return self._survey[1]

    @cached_property
    def _survey(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        lengths, picked = np.zeros(len(self.targets), np.int64), dict[str, np.ndarray]()
        if isinstance(self.dataset.samples, np.ndarray):
            return lengths, picked
        for place in range(len(lengths)):
            for name, value in self.preprocess(self.dataset.samples[place : place + 1]).items():
                lengths[place] = value.shape[1]
                picked[name] = np.union1d(picked[name], value) if name in picked else np.unique(value)
        return lengths, picked


@dataclass
class Outcome:
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

    def facts(self) -> dict[str, Any]:
        """What a result tells of it: name of the metric, scores and losses."""
        (score_before, loss_before), (score_after, loss_after) = (
            pair or (None, None) for pair in (self.before, self.after)
        )
        return {
            "better": self.better,
            "metric": self.task.metric.name,
            "score_before": score_before,
            "score_after": score_after,
            "loss_before": loss_before,
            "loss_after": loss_after,
            "losses": self.losses,
            "scores": self.scores,
        }


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
        self._optimizer = AdamW(settings.optimizer)
        self._move(coordinates.initial())
        self.passes = Passes(settings.batch_size)
        self.guard: Guard | None = None
        self._growth, self._peak_two = 0, 0
        self._mapped: int | None = None  # bytes of rows that the first pass made resident
        self.step_seconds: list[float] = []

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine.name

    @property
    def coordinates(self) -> Coordinates:
        """Of the adapter that training started from."""
        return self._coordinates

    @property
    def notes(self) -> tuple[str, ...]:
        """What the guard did."""
        return () if self.guard is None else tuple(self.guard.notes)

    @property
    def micro_batch(self) -> int:
        """Samples of a pass, of the longest ones where `passes` differ."""
        return self.passes.micro_batch

    @micro_batch.setter
    def micro_batch(self, samples: int) -> None:
        self.passes = Passes(samples)

    def longest_alone(self) -> Batch:
        """The longest sample, which `measure` runs before it reads what is held."""
        chosen = self._longest()[:1]
        dataset, targets = self._data.dataset.select(chosen), self._data.targets[chosen]
        return replace(self._data, dataset=dataset, targets=targets)

    def _longest(self) -> np.ndarray:
        return np.argsort(-self._data.lengths, kind="stable")

    def measure(self, footprint: Footprint, micro: int, rows: tuple[int, int]) -> Footprint:
        """Runs passes of one to `micro` of the longest samples; returns what they take.

        Args:
            footprint: what is predicted; a pass that might cross the limit by it is left out.
            micro: samples of the largest pass.
            rows: bytes of the base's tables that all samples make resident, and the longest alone.

        Raises:
            BudgetError: a pass crossed the limit.
        """
        longest = self._longest()
        length = int(self._data.lengths[longest[0]])
        before = read_memory()
        loaded, first = before.peak, self._measure(longest[:1])  # it touches the base, and what is made once
        if self._mapped is None:
            self._mapped = first.file_backed - before.file_backed - footprint.table.base
        unread = max(0, rows[0] - max(rows[1], self._mapped))  # more than a window may be mapped around a row
        found = replace(footprint, held=first.resident + unread, measured=True)
        limit = self._budget.limit
        for count in sorted({1, max(1, micro // 4), min(micro, len(longest))}):
            if limit is not None and found.peak(count, length) > room(limit) and count > 1:
                break
            started, before = time.perf_counter(), read_memory()
            after = self._measure(longest[:count])
            rate = (time.perf_counter() - started) / found.work(count, length)
            factor = _MARGIN * taken(before, after) / max(1, found.values(count, length))
            # Below the peak of loading a pass took that much at most. Small values lie in the heap and are
            # held, so that a small pass takes less than its share.
            if after.peak <= loaded:
                factor = min(found.factor, factor)
            if count < min(micro, len(longest)):
                factor = max(factor, found.factor)
            proven = max(found.proven, found.values(count, length))
            found = replace(found, rate=rate, factor=factor, proven=proven)
        return found

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

    def _run(self, indices: np.ndarray, data: Batch, what: str) -> tuple[StepResult, np.ndarray]:
        inputs, targets = data.take(indices)
        result = self._engine.step(inputs, targets, self._feeds)
        self._budget.check(what)
        self._keeper.check()
        return result, targets

    def _each(self, indices: np.ndarray, data: Batch, what: str) -> Iterator[tuple[StepResult, np.ndarray]]:
        """Results and targets of the passes over these samples; the guard may make them smaller."""
        known = self.guard is not None or bool(self.passes.limits)
        lengths = data.lengths[indices] if known else np.zeros(len(indices), np.int64)
        waiting = self.passes.form(lengths)
        while waiting:
            positions = waiting.pop(0)
            if self.guard is None:
                yield self._run(indices[positions], data, what)
                continue
            length, before = int(lengths[positions].max()), read_memory()
            fewer = self.guard.allow(len(positions), length, before)
            if fewer < len(positions):
                self.passes = self.passes.lowered(length, fewer)
                rest = np.concatenate([positions, *waiting])
                waiting = [rest[places] for places in self.passes.form(lengths[rest])]
                continue
            found = self._run(indices[positions], data, what)
            self.guard.saw(len(positions), length, before, read_memory())
            yield found

    def _accumulate(self, indices: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss and its gradients over all samples, micro-batch by micro-batch: each counts by its
        weight, so that the update is that of one batch of all of them."""
        loss, total = 0.0, {name: np.zeros_like(value) for name, value in self.values.items()}
        weights = 0
        for result, targets in self._each(indices, self._data, "by a training step"):
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

    def keep(self, outcome: Outcome) -> None:
        """Tells the keeper where the run stands, between two updates."""
        progress = Progress(
            steps=self._optimizer.steps,
            values=self.values,
            first=dict(self._optimizer.first),
            second=dict(self._optimizer.second),
            losses=tuple(outcome.losses),
            scores=tuple(outcome.scores),
            before=outcome.before,
            after=outcome.after,
            micro_batch=self.micro_batch,
            limits=self.passes.limits,
            engine=self._engine.name,
            graph=self.graph,
        )
        self._keeper.reached(progress)

    def restore(self, progress: Progress) -> Outcome:
        """Goes back to where a run stood."""
        self._move(dict(progress.values))
        self._optimizer = AdamW(
            self._settings.optimizer, dict(progress.first), dict(progress.second), progress.steps
        )
        self.passes = Passes(progress.micro_batch, dict(progress.limits))
        return Outcome(
            self._data.task,
            self.values,
            progress.before,
            progress.after,
            list(progress.losses),
            list(progress.scores),
        )

    def score(self, data: Batch) -> tuple[float, float]:
        """Metric and mean loss on other samples.

        The training graph answers too: a second session would hold the base twice.
        """
        metrics, losses, weights = [], [], []
        everything = np.arange(len(data.targets))
        for result, targets in self._each(everything, data, "by scoring held-out samples"):
            scored = data.task.score(result.outputs, targets) if result.metric is None else result.metric
            metrics.append(scored)
            losses.append(result.loss)
            weights.append(data.task.weight(targets))
        return mean_by_weight(metrics, weights), mean_by_weight(losses, weights)


def begin(trainer: Trainer, held_out: Batch) -> Outcome:
    """The outcome of no update yet: what the start scores on the held-out part."""
    return Outcome(held_out.task, trainer.values, trainer.score(held_out) if len(held_out.targets) else None)


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
    count = len(kept.targets)
    starts = range(0, count, settings.batch_size)
    total = settings.epochs * len(starts)
    for epoch in range(settings.epochs):
        order = generator.permutation(count)
        for place in starts[max(0, len(outcome.losses) - epoch * len(starts)) :]:
            done = len(outcome.losses)
            loss = trainer.step(order[place : place + settings.batch_size], schedule(done, total))
            outcome.losses.append(loss)
            trainer.keep(outcome)
            if on_step is not None:
                on_step(done + 1, total, loss)
        if outcome.before is not None and len(outcome.scores) <= epoch:
            outcome.after = trainer.score(held_out)
            outcome.scores.append(outcome.after[0])
            trainer.keep(outcome)
    # The last epoch, where the learning rate has come down to zero: picking the best of many epochs on
    # a few held-out samples picks the luckiest one.
    outcome.values = trainer.values
