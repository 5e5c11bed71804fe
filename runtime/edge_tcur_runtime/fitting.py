"""From a plan to a trainer whose passes fit: engines are opened, measured, and planned with again.

Bundles without tables (`Manifest.memory`) are measured with passes of one and two samples instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_tcur_runtime.batch import Batch
from edge_tcur_runtime.budget import Budget, read_memory
from edge_tcur_runtime.checkpoint import Progress
from edge_tcur_runtime.engines import ENGINES, choose_engine
from edge_tcur_runtime.engines.engine import EXECUTORCH, require_program
from edge_tcur_runtime.engines.graphs import engine_for, graph_to_try
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
    Footprint,
    Load,
    Passes,
    Plan,
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

Make = Callable[[str, str], Trainer]  # engine, role of the graph -> a trainer over it

_WORTH_SAYING = 2**20  # bytes that another precision saves
# What ExecuTorch and torch take: 187 MiB to import, and 25 beside the program that stay after a first pass
# (torch 2.13 for CPUs; tests/benchmarks/budget.py --bundle). No build of torch stays below the other figure.
_TORCH_BYTES, _TORCH_LEAST, _PASS_BYTES = 187 * 2**20, 128 * 2**20, 25 * 2**20
_MOST_TRIED = 6  # engines and micro-batches that are measured in search of the fastest


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
            return ("step_last",)
        return {"on": ("step_recompute",), "off": ("step",)}.get(
            self.settings.recompute, ("step", "step_recompute")
        )

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


def predict(site: Site, tables: MemoryTables, resident: int) -> list[Footprint]:
    """Footprints of all that may run, before anything is loaded.

    Args:
        resident: bytes of this process with its libraries.
    """
    found = []
    for engine, role in site.runs():
        table = tables.graphs[role]
        held = resident + session_bytes(role, table.nodes) + table.base + site.rows(table)
        found.append(footprint_of(tables, role, engine, held, FACTORS[role]))
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
    footprints = predict(site, tables, memory.resident)
    plan = make_plan(footprints, site.load, budget.limit, memory.peak)
    if plan.chosen is not None:
        plan = _search(site, make, budget, footprints)[1]
    return plan, advice(site, plan, tables)


def fit(site: Site, make: Make, budget: Budget, progress: Progress | None) -> tuple[Trainer, Plan | None]:
    """A trainer whose passes fit the budget, with the plan that led to it; None where none was made.

    Args:
        progress: what the run goes on from: its engine, graph and micro-batches are kept, and so is what it
            was accepted under; where the budget no longer holds them, smaller passes are planned for.

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
    footprints = predict(site, tables, read_memory().resident)
    kept = None
    if progress is not None:
        kept = _passes(progress)
        running = (progress.engine or site.default, progress.graph)
        footprints = [found for found in footprints if (found.engine, found.graph) == running]
        if not footprints:
            return _unlimited(site, make, progress), None
    trainer, plan = _search(site, make, budget, footprints, kept)
    chosen = plan.require(advice(site, plan, tables))
    trainer.passes = chosen.passes
    trainer.guard = Guard(max(room(budget.limit), chosen.peak), chosen.footprint)
    return trainer, plan


def _unlimited(site: Site, make: Make, progress: Progress | None) -> Trainer:
    if progress is None:
        return make(site.default, graph_to_try(site.default, site.bundle, site.settings))
    return make(progress.engine or site.default, progress.graph)


def _search(
    site: Site, make: Make, budget: Budget, footprints: list[Footprint], kept: Passes | None = None
) -> tuple[Trainer, Plan]:
    """Opens what the plan takes, measures it and plans again, until that is what it takes. The passes that
    are to be kept are, unless the budget no longer holds them."""
    load, tables = replace(site.load, passes=kept), site.bundle.manifest.memory
    assert tables is not None
    trainer: Trainer | None = None
    opened: tuple[str, str] | None = None
    tried: set[tuple[str, str, int]] = set()  # what was measured, up to how many samples a pass
    while True:
        floor = read_memory().peak or budget.check("while it was planned").peak
        plan = make_plan(footprints, load, budget.limit, floor)
        if plan.chosen is None and load.passes is not None:
            load = site.load
            plan = make_plan(footprints, load, budget.limit, floor)
        chosen = plan.require(advice(site, plan, tables))
        micro = chosen.passes.micro_batch
        settled = (*chosen.runs, micro) in tried or len(tried) >= _MOST_TRIED
        if settled and trainer is not None and opened == chosen.runs:
            return trainer, plan
        if opened != chosen.runs:
            trainer = None  # two sessions would hold the base twice
            trainer, opened = make(*chosen.runs), chosen.runs
        assert trainer is not None
        if not settled:
            place = next(n for n, f in enumerate(footprints) if (f.engine, f.graph) == chosen.runs)
            footprints[place] = _measured(site, trainer, footprints[place], micro)
            tried.add((*chosen.runs, micro))
            footprints = _same_speed(footprints, footprints[place])


def _measured(site: Site, trainer: Trainer, footprint: Footprint, micro: int) -> Footprint:
    """`footprint` after passes on this machine."""
    alone = resident_rows(footprint.table.rows, trainer.longest_alone().picked)
    return trainer.measure(footprint, micro, (site.rows(footprint.table), alone))


def _same_speed(footprints: list[Footprint], measured: Footprint) -> list[Footprint]:
    """What was not measured is taken to compute as fast as what was."""
    return [f if f.measured else replace(f, rate=measured.rate) for f in footprints]


def advice(site: Site, plan: Plan, tables: MemoryTables) -> list[str]:
    """What else would help where nothing fits."""
    found, manifest = [], site.bundle.manifest
    least = plan.smallest
    if not site.settings.last_blocks and "step_last" in tables.graphs:
        partial = footprint_of(tables, "step_last", "ort-step", least.footprint.held, FACTORS["step_last"])
        if (peak := partial.peak(1, site.load.longest)) < least.peak:
            found.append(f"--last-blocks, which trains the last blocks alone, takes {format_size(peak)}")
    if "step" in tables.graphs and "step_recompute" not in tables.graphs:
        found.append("a bundle of 'edge-tcur export --recompute' takes less")
    base = least.footprint.table.base * 3 // 4
    if manifest.precision == FP32 and base >= _WORTH_SAYING:
        found.append(f"a base of 'edge-tcur export --precision int8' takes about {format_size(base)} less")
    return found


def _calibrated(site: Site, make: Make, budget: Budget, progress: Progress | None) -> Trainer:
    """For bundles without tables, and programs of ExecuTorch: a trainer with the micro-batch that fits by two
    steps, on the plain graph where that fits too."""
    if site.default == EXECUTORCH:
        _refuse_torch(site.bundle, budget)
    if progress is not None:
        return _unlimited(site, make, progress)
    graph = graph_to_try(site.default, site.bundle, site.settings)
    trainer = make(site.default, graph)
    trainer.calibrate()
    if graph == "step_recompute" and _plain_fits(trainer, site.bundle, site.settings):
        del trainer  # two sessions would hold the base twice
        trainer = make(site.default, "step")
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
