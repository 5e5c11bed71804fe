"""`personalize --dry-run`: the candidates of a run, what each takes, and which one is taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur_runtime.errors import ExitCode
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.personalize import RunPlan
    from edge_tcur_runtime.planner import Candidate

_UNJUDGED = "nothing: it is installed unjudged, and put in use where no judged one is (--accept-unjudged)"
HEADER = ("Engine", "Graph", "Threads", "Samples a pass", "Peak", "Seconds an update", "In all", "")


def show_plan(
    root: Path,
    data: Path,
    columns: dict[str, str],
    start: tuple[str, Path],
    settings: PersonalizeSettings,
    sink: Sink,
    *,
    every: bool = False,
) -> None:
    """Prints the plan of a run; ends with exit code 5 where nothing fits the budget.

    Args:
        start: the reference of the adapter to start from, and the store that it may lie in.
        every: show all candidates in the text.
    """
    from edge_tcur_runtime.cli.inputs import load_for
    from edge_tcur_runtime.cli.references import load_start
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import plan_personalize

    bundle = open_bundle(root)
    dataset = load_for(bundle, data, columns, require_labels=True)
    begin = load_start(start[0], bundle, start[1], sink, change=False)
    found = plan_personalize(bundle, dataset, settings, start=begin)
    sink.result(found.to_dict(), describe(found, every=every))
    if found.plan.chosen is None:
        click.get_current_context().exit(ExitCode.BUDGET)


def describe(found: RunPlan, *, every: bool = False) -> str:
    """A plan as text: of each engine, graph and number of threads the fastest that fits, and what is faster
    and does not; `every` shows all candidates."""
    candidates = list(found.plan.candidates) if every else shown(found)
    rows = [
        (
            candidate.footprint.engine,
            candidate.footprint.graph,
            str(candidate.footprint.threads),
            micro_batches(candidate),
            format_size(candidate.peak),
            f"{candidate.seconds:.3f}",
            duration(candidate.seconds * found.updates),
            candidate.verdict,
        )
        for candidate in candidates
    ]
    hidden = len(found.plan.candidates) - len(candidates)
    limit = "no budget" if found.plan.limit is None else f"budget {format_size(found.plan.limit)}"
    lines = [f"{limit}, {found.updates} updates; nothing was changed", table(HEADER, rows)]
    if hidden:
        lines.append(f"{hidden} more that one above makes pointless: --all shows them, --json has them")
    lines += [f"{what}: {value}" for what, value in _promises(found)]
    if found.plan.chosen is None:
        lines += [
            f"NOTHING FITS: give at least --budget {found.plan.named}MiB",
            *(f"or: {text}" for text in found.advice),
        ]
    elif not found.plan.chosen.footprint.measured:
        lines.append("nothing was measured: figures are of the bundle's tables")
    return "\n".join(lines)


def _promises(found: RunPlan) -> list[tuple[str, str]]:
    """How the new adapter will be judged, when the run may end, and what it spends."""
    apart = f"{found.holdout_samples} held-out samples" if found.holdout_samples else ""
    own = "no worse on its own training samples" if "training" in found.judged_by else ""
    public = f"the bundle's reference set of {found.reference_samples}" if found.reference_samples else ""
    patience = f"after {found.patience} epochs without a lower held-out loss" if found.patience else "never"
    return [
        ("trained on", f"{found.samples} samples"),
        (
            "judged by",
            " and ".join(filter(None, (apart, public, own))) or _UNJUDGED,
        ),
        ("stops early", patience),
        *privacy_rows(found.privacy),
    ]


def privacy_rows(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a run spends (`edge_tcur_runtime.privacy.PrivacyPlan.facts`), as rows of a report."""
    if found is None:
        return []
    spent = (
        f"epsilon {found['epsilon']:.3g} at delta {found['delta']:.1e}" if found["promised"] else "no promise"
    )
    how = f"noise {found['noise_multiplier']:.3g}, bound {found['clip']:g}, {found['steps']} updates"
    total = found["total_epsilon"]
    rows = [("privacy of this run", f"{spent} ({how})")]
    return [*rows, ("of the adapter, all runs", "no bound" if total is None else f"epsilon {total:.3g}")]


def shown(found: RunPlan) -> list[Candidate]:
    """Without those that a faster one makes pointless: of the same engine, graph and threads, with no less
    memory. Where that one fits, slower ones with less memory are pointless too; where neither does, so are
    the same passes on other threads, which take about as much."""
    from edge_tcur_runtime.planner import room

    plan, kept = found.plan, list[tuple[tuple[str, str, int], int]]()
    rows: list[Candidate] = []
    least = plan.smallest
    for candidate in plan.candidates:  # the fastest first
        large = plan.limit is not None and candidate.peak > room(plan.limit) and candidate is not least
        if large and any(c.runs == candidate.runs and c.passes == candidate.passes for c in rows):
            continue
        known = [peak for way, peak in kept if way == candidate.way]
        fitted = plan.limit is None or any(peak <= room(plan.limit) for peak in known)
        if known and (fitted or candidate.peak >= min(known)):
            continue
        kept.append((candidate.way, candidate.peak))
        rows.append(candidate)
    return rows


def micro_batches(candidate: Candidate) -> str:
    """Samples of a pass, of each length where they differ."""
    limits = candidate.passes.limits
    if not limits:
        return str(candidate.passes.micro_batch)
    return ", ".join(f"{count} x {length}" for length, count in sorted(limits.items(), reverse=True))


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
