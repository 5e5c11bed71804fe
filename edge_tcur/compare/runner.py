"""The grid of a comparison: which runs are missing, doing them, and their records.

One line of JSON a run in ``records.jsonl``; a run that is recorded is not done again, so a comparison
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_tcur.compare.methods import find_method
from edge_tcur.compare.problems import AnyProblem
from edge_tcur.compare.records import Job, Record, check_problems, read_records, sole_writer, write_record
from edge_tcur.errors import ComparisonError

SWEEP_SEED = 0
_EXTENSIONS = 2  # how often a sweep goes on beyond its end
_STEP = 2.0
BATCH_SIZE = 16
HEAD_RATE = 2e-3
WARM_EPOCHS, WARM_RATE, WARM_BATCH = 20, 5e-3, 32
GRADIENT_BATCHES = 24


@dataclass(frozen=True)
class Grid:
    """What a comparison consists of.

    Attributes:
        problems: in the order of work.
        methods: names (`find_method`).
        seeds: method name -> number of seeds; `default_seeds` for the others.
    """

    problems: Sequence[AnyProblem]
    methods: Sequence[str]
    default_seeds: int = 5
    seeds: dict[str, int] = field(default_factory=dict)

    def count(self, method: str) -> int:
        """Seeds of a method."""
        return self.seeds.get(method, self.default_seeds)


def missing_jobs(grid: Grid, records: Iterable[Record]) -> list[Job]:
    """The runs that can be done now, in order.

    A method's learning rates are swept on the first seed; while the best of them by validation lies
    at an end of the sweep, it goes on beyond (twice at most); the other seeds use the best one.
    """
    done: dict[tuple[str, str], dict[Job, Record]] = defaultdict(dict)
    for record in records:
        done[record.problem, record.method][record.job] = record
    jobs = []
    for problem in grid.problems:
        for name in grid.methods:
            own = done[problem.name, name]
            todo = _sweep(problem.name, name, own)
            if not todo:
                rate = best_rate(own.values())
                todo = [Job(problem.name, name, rate, seed) for seed in range(1, grid.count(name))]
            jobs += [job for job in todo if job not in own]
    return jobs


def _sweep(problem: str, name: str, own: dict[Job, Record]) -> list[Job]:
    """Runs of the sweep that are missing; empty when it has ended."""
    first = sorted(find_method(name).rates)
    missing = [job for rate in first if (job := Job(problem, name, rate, SWEEP_SEED)) not in own]
    if missing or len(first) == 1:
        return missing
    swept = sorted(job.rate for job in own if job.seed == SWEEP_SEED)
    best = best_rate(own.values())
    if len(swept) >= len(first) + _EXTENSIONS:
        return []
    beyond = {swept[0]: best / _STEP, swept[-1]: best * _STEP}.get(best)
    return [] if beyond is None else [Job(problem, name, float(f"{beyond:.3g}"), SWEEP_SEED)]


def best_rate(records: Iterable[Record]) -> float:
    """The rate of the sweep with the best validation score, of equals the lowest."""
    swept = [record for record in records if record.seed == SWEEP_SEED]
    return max(swept, key=lambda record: (record.validation, -record.rate)).rate


def end_with_parent() -> None:
    """Ends this worker when its parent ends, however that ends: a killed one cannot say goodbye."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare_problem(problem: AnyProblem, work: Path) -> None:
    """What all runs of a problem share, made once, on one thread as they are."""
    import torch

    torch.set_num_threads(1)
    problem.prepare(work)


def run_job(problem: AnyProblem, job: Job, work: Path, device: str) -> Record:
    """Does one run, on one thread or on a device of torch's."""
    import torch

    from edge_tcur.compare.training import train_and_score

    torch.set_num_threads(1)
    loaded, kept = problem.load(job.seed, work), work / problem.name
    outcome = train_and_score(loaded, find_method(job.method), job.rate, job.seed, kept, device)
    return Record(**asdict(job), **asdict(outcome))


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    workers: int,
    device: str = "cpu",
    on_record: Callable[[Record, int], None] | None = None,
) -> list[Record]:
    """Does every missing run in worker processes, and returns all records of the grid.

    Args:
        folder: of the records, and of what problems keep between runs.
        workers: runs at once; device: torch's name of where they train, ``cpu`` or ``cuda``.
        on_record: called with each new record and the number of runs known to be missing.

    Raises:
        UsageError: another comparison writes to the folder.
        ConfigError, FileFormatError: see `check_problems` and `read_records`.
        ComparisonError: runs failed; all others are done and recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder):
        check_problems(folder, {problem.name: _settings(problem) for problem in grid.problems})
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            try:
                failed = _work_off(_Work(grid, folder, pool, workers, device, on_record))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if failed:
            job, error = next(iter(failed.items()))
            raise ComparisonError(
                f"{len(failed)} of the runs failed, the first with {type(error).__name__}: {error}",
                where=f"{job.problem}, {job.method}, rate {job.rate:g}, seed {job.seed}",
                hint="the others are recorded; leave the method out, or try again",
            ) from error
        return _of_grid(grid, read_records(folder))


def _settings(problem: AnyProblem) -> dict[str, Any]:
    """What must not change between the runs of a problem; files may have moved."""
    return {name: value for name, value in asdict(problem).items() if not isinstance(value, Path)}


@dataclass(frozen=True)
class _Work:
    """See `run_grid`."""

    grid: Grid
    folder: Path
    pool: ProcessPoolExecutor
    workers: int
    device: str
    on_record: Callable[[Record, int], None] | None


def _work_off(work: _Work) -> dict[Job, Exception]:
    """Does every missing run and records it; the runs that failed, and why."""
    grid, folder, pool = work.grid, work.folder, work.pool
    problems = {problem.name: problem for problem in grid.problems}
    running: dict[Future[Record], Job] = {}
    failed: dict[Job, Exception] = {}
    for name in {job.problem: None for job in missing_jobs(grid, read_records(folder))}:
        pool.submit(prepare_problem, problems[name], folder / "work").result()
    while True:
        begun = {*running.values(), *failed}
        waiting = [job for job in missing_jobs(grid, read_records(folder)) if job not in begun]
        for job in waiting[: work.workers - len(running)]:
            task = pool.submit(run_job, problems[job.problem], job, folder / "work", work.device)
            running[task] = job
        if not running:
            return failed
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            job, error = running.pop(done), done.exception()
            if isinstance(error, Exception) and not isinstance(error, BrokenExecutor):
                failed[job] = error
                continue
            write_record(folder, done.result())
            if work.on_record is not None:
                work.on_record(done.result(), len(waiting) + len(running))


def _of_grid(grid: Grid, records: Iterable[Record]) -> list[Record]:
    problems = {problem.name for problem in grid.problems}
    return [item for item in records if item.problem in problems and item.method in grid.methods]


def chosen(records: Iterable[Record]) -> Iterator[tuple[tuple[str, str], list[Record]]]:
    """For each problem and method the runs at the chosen rate, by seed."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.problem, record.method].append(record)
    for key, own in groups.items():
        if any(record.seed == SWEEP_SEED for record in own):
            rate = best_rate(own)
            yield key, sorted((item for item in own if item.rate == rate), key=lambda item: item.seed)
