"""The training loop: one adapter's factors moved over one data set, for every engine.

An engine computes loss and gradients, `edge_tcur_runtime.optimizer` moves the factors, a guard watches the
peak memory between passes, and a keeper is told of every update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from edge_tcur_runtime.batch import Batch
from edge_tcur_runtime.budget import Budget, Memory, choose_micro_batch, read_memory
from edge_tcur_runtime.checkpoint import Progress
from edge_tcur_runtime.coordinates import Coordinates
from edge_tcur_runtime.engines import StepResult, TrainingEngine
from edge_tcur_runtime.engines.graphs import keeps_within
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.factors import FACTOR_PARTS
from edge_tcur_runtime.guard import Guard, taken
from edge_tcur_runtime.keeper import Keeper
from edge_tcur_runtime.optimizer import build_optimizer, schedule
from edge_tcur_runtime.outcome import Outcome, Yardstick, patience_for
from edge_tcur_runtime.planner import Footprint, Passes, room
from edge_tcur_runtime.privacy import Mechanism, PrivacyPlan, steps_per_epoch
from edge_tcur_runtime.reference import ReferenceSet
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.tasks import mean_by_weight

_TIMED = 2  # more passes that are timed where the choice hangs on it
_MARGIN = 1.02  # of what a pass took, for what the next one may take


class Trainer:
    """Moves the factors of one adapter over one data set.

    Args:
        engine: computes loss and gradients.
        coordinates: of the adapter that training starts from.
        data: the training samples.
        settings: see `PersonalizeSettings`.
        budget: checked after every pass.
        keeper: told of every update; may end the run after any pass.
        graph: role of the graph that the engine runs; threads: how many it runs on, 0 where it is not said.
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
        threads: int = 0,
    ) -> None:
        self._engine = engine
        self.graph, self.threads = graph, threads
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
        self.passes = Passes(settings.batch_size)
        self.guard: Guard | None = None
        self.predicted = 0  # bytes at the peak, by the plan that the run was accepted under; 0 without one
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

    def time(self, footprint: Footprint, micro: int) -> Footprint:
        """`footprint` with the speed of the fastest of a few passes of `micro` of the longest samples."""
        longest = self._longest()
        count, length = min(micro, len(longest)), int(self._data.lengths[longest[0]])
        rates = [footprint.rate]
        for _ in range(_TIMED):
            started = time.perf_counter()
            self._measure(longest[:count])
            rates.append((time.perf_counter() - started) / footprint.work(count, length))
        return replace(footprint, rate=min(rates))

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
        """Runs steps of one and two samples, the longest ones, and chooses the micro-batch that fits;
        `predicted` is what it will take by them.

        With privacy every pass has one sample, so that one is all that is run.

        Raises:
            BudgetError: not even two samples fit.
        """
        if self._budget.limit is None:
            return
        longest = self._data.longest_first()
        if self._settings.privacy is not None:
            before, one = read_memory(), self._measure(longest[:1])
            # An upper bound: the parts of the base that were read for the first time are in it.
            self._growth, self._peak_two = one.peak - before.resident, one.peak
            self.micro_batch, self.predicted = 1, one.peak
            return
        one, two = (self._measure(longest[:count]) for count in (1, 2))
        # Loading may have left a peak above what a step needs; what is resident then shows the growth.
        growth = max(two.peak - one.peak, two.resident - one.resident)
        self._growth, self._peak_two = growth, two.peak
        self.micro_batch = choose_micro_batch(
            self._settings.batch_size, room(self._budget.limit), two.peak - growth, two.peak
        )
        self.predicted = two.peak + growth * max(0, self.micro_batch - 2)

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

    def _each(
        self, indices: np.ndarray, data: Batch | ReferenceSet, what: str
    ) -> Iterator[tuple[StepResult, np.ndarray]]:
        """Results and targets of the passes over these samples; the guard may make them smaller."""
        known = self.guard is not None or bool(self.passes.limits)
        lengths = data.lengths[indices] if known else np.zeros(len(indices), np.int64)
        waiting = (self.passes if known else Passes(self._together(data))).form(lengths)
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
            limits=self.passes.limits,
            engine=self._engine.name,
            graph=self.graph,
            predicted=self.predicted,
            threads=self.threads,
        )
        self._keeper.reached(progress)

    def restore(self, progress: Progress) -> Outcome:
        """Goes back to where a run stood."""
        self._move(dict(progress.values))
        self._optimizer = build_optimizer(
            self._settings.optimizer, progress.first, progress.second, progress.steps
        )
        self.passes = Passes(progress.micro_batch, dict(progress.limits))
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

    def score_values(self, values: dict[str, np.ndarray], data: Batch) -> tuple[float, float]:
        """Takes these values and scores them on `data`; see `score`."""
        self._move(values)
        return self.score(data)

    def score_adapter(self, adapter: Adapter, data: Batch) -> tuple[float, float]:
        """Metric and mean loss of another adapter; IncompatibleError: the engine takes only one rank."""
        feeds, self._feeds = self._feeds, adapter.feeds()
        try:
            return self.score(data)
        finally:
            self._feeds = feeds

    def score(self, data: Batch | ReferenceSet) -> tuple[float, float]:
        """Metric and mean loss of the current values on other samples.

        The training graph answers too: a second session would hold the base twice.
        """
        what = "held-out samples" if isinstance(data, Batch) else "the bundle's reference set"
        metrics, losses, weights = [], [], []
        everything = np.arange(len(data.targets))
        for result, targets in self._each(everything, data, f"by scoring {what}"):
            scored = data.task.score(result.outputs, targets) if result.metric is None else result.metric
            metrics.append(scored)
            losses.append(result.loss)
            weights.append(data.task.weight(targets))
        return mean_by_weight(metrics, weights), mean_by_weight(losses, weights)

    def _together(self, data: Batch | ReferenceSet) -> int:
        """Samples of a pass where nothing is known of lengths: fewer where a budget was measured with smaller
        samples than these."""
        if self._budget.limit is None or data is self._data:
            return self.micro_batch
        measured = self._data.elements
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
