"""The plan of a run under a memory budget: engine, graph, threads and micro-batches. Pure: no file or process
is read.

A pass of n samples of t tokens takes ``held + factor * values(n, t)`` bytes and ``rate * work(n, t)``
seconds: `values` and `work` are the bundle's tables, `held`, `factor` and `rate` are of this process
(`Footprint`). The fastest candidate whose passes stay under the limit is taken; one that trains a part of the
model alone only where no other does (`Footprint.resort`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edge_tcur_runtime.errors import BudgetError
from edge_tcur_runtime.formats.memory import GraphTable, MemoryTables, RowTable
from edge_tcur_runtime.units import format_size

# Before anything was measured: bytes for each byte of the table's values, and of a session for each node
# (tests/benchmarks/budget.py).
FACTORS = {"step": 1.3, "step_last": 1.3, "step_recompute": 1.15, "train": 1.3}
NODE_BYTES = {"step": 9 * 2**10, "step_last": 9 * 2**10, "step_recompute": 5.5 * 2**10, "train": 12 * 2**10}
# Code, buffers and small values that stay after the first pass.
WARM_BYTES = {"step": 11 * 2**20, "step_last": 14 * 2**20, "step_recompute": 18 * 2**20, "train": 11 * 2**20}
THREAD_BYTES = 2**19  # of each thread after the first: its stack and scratch, 0.1 to 0.45 MiB were measured
# Of a core's speed, what each further thread adds, before it was measured (tests/benchmarks/engine_time.py).
THREAD_GAIN = 0.45
# Of a pass over its work, before it was measured: the graph that recomputes runs without ONNX Runtime's
# optimiser and its reuse of buffers (`edge_tcur_runtime.engines.ort_step`).
SLOWNESS = {"step_recompute": 1.9}
NODE_WORK = 50_000  # operations that starting one operator is worth: a few microseconds
RATE = 2e-11  # seconds an operation, before anything was measured
WINDOW = 2**16  # bytes of a mapped file that Linux makes resident around one that is read
UNKNOWN = 1.12  # of what was measured, for a pass that is larger
_SPARE = 32  # part of a budget that is left free: two runs of the same passes differ by a percent
_RESERVE = 1.04  # of the smallest peak, for the budget that is named
_SIMULATED = 64  # updates that the time of one is averaged over

Way = tuple[str, str, int]  # engine, role of the graph, threads


@dataclass(frozen=True)
class Footprint:
    """What passes of one graph on one engine take in this process.

    Attributes:
        engine, graph: name of the engine, role of the graph.
        table: the graph's table; samples, lengths: its grid (`MemoryTables`).
        held: resident bytes between passes: libraries, session, the base and its rows that are read.
        factor: bytes that a pass takes for each byte of the table's values.
        rate: seconds an operation.
        measured: whether `held`, `factor` and `rate` were measured here.
        proven: bytes of the table's values up to which `factor` was measured.
        threads: CPU threads.
        resort: whether it trains a part of the model alone, and is taken only where nothing else fits.
    """

    engine: str
    graph: str
    table: GraphTable
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    held: int
    factor: float
    rate: float = RATE
    measured: bool = False
    proven: int = 0
    threads: int = 1
    resort: bool = False

    @property
    def way(self) -> Way:
        """Engine, graph and threads."""
        return self.engine, self.graph, self.threads

    def values(self, samples: int, length: int) -> int:
        """Bytes of the table's values in a pass of so many samples of so many tokens."""
        return math.ceil(interpolate(self.samples, self._line(self.table.values, length), samples))

    def growth(self, samples: int, length: int) -> int:
        """Bytes that such a pass adds to what is held."""
        values = self.values(samples, length)
        if not self.measured or values <= self.proven:
            return math.ceil(self.factor * values)
        # The factor of small passes is too small for large ones.
        return math.ceil(UNKNOWN * max(self.factor, FACTORS.get(self.graph, 1.0)) * values)

    def peak(self, samples: int, length: int) -> int:
        """Resident bytes of this process at the peak of such a pass."""
        return self.held + self.growth(samples, length)

    def work(self, samples: int, length: int) -> float:
        """Operations of such a pass that one thread has time for meanwhile, with those that starting its
        operators is worth, which no other thread helps with."""
        line = self._line(self.table.work, length)
        shared = 1 + THREAD_GAIN * (self.threads - 1)
        work = interpolate(self.samples, line, samples) / shared + NODE_WORK * self.table.nodes
        return SLOWNESS.get(self.graph, 1.0) * work

    def seconds(self, samples: int, length: int) -> float:
        """Time of such a pass."""
        return self.rate * self.work(samples, length)

    def largest(self, batch: int, length: int, growth: int) -> int:
        """The most samples, up to `batch`, of a pass that adds no more than `growth` bytes; 0 for none."""
        found = bisect_right(range(1, batch + 1), growth, key=lambda n: self.growth(n, length))
        return int(found)

    def _line(self, grid: Sequence[Sequence[int]], length: int) -> Sequence[int]:
        """The grid's row for that many tokens: batches are padded to the lengths of the rows."""
        return grid[min(bisect_left(self.lengths, length), len(self.lengths) - 1)]


def interpolate(samples: Sequence[int], line: Sequence[int], at: int) -> float:
    """A value between the points of a grid, or behind the last one.

    A peak is the largest of sums that grow linearly with the samples, so a chord lies above it; behind the
    grid the last chord goes on.
    """
    place = min(max(bisect_left(samples, at), 1), len(samples) - 1)
    low, high = samples[place - 1], samples[place]
    return line[place - 1] + (line[place] - line[place - 1]) * (at - low) / (high - low)


@dataclass(frozen=True)
class Passes:
    """How the samples of an update are shared out over passes.

    Attributes:
        micro_batch: samples of a pass.
        limits: tokens -> samples of a pass of that length. Where it holds anything, samples are sorted by
            length, the longest first, and a pass holds samples of one length; `micro_batch` is then that of
            the longest.
    """

    micro_batch: int
    limits: Mapping[int, int] = field(default_factory=dict)

    def form(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Positions of the samples of each pass.

        Args:
            lengths: tokens of each sample of the update, padded; their number alone matters where `limits`
                is empty.
        """
        if not self.limits:
            return _chunks(np.arange(len(lengths)), self.micro_batch)
        order, formed = np.argsort(-lengths, kind="stable"), []
        for length in sorted({int(length) for length in lengths}, reverse=True):
            formed += _chunks(order[lengths[order] == length], self.limits.get(length, self.micro_batch))
        return formed

    def lowered(self, length: int, samples: int) -> Passes:
        """The same with at most so many samples in a pass of that length."""
        if not self.limits:
            return Passes(min(self.micro_batch, samples))
        limits = {**self.limits, length: min(self.limits.get(length, self.micro_batch), samples)}
        return Passes(min(limits.values()), limits)


def _chunks(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]


@dataclass(frozen=True)
class Load:
    """The samples of a run, as far as a plan needs to know them.

    Attributes:
        lengths: tokens of each sample in the order of the data, padded; zeros where there are none.
        batch: samples of an update.
        updates: of the whole run.
        scored: tokens of samples that are only scored once or twice: they count for memory, not for time.
        most: samples of a pass at most; None for no other bound than the batch.
        between: bytes that the work between two passes takes.
        passes: of a run that goes on, which are kept; None chooses them.
    """

    lengths: np.ndarray
    batch: int
    updates: int = 1
    scored: tuple[int, ...] = ()
    most: int | None = None
    between: int = 0
    passes: Passes | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.distinct, default=0)

    @property
    def distinct(self) -> list[int]:
        """The lengths that occur, ascending."""
        return sorted({*self.lengths.tolist(), *self.scored})

    @property
    def largest(self) -> int:
        """Samples of the largest pass."""
        return self.batch if self.most is None else min(self.batch, self.most)


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        footprint: engine, graph, threads, and what they take.
        passes: the micro-batches.
        peak: predicted bytes at the peak of the process.
        seconds: predicted, of an update.
        verdict: why it was taken or not.
    """

    footprint: Footprint
    passes: Passes
    peak: int
    seconds: float
    verdict: str = ""

    @property
    def runs(self) -> tuple[str, str]:
        """Engine and graph."""
        return self.footprint.engine, self.footprint.graph

    @property
    def way(self) -> Way:
        """Engine, graph and threads."""
        return self.footprint.way

    def to_dict(self, updates: int) -> dict[str, object]:
        """JSON values; sizes in bytes, `updates` of the whole run."""
        return {
            "engine": self.footprint.engine,
            "graph": self.footprint.graph,
            "threads": self.footprint.threads,
            "micro_batch": self.passes.micro_batch,
            "by_length": {str(length): count for length, count in sorted(self.passes.limits.items())},
            "predicted_peak_bytes": self.peak,
            "predicted_step_seconds": self.seconds,
            "predicted_seconds": self.seconds * updates,
            "measured": self.footprint.measured,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Plan:
    """The candidates, the fastest first, and the one that is taken: None where nothing fits."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    limit: int | None

    @property
    def smallest(self) -> Candidate:
        """The candidate that needs least memory."""
        return min(self.candidates, key=lambda candidate: candidate.peak)

    @property
    def named(self) -> int:
        """The budget in MiB that is named where nothing fits: the smallest, and a little for what differs
        from one process to the next."""
        return named(self.smallest.peak)

    def require(self, advice: Sequence[str] = ()) -> Candidate:
        """The candidate that is taken.

        Args:
            advice: what else would help.

        Raises:
            BudgetError: nothing fits; the smallest budget that would do is named.
        """
        if self.chosen is not None or self.limit is None:
            return self.chosen or self.candidates[0]
        least = self.smallest
        raise BudgetError(
            f"the budget of {format_size(self.limit)} cannot be met: the least that training takes here is "
            f"about {format_size(least.peak)} ({least.footprint.engine}, graph {least.footprint.graph}, "
            f"{least.passes.micro_batch} samples at once)",
            hint="; ".join((f"give at least --budget {self.named}MiB", *advice)),
        )


def named(peak: int) -> int:
    """The budget in MiB to name for a peak in bytes."""
    return math.ceil(_RESERVE * peak / 2**20)


def room(limit: int) -> int:
    """Bytes of a budget that are planned with."""
    return limit - limit // _SPARE


def make_plan(footprints: Sequence[Footprint], load: Load, limit: int | None, floor: int = 0) -> Plan:
    """All candidates, and the fastest whose predicted peak is within the limit (`room`): one of the last
    resort where no other's is.

    Args:
        footprints: of every engine, graph and number of threads that may be used, at least one.
        limit: bytes; None for no limit.
        floor: peak of this process so far, which no plan can lower.
    """
    found = [
        candidate for footprint in footprints for candidate in _candidates(footprint, load, floor)
    ]  # of equals the first is taken: the order of the footprints counts, and the larger micro-batch
    ranked = sorted(found, key=lambda candidate: candidate.seconds)
    # Passes that are kept were planned with room; what two processes differ by may take of what was left.
    most = None if limit is None else limit if load.passes is not None else room(limit)
    fitting = [place for place, c in enumerate(ranked) if most is None or c.peak <= most]
    place = min(fitting, key=lambda place: (ranked[place].footprint.resort, place), default=None)
    chosen = None if place is None else ranked[place]
    told = tuple(replace(c, verdict=_verdict(c, chosen, limit)) for c in ranked)
    return Plan(told, None if place is None else told[place], limit)


def _verdict(candidate: Candidate, chosen: Candidate | None, limit: int | None) -> str:
    if candidate is chosen:
        if candidate.footprint.resort:
            return "chosen: a part alone, as nothing else fits"
        return "chosen: the fastest" + (" that fits" if limit is not None else "")
    if limit is not None and candidate.peak > room(limit):
        return f"{format_size(candidate.peak - room(limit))} too much"
    if candidate.footprint.resort and chosen is not None and not chosen.footprint.resort:
        return "a part alone: only where nothing else fits"
    return "slower" if chosen is not None and candidate.seconds > chosen.seconds else "as fast"


def _candidates(footprint: Footprint, load: Load, floor: int) -> list[Candidate]:
    """Micro-batches from the whole batch down to one sample, lengths together or apart."""
    found, micro = [], load.largest
    mixed = len(load.distinct) > 1 and micro > 1
    if load.passes is not None:
        return [_candidate(footprint, load, load.passes, floor)]
    while True:
        options = [Passes(micro)]
        if mixed:
            options.append(sorted_passes(footprint, load, micro))
        found += [_candidate(footprint, load, passes, floor) for passes in options]
        if micro == 1:
            return found
        micro = -(-micro // 2)


def _candidate(footprint: Footprint, load: Load, passes: Passes, floor: int) -> Candidate:
    peak = max(floor, footprint.held + _growth(footprint, load, passes))
    return Candidate(footprint, passes, peak, _seconds(footprint, load, passes))


def sorted_passes(footprint: Footprint, load: Load, micro: int) -> Passes:
    """Micro-batches for each length that take no more memory than `micro` of the longest samples."""
    most = footprint.growth(micro, load.longest)
    return Passes(
        micro,
        {length: max(micro, footprint.largest(load.largest, length, most)) for length in load.distinct},
    )


def _growth(footprint: Footprint, load: Load, passes: Passes) -> int:
    counts = passes.limits or dict.fromkeys(load.distinct, passes.micro_batch)
    return max(load.between, *(footprint.growth(count, length) for length, count in counts.items()))


def _seconds(footprint: Footprint, load: Load, passes: Passes) -> float:
    """Of an update, on the average over the first ones in the order of the data."""
    total, starts = 0.0, range(0, len(load.lengths), load.batch)[:_SIMULATED]
    for start in starts:
        lengths = load.lengths[start : start + load.batch]
        for positions in passes.form(lengths):
            total += footprint.seconds(len(positions), int(lengths[positions].max()))
    return total / max(1, len(starts))


def resident_rows(tables: Sequence[RowTable], picked: Mapping[str, np.ndarray]) -> int:
    """Bytes of the base that become resident where only some rows of its tables are read.

    Linux maps whole windows of a file that is cached (``fault_around_bytes``).

    Args:
        picked: model input -> numbers of the rows that are ever read, each once, sorted. A table whose input
            is not named counts in full.
    """
    total = 0
    for table in tables:
        rows = picked.get(table.input)
        if rows is None:
            total += table.bytes
        else:
            first, last = rows * table.row // WINDOW, ((rows + 1) * table.row - 1) // WINDOW
            windows = len(np.union1d(first, last)) + 1  # the table need not begin where a window does
            total += min(table.bytes, windows * WINDOW)
    return total


def footprint_of(
    tables: MemoryTables, way: Way, held: int, factor: float, *, rate: float = RATE, resort: bool = False
) -> Footprint:
    """The footprint of one of the bundle's graphs, before anything was measured.

    Args:
        held: bytes between passes on one thread.
    """
    engine, role, threads = way
    held += THREAD_BYTES * (threads - 1)
    return Footprint(
        engine,
        role,
        tables.graphs[role],
        tables.samples,
        tables.lengths,
        held,
        factor,
        rate,
        threads=threads,
        resort=resort,
    )


def session_bytes(role: str, nodes: int) -> int:
    """Bytes that a session of a training graph holds, before anything was measured."""
    return round(NODE_BYTES[role] * nodes) + WARM_BYTES[role]
