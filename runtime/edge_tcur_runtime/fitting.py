"""From a plan to a trainer whose passes fit: engines are opened, measured, and planned with again.

Bundles without tables (`Manifest.memory`) are measured with passes of one and two samples instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_tcur_runtime.batch import Batch
from edge_tcur_runtime.budget import Budget, read_memory
from edge_tcur_runtime.checkpoint import Progress
from edge_tcur_runtime.cores import thread_counts
from edge_tcur_runtime.engines import ENGINES, choose_engine
from edge_tcur_runtime.engines.engine import EXECUTORCH, require_program
from edge_tcur_runtime.engines.graphs import LAST, engine_for, graph_to_try
from edge_tcur_runtime.engines.providers import CPU
from edge_tcur_runtime.engines.selfcheck import Choice
from edge_tcur_runtime.engines.session import import_onnxruntime
from edge_tcur_runtime.errors import BudgetError, IncompatibleError, MissingEngineError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import BASE_PTD, Bundle
from edge_tcur_runtime.formats.memory import GraphTable, MemoryTables
from edge_tcur_runtime.formats.weights import FP32
from edge_tcur_runtime.guard import Guard
from edge_tcur_runtime.heap import give_back_at_once
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.planner import (
    FACTORS,
    Candidate,
    Footprint,
    Load,
    Passes,
    Plan,
    Way,
    footprint_of,
    make_plan,
    named,
    resident_rows,
    room,
    session_bytes,
)
from edge_tcur_runtime.privacy import PrivacyPlan, noise_bytes, steps_per_epoch
from edge_tcur_runtime.reference import ReferenceSet
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.trainer import Trainer
from edge_tcur_runtime.units import format_size

Make = Callable[[str, str, int], Trainer]  # engine, role of the graph, threads -> a trainer over it

_WORTH_SAYING = 2**20  # bytes that another precision saves
# What ExecuTorch and torch take: 187 MiB to import, and 25 beside the program that stay after a first pass
# (torch 2.13 for CPUs; tests/benchmarks/budget.py --bundle). No build of torch stays below the other figure.
_TORCH_BYTES, _TORCH_LEAST, _PASS_BYTES = 187 * 2**20, 128 * 2**20, 25 * 2**20
_MOST_TRIED = 6  # engines, threads and micro-batches that are measured in search of the fastest
# Other numbers of threads are measured where a run takes so many times longer than opening and measuring did:
# with what is opened again at the end that is at most a twentieth of the run for each.
_LONG = 40
_TRIAL_BYTES = 4 * 2**20  # that the budget must have over then: a session that was closed leaves holes


@dataclass(frozen=True)
class Site:
    """What the choice is made for.

    Attributes:
        bundle, start, settings: of the run.
        data: the samples of the run, trained on and held out.
        reference: the bundle's reference set; None where it has none.
        privacy: what is spent; None without privacy.
        default: the engine that is taken without a plan (`choose_engine`).
        chosen: the execution provider, which every engine that is planned for runs on.
    """

    bundle: Bundle
    start: Adapter
    settings: PersonalizeSettings
    data: tuple[Batch, Batch]
    default: str
    chosen: Choice
    reference: ReferenceSet | None = None
    privacy: PrivacyPlan | None = None

    @property
    def load(self) -> Load:
        """For the planner. With privacy each pass has one sample, whose gradient is bounded."""
        trained = len(self.data[0].targets)
        return Load(
            np.concatenate([part.lengths for part in self.data]),
            min(self.settings.batch_size, max(1, trained)),
            steps_per_epoch(trained, self.settings) * self.settings.epochs,
            () if self.reference is None else tuple(self.reference.lengths.tolist()),
            None if self.privacy is None else 1,
            0 if self.privacy is None else noise_bytes(self.start.trained_numbers + self.start.extra_numbers),
        )

    def spent(self) -> dict[str, Any] | None:
        """What the run spends of privacy, all runs on the way to its start included; None without."""
        return None if self.privacy is None else self.privacy.facts(self.start.header.provenance)

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads to choose from; for other providers than the CPU all that may be used."""
        found = thread_counts(self.settings.threads)
        return found if self.chosen.placement.provider.name == CPU else found[-1:]

    def runs(self) -> list[tuple[str, str]]:
        """Engines that work here, with the graphs that the settings allow; the preferred ones first."""
        asked, found = engine_for(self.settings), []
        for name in ENGINES if asked == "auto" else (asked,):
            try:
                choose_engine(name, self.bundle, find_onnxruntime(), self.start, self.settings.provider)
            except (MissingEngineError, IncompatibleError):
                continue
            found += [(name, role) for role in self._roles(name)]
        tables = self.bundle.manifest.memory
        return [run for run in found if tables is not None and run[1] in tables.graphs]

    def _roles(self, engine: str) -> tuple[str, ...]:
        if engine == "ort-training":
            return ("train",)
        if engine == EXECUTORCH:
            return ()  # the tables are of graphs; what its programs take is measured
        if self.settings.last_blocks:
            return (LAST,)
        whole = {"on": ("step_recompute",), "off": ("step",)}
        found = whole.get(self.settings.recompute, ("step", "step_recompute"))
        return (*found, LAST) if self.settings.allow_last_blocks else found

    def rows(self, table: GraphTable) -> int:
        """Bytes of the base's tables that the samples of the run make resident."""
        picked: dict[str, np.ndarray] = {}
        parts: list[Batch | ReferenceSet] = [*self.data]
        if self.reference is not None:
            parts.append(self.reference)
        for part in parts:
            for name, value in part.picked.items():
                picked[name] = np.union1d(picked[name], value) if name in picked else value
        return resident_rows(table.rows, picked)


def predict(
    site: Site, tables: MemoryTables, resident: int, threads: tuple[int, ...] | None = None
) -> list[Footprint]:
    """Footprints of all that may run, before anything is loaded.

    Args:
        resident: bytes of this process with its libraries.
        threads: to choose from; None takes those of `site`.
    """
    found = []
    for engine, role in site.runs():
        table = tables.graphs[role]
        held = resident + session_bytes(role, table.nodes) + table.base + site.rows(table)
        resort = role == LAST and not site.settings.last_blocks
        found += [
            footprint_of(tables, (engine, role, count), held, FACTORS[role], resort=resort)
            for count in threads or site.threads
        ]
    return found


def preview(site: Site, make: Make, budget: Budget) -> tuple[Plan, list[str]]:
    """The plan of a run that is not begun, with what would help where nothing fits.

    Where something fits by the tables, passes are run and planned with again, as `fit` does.

    Raises:
        IncompatibleError: the bundle has no tables, or no graph of it can be trained here.
        BudgetError: by the tables it fits, by what was measured it does not.
    """
    tables = site.bundle.manifest.memory
    if tables is not None and not site.runs():
        raise IncompatibleError(
            f"the bundle has no table of what passes of {site.default} take, so that nothing can be planned",
            where=str(site.bundle.root),
            hint="leave --dry-run out: a run with --budget measures instead",
        )
    if tables is None:
        raise IncompatibleError(
            "the bundle does not say what passes of its graphs take, so that nothing can be planned",
            where=str(site.bundle.root),
            hint="export it again; a run with --budget measures instead",
        )
    if budget.limit is not None:
        give_back_at_once()
    import_onnxruntime()
    memory = read_memory()
    search = _Search(site, make, budget, tables, memory.resident)
    plan = make_plan(search.footprints, site.load, budget.limit, memory.peak)
    if plan.chosen is not None:
        plan = search.run()[1]
    return plan, search.advice(plan)


def fit(site: Site, make: Make, budget: Budget, progress: Progress | None) -> tuple[Trainer, Plan | None]:
    """A trainer whose passes fit the budget, with the plan that led to it; None where none was made.

    Args:
        progress: what the run goes on from: its engine, graph, threads and micro-batches are kept, and so is
            what it was accepted under; where the budget no longer holds them, smaller passes are planned for.

    Raises:
        BudgetError: nothing fits; the smallest budget that would do is named.
    """
    trainer, plan = _fit(site, make, budget, progress)
    chosen = None if plan is None else plan.chosen
    if chosen is not None:
        trainer.predicted = chosen.peak
    if progress is not None and progress.predicted and (chosen is None or chosen.passes == _passes(progress)):
        trainer.predicted = progress.predicted
    return trainer, plan


def _passes(progress: Progress) -> Passes:
    return Passes(progress.micro_batch, dict(progress.limits))


def _fit(site: Site, make: Make, budget: Budget, progress: Progress | None) -> tuple[Trainer, Plan | None]:
    tables = site.bundle.manifest.memory
    if budget.limit is None:
        return _unlimited(site, make, progress), None
    give_back_at_once()
    if tables is None or not site.runs():
        return _calibrated(site, make, budget, progress), None
    import_onnxruntime()
    search = _Search(site, make, budget, tables, read_memory().resident, progress)
    if not search.footprints:
        return _unlimited(site, make, progress), None
    trainer, plan = search.run()
    chosen = plan.require()
    trainer.passes = chosen.passes
    trainer.guard = Guard(max(room(budget.limit), chosen.peak), chosen.footprint)
    return trainer, plan


def _unlimited(site: Site, make: Make, progress: Progress | None) -> Trainer:
    threads = site.threads[-1]
    if progress is None:
        return make(site.default, graph_to_try(site.default, site.bundle, site.settings), threads)
    return make(progress.engine or site.default, progress.graph, progress.threads or threads)


class _Search:
    """Opens what the plan takes, measures it and plans again, until that is what it takes.

    Args:
        resident: bytes of this process with its libraries, before anything was opened.
        progress: what the run goes on from: its engine, graph and threads are kept, and so are its passes,
            unless the budget no longer holds them. None chooses them.

    Attributes:
        footprints: of all that may run; none where the bundle has no table of what `progress` ran.
    """

    def __init__(
        self,
        site: Site,
        make: Make,
        budget: Budget,
        tables: MemoryTables,
        resident: int,
        progress: Progress | None = None,
    ) -> None:
        self._site, self._make, self._budget, self._tables = site, make, budget, tables
        self._resident, self._load = resident, site.load
        kept = progress is not None and progress.threads
        self.footprints = predict(site, tables, resident, (kept,) if kept else None)
        if progress is not None:
            running = (progress.engine or site.default, progress.graph, kept or site.threads[-1])
            self.footprints = [found for found in self.footprints if found.way == running]
            self._load = replace(self._load, passes=_passes(progress))
        self._trainer: Trainer | None = None
        self._opened: Way | None = None
        self._tried: set[tuple[Way, int]] = set()  # what was measured, up to how many samples a pass
        self._timed: set[Way] = set()
        self._cost: dict[Way, float] = {}  # seconds that opening and first measuring took

    def run(self) -> tuple[Trainer, Plan]:
        """A trainer over what is taken, with the plan that took it.

        Raises:
            BudgetError: nothing fits; the smallest budget that would do is named.
        """
        while True:
            plan = self._plan()
            chosen = plan.chosen or plan.require(self.advice(plan))
            micro = chosen.passes.micro_batch
            if (chosen.way, micro) not in self._tried and len(self._tried) < _MOST_TRIED:
                self._measure(chosen.way, micro)
            elif (rival := self._rival(chosen)) is not None:
                self._time(chosen.way, micro)
                self._measure(rival, micro)
                self._time(rival, micro)
            elif (trainer := self._trainer) is not None and self._opened == chosen.way:
                return trainer, plan
            else:
                self._open(chosen.way)

    def advice(self, plan: Plan) -> list[str]:
        """What else would help where nothing fits."""
        return advice(self._site, plan, self._tables, self._resident)

    def _plan(self) -> Plan:
        floor = read_memory().peak or self._budget.check("while it was planned").peak
        plan = make_plan(self.footprints, self._load, self._budget.limit, floor)
        if plan.chosen is None and self._load.passes is not None:
            self._load = self._site.load
            plan = make_plan(self.footprints, self._load, self._budget.limit, floor)
        return plan

    def _open(self, way: Way) -> Trainer:
        if self._trainer is None or self._opened != way:
            self._trainer = None  # two sessions would hold the base twice
            self._trainer, self._opened = self._make(*way), way
        return self._trainer

    def _measure(self, way: Way, micro: int) -> None:
        """Runs passes of up to `micro` samples of what was planned, on this machine."""
        started, place = time.perf_counter(), self._place(way)
        trainer, footprint = self._open(way), self.footprints[place]
        alone = resident_rows(footprint.table.rows, trainer.longest_alone().picked)
        rows = (self._site.rows(footprint.table), alone)
        self.footprints[place] = trainer.measure(footprint, micro, rows)
        self._tried.add((way, micro))
        self._cost.setdefault(way, time.perf_counter() - started)
        self._share_speed(place)

    def _time(self, way: Way, micro: int) -> None:
        """Times a pass more often, where the choice hangs on it alone."""
        if way not in self._timed:
            self._timed.add(way)
            place = self._place(way)
            self.footprints[place] = self._open(way).time(self.footprints[place], micro)
            self._share_speed(place)

    def _rival(self, chosen: Candidate) -> Way | None:
        """The same on another number of threads, if it was not measured yet and the run is long enough."""
        limit, seconds = self._budget.limit, chosen.seconds * self._load.updates
        if seconds < _LONG * self._cost.get(chosen.way, seconds):
            return None
        if limit is not None and chosen.peak + _TRIAL_BYTES > room(limit):
            return None
        others = [f.way for f in self.footprints if f.way[:2] == chosen.runs and not f.measured]
        return next(iter(others), None)

    def _place(self, way: Way) -> int:
        return next(place for place, found in enumerate(self.footprints) if found.way == way)

    def _share_speed(self, place: int) -> None:
        """What was not measured is taken to compute as fast as what was last, or was on as many threads."""
        known = {found.threads: found.rate for found in self.footprints if found.measured}
        last = self.footprints[place]
        known[last.threads] = last.rate
        self.footprints = [
            f if f.measured else replace(f, rate=known.get(f.threads, last.rate)) for f in self.footprints
        ]


def advice(site: Site, plan: Plan, tables: MemoryTables, resident: int) -> list[str]:
    """What else would help where nothing fits.

    Args:
        resident: as of `predict`.
    """
    found = _consent(site, plan, tables, resident)
    if "step" in tables.graphs and "step_recompute" not in tables.graphs:
        found.append("a bundle of 'edge-tcur export --recompute' takes less")
    base = plan.smallest.footprint.table.base * 3 // 4
    if site.bundle.manifest.precision == FP32 and base >= _WORTH_SAYING:
        found.append(f"a base of 'edge-tcur export --precision int8' takes about {format_size(base)} less")
    return found


def _consent(site: Site, plan: Plan, tables: MemoryTables, resident: int) -> list[str]:
    """What training the last blocks alone would take, where that is less."""
    settings, last = site.settings, site.bundle.manifest.last_blocks
    if settings.allow_last_blocks and last is None:
        return ["a bundle of 'edge-tcur export --last-blocks K' has what --allow-last-blocks consents to"]
    if settings.last_blocks or settings.allow_last_blocks or last is None or LAST not in tables.graphs:
        return []
    allowed = replace(site, settings=replace(settings, allow_last_blocks=True, engine="auto"))
    partial = [found for found in predict(allowed, tables, resident) if found.resort]
    if not partial or plan.limit is None:
        return []
    would = make_plan(partial, site.load, plan.limit)
    least = would.chosen or would.smallest
    if least.peak >= plan.smallest.peak or (would.chosen is None and would.named >= plan.named):
        return []
    budget = "this budget" if would.chosen is not None else f"--budget {would.named}MiB"
    return [
        f"{budget} does with --allow-last-blocks: the last {last.count} blocks alone learn then, which takes "
        f"about {format_size(least.peak)}"
    ]


def _calibrated(site: Site, make: Make, budget: Budget, progress: Progress | None) -> Trainer:
    """For bundles without tables, and programs of ExecuTorch: a trainer with the micro-batch that fits by two
    steps, on the plain graph where that fits too."""
    if site.default == EXECUTORCH:
        _refuse_torch(site.bundle, budget)
    if progress is not None:
        return _unlimited(site, make, progress)
    graph, threads = graph_to_try(site.default, site.bundle, site.settings), site.threads[-1]
    trainer = make(site.default, graph, threads)
    trainer.calibrate()
    if graph == "step_recompute" and _plain_fits(trainer, site.bundle, site.settings):
        del trainer  # two sessions would hold the base twice
        trainer = make(site.default, "step", threads)
        trainer.calibrate()
    trainer.predicted = max(trainer.predicted, read_memory().resident + site.load.between)
    _require_room(trainer.predicted, budget)
    return trainer


def _require_room(predicted: int, budget: Budget) -> None:
    """Refuses what would leave nothing of the budget free: a run takes a little more than its first steps."""
    assert budget.limit is not None
    if predicted > room(budget.limit):
        raise BudgetError(
            f"the budget of {format_size(budget.limit)} cannot be met: by its first steps training takes "
            f"about {format_size(predicted)} here",
            hint=f"give at least --budget {named(predicted)}MiB",
        )


def _refuse_torch(bundle: Bundle, budget: Budget) -> None:
    """Before torch is imported, which alone is more than many a budget, and before the program is loaded."""
    from edge_tcur_runtime.engines.executorch import import_training

    program = require_program(bundle)
    loaded, before = program.memory + bundle.manifest.files[BASE_PTD].size, read_memory().resident
    likely = named(before + _TORCH_BYTES + _PASS_BYTES + loaded) * 2**20
    least = before + _TORCH_LEAST + program.memory
    budget.require(least, "ExecuTorch with torch, which its Python interface is of,", likely - least)
    import_training()
    needed = read_memory().resident + loaded + _PASS_BYTES // 2
    spare = named(needed + _PASS_BYTES // 2) * 2**20 - needed
    budget.require(needed, "the training program of ExecuTorch with torch", spare)


def _plain_fits(trainer: Trainer, bundle: Bundle, settings: PersonalizeSettings) -> bool:
    """Whether the plain step may take over from the one that recomputes."""
    blocks = bundle.manifest.recomputed_blocks
    if settings.recompute != "auto" or blocks is None or bundle.graph("step") is None:
        return False
    return trainer.leaves_room(blocks)
