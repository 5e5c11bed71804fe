"""What a comparison shows: one table and one plot, both from its records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_tcur.compare.records import Record
from edge_tcur.compare.runner import best_rate, chosen
from edge_tcur_runtime.output import table
from edge_tcur_runtime.units import format_size

MATTERS = 0.02  # adaptation matters where full fine-tuning beats a trained head by this much
FULL, HEAD, LORA = "full", "head", "lora-r8"


@dataclass(frozen=True)
class Row:
    """One method on one problem.

    Attributes:
        mean, deviation: of the test scores over `seeds` seeds at the chosen rate, 0 to 1; the deviation
            is that of a sample, 0 for one seed.
        rate: chosen on the validation part of the first seed; `at_edge`: no higher or lower one was tried
            beyond it, so a better one may exist.
        seconds: mean of the training loop.
        scores: of the test, by seed; seed_numbers: those seeds.
    """

    problem: str
    method: str
    trained_numbers: int
    shipped_bytes: int
    mean: float
    deviation: float
    seeds: int
    rate: float
    at_edge: bool
    seconds: float
    scores: tuple[float, ...]
    seed_numbers: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """All rows, and the problems on which adaptation matters.

    Attributes:
        matters: problem -> full fine-tuning's mean minus the head's; absent where one is not measured.
    """

    rows: tuple[Row, ...]
    matters: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": [
                {**asdict(row), "scores": list(row.scores), "seed_numbers": list(row.seed_numbers)}
                for row in self.rows
            ],
            "full_minus_head": self.matters,
            "judged_on": sorted(name for name, gain in self.matters.items() if gain >= MATTERS),
            "standings": [asdict(one) for one in standings(self)],
        }


def summarize(records: Iterable[Record]) -> Summary:
    """Means at each method's chosen learning rate; of two records of one run the later counts."""
    records = list({record.job: record for record in records}.values())
    sweeps: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        sweeps[record.problem, record.method].append(record)
    rows = [_row(sweeps[key], own) for key, own in chosen(records)]
    means = {(row.problem, row.method): row.mean for row in rows}
    matters = {
        problem: means[problem, FULL] - means[problem, HEAD]
        for problem in {row.problem for row in rows}
        if (problem, FULL) in means and (problem, HEAD) in means
    }
    return Summary(tuple(sorted(rows, key=lambda row: (row.problem, -row.mean))), matters)


def _row(sweep: Sequence[Record], own: Sequence[Record]) -> Row:
    scores = tuple(record.test for record in own)
    rate = best_rate(sweep)
    swept = {record.rate for record in sweep}
    return Row(
        problem=own[0].problem,
        method=own[0].method,
        trained_numbers=own[0].trained_numbers,
        shipped_bytes=own[0].shipped_bytes,
        mean=float(np.mean(scores)),
        deviation=float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        seeds=len(scores),
        rate=rate,
        at_edge=len(swept) > 1 and rate in (min(swept), max(swept)),
        seconds=float(np.mean([record.seconds for record in own])),
        scores=scores,
        seed_numbers=tuple(record.seed for record in own),
    )


def describe(summary: Summary) -> str:
    """The rows as text, problem by problem, best first."""
    parts = []
    for problem in dict.fromkeys(row.problem for row in summary.rows):
        own = [row for row in summary.rows if row.problem == problem]
        gain = summary.matters.get(problem)
        verdict = (
            ""
            if gain is None
            else f": full fine-tuning beats a trained head by {100 * gain:.1f} points"
            + ("" if gain >= MATTERS else "; adaptation does not matter here")
        )
        header = ("Method", "Score", "+-", "Seeds", "Trained", "Shipped", "Rate", "Seconds")
        rows = [
            (
                row.method,
                f"{100 * row.mean:.1f}",
                f"{100 * row.deviation:.1f}" if row.seeds > 1 else "-",
                str(row.seeds),
                f"{row.trained_numbers:,}",
                format_size(row.shipped_bytes),
                f"{row.rate:g}{' (edge)' if row.at_edge else ''}",
                f"{row.seconds:.0f}",
            )
            for row in own
        ]
        parts.append(f"{problem}{verdict}\n{table(header, rows)}")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Standing:
    """One method against LoRA r8 and full fine-tuning, over the problems on which adaptation matters.

    Attributes:
        problems: on which all three are measured.
        to_lora, to_full: differences over the seeds that both have, mean over the problems; above 0 is ahead.
        worst: the smallest difference to LoRA.
        share: largest part of LoRA's trained numbers; shipped: most bytes.
        seeds: fewest of any problem.
    """

    method: str
    problems: tuple[str, ...]
    to_lora: float
    to_full: float
    worst: float
    share: float
    shipped: int
    seeds: int


def standings(summary: Summary) -> list[Standing]:
    """Every method's standing, those measured on most problems first, then the best."""
    cells = {(row.problem, row.method): row for row in summary.rows}
    judged = sorted(problem for problem, gain in summary.matters.items() if gain >= MATTERS)
    judged = [problem for problem in judged if (problem, LORA) in cells]
    found = []
    for method in dict.fromkeys(row.method for row in summary.rows):
        own = [(cells[p, method], cells[p, LORA], cells[p, FULL]) for p in judged if (p, method) in cells]
        if not own:
            continue
        to_lora = [_ahead(row, lora) for row, lora, _ in own]
        found.append(
            Standing(
                method,
                tuple(row.problem for row, *_ in own),
                float(np.mean(to_lora)),
                float(np.mean([_ahead(row, full) for row, _, full in own])),
                min(to_lora),
                max(row.trained_numbers / lora.trained_numbers for row, lora, _ in own),
                max(row.shipped_bytes for row, *_ in own),
                min(row.seeds for row, *_ in own),
            )
        )
    return sorted(found, key=lambda one: (-len(one.problems), -one.to_lora))


def _ahead(row: Row, other: Row) -> float:
    """Mean difference over the seeds that both have."""
    its = dict(zip(other.seed_numbers, other.scores, strict=True))
    mine = zip(row.seed_numbers, row.scores, strict=True)
    return float(np.mean([score - its[seed] for seed, score in mine if seed in its]))


def _standings(summary: Summary) -> str:
    lines = [
        "**Together** (points ahead of LoRA r8 and of full fine-tuning, mean over the problems on which "
        "adaptation matters)",
        "",
        "| method | problems | to LoRA | worst | to full | part of LoRA's numbers | shipped, at most "
        "| seeds, at least |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in standings(summary):
        share = "0" if not one.share else f"1/{1 / one.share:.0f}" if one.share < 1 else f"{one.share:.0f} x"
        lines.append(
            f"| {one.method} | {', '.join(one.problems)} | {100 * one.to_lora:+.1f} | {100 * one.worst:+.1f} "
            f"| {100 * one.to_full:+.1f} | {share} | {format_size(one.shipped)} | {one.seeds} |"
        )
    return "\n".join(lines)


def markdown(summary: Summary) -> str:
    """The rows as Markdown tables, as docs/results.md holds them."""
    parts = [_standings(summary)]
    for problem in dict.fromkeys(row.problem for row in summary.rows):
        gain = summary.matters.get(problem)
        verdict = (
            "" if gain is None else f" (full fine-tuning beats a trained head by {100 * gain:.1f} points)"
        )
        lines = [
            f"**{problem}**{verdict}",
            "",
            "| method | score | seeds | trained | shipped | rate | seconds |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in (row for row in summary.rows if row.problem == problem):
            spread = f" +- {100 * row.deviation:.1f}" if row.seeds > 1 else ""
            lines.append(
                f"| {row.method} | {100 * row.mean:.1f}{spread} | {row.seeds} | {row.trained_numbers:,} "
                f"| {format_size(row.shipped_bytes)} | {row.rate:g}{' (edge)' if row.at_edge else ''} "
                f"| {row.seconds:.0f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw_plot(summary: Summary, path: Path) -> None:
    """Score against trained numbers and against shipped bytes, a row of panels for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = list(dict.fromkeys(row.problem for row in summary.rows))
    methods = sorted({row.method for row in summary.rows})
    colours = {name: pyplot.get_cmap("tab20")(place % 20) for place, name in enumerate(methods)}
    figure, axes = pyplot.subplots(
        len(problems), 2, figsize=(12, 4.2 * len(problems)), squeeze=False, sharey="row", layout="constrained"
    )
    for line, problem in zip(axes, problems, strict=True):
        own = [row for row in summary.rows if row.problem == problem]
        for panel, what, label in (
            (line[0], "trained_numbers", "trained numbers, head apart"),
            (line[1], "shipped_bytes", "bytes shipped, head apart"),
        ):
            _draw_panel(panel, own, what, colours)
            panel.set_xlabel(label)
        line[0].set_ylabel(f"{problem}: score, %")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _name_points(panel: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points; those of neighbours are moved apart, downwards, with a line to their point."""
    height = 9.0 * panel.figure.dpi / 72  # pixels of a line of text
    taken: list[tuple[float, float]] = []
    for size, score, name in sorted((point for point in points if point[0]), key=lambda one: -one[1]):
        x, y = panel.transData.transform((size, score))
        place = y
        while any(abs(place - other) < height and abs(x - across) < 14 * height for across, other in taken):
            place -= height / 4
        taken.append((x, place))
        shift = (place - y) * 72 / panel.figure.dpi
        panel.annotate(
            name,
            (size, score),
            textcoords="offset points",
            xytext=(8, shift - 3),
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5} if shift < -4 else None,
        )


def _draw_panel(panel: Any, rows: Sequence[Row], what: str, colours: Mapping[str, Any]) -> None:
    """Methods as points with the deviation over seeds; the head alone, which has no size, as a line."""
    sizes = [getattr(row, what) for row in rows if getattr(row, what)] or [1]
    scores = [100 * row.mean for row in rows]
    panel.set_xscale("log")
    panel.set_xlim(min(sizes) / 2, max(sizes) * 8)  # room for the names, which stand to the right
    panel.set_ylim(min(scores) - 3, max(scores) + 3)
    panel.grid(alpha=0.3)
    for row in rows:
        score, spread = 100 * row.mean, 100 * row.deviation
        if not getattr(row, what):
            panel.axhline(score, color="grey", linestyle=":", label=f"{row.method} ({score:.1f})")
            continue
        size = getattr(row, what)
        ours = row.method.startswith(("gradient-r", "gradient-shared", "sketch", "update", "paper"))
        colour = colours[row.method]
        panel.errorbar(size, score, yerr=spread, fmt="o" if ours else "s", capsize=3, color=colour)
    _name_points(panel, [(getattr(row, what), 100 * row.mean, row.method) for row in rows])
    if any(not getattr(row, what) for row in rows):
        panel.legend(loc="lower right", fontsize=8)
