"""`edge-tcur plan`: what an export would write, lack and need, without writing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur.cli.inspect import RUN_FILE, not_ours
from edge_tcur.cli.options import DEFAULT_TARGETS, plan_options, target_option
from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.cli.framework import PATH, output_options
from edge_tcur_runtime.errors import ExitCode
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.planner import room
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur.training.run import Run
    from edge_tcur_export.choices import Choice
    from edge_tcur_export.plan import Plan, PlanRequest
    from edge_tcur_export.providers import Unsupported
    from edge_tcur_export.settings import ExportSettings

EPILOG = """\b
Examples:
  edge-tcur plan run/ --device raspberry-pi-5-8gb
  edge-tcur plan run/ --target step --provider webgpu --batch 16
  edge-tcur plan bundle/ --budget 256MiB
"""
_SHOWN = 8  # nodes and operators in the text; JSON has all of them
_PLACES = 3  # nodes of an operator that are named


@click.command("plan", epilog=EPILOG)
@click.argument("path", type=PATH, metavar="RUN|BUNDLE")
@target_option("Of a run, as for export.")
@plan_options
@output_options
@click.pass_context
def plan(context: click.Context, /, path: Path, targets: Sequence[str], sink: Sink, **options: Any) -> None:
    """Say what an export of RUN would write, need and lack; of a BUNDLE, what it needs and lacks."""
    from edge_tcur.training import open_run
    from edge_tcur_export.plan import plan_bundle
    from edge_tcur_export.settings import ExportSettings
    from edge_tcur_runtime.formats.bundle import MANIFEST, open_bundle

    request, device = make_request(targets, options), options["device"]
    if (path / MANIFEST).is_file():
        report(plan_bundle(open_bundle(path), device, request), sink, context)
    elif not (path / RUN_FILE).is_file():
        raise not_ours(path)
    else:
        settings = ExportSettings(tuple(dict.fromkeys(targets)) or DEFAULT_TARGETS, device)
        plan_export(open_run(path), settings, request, sink, context)


def make_request(targets: Sequence[str], options: dict[str, Any]) -> PlanRequest:
    """What a plan is for, from the options of `plan_options`."""
    from edge_tcur_export.plan import PlanRequest

    given = {name: options[name] for name in ("provider", "batch", "length", "budget")}
    return PlanRequest(
        **{name: value for name, value in given.items() if value is not None}, required=tuple(targets)
    )


def plan_export(
    run: Run, settings: ExportSettings, request: PlanRequest, sink: Sink, context: click.Context
) -> None:
    """Plans the export of a run and reports it."""
    from edge_tcur_export.plan import plan_run

    with stage_bar(sink, "planning") as bar:
        found = plan_run(run, settings, request, bar.stage)
    report(found, sink, context)


def report(found: Plan, sink: Sink, context: click.Context) -> None:
    """Prints a plan; ends with exit code 4 where a target that was asked for cannot work."""
    sink.result(found.to_dict(), describe(found))
    if found.impossible:
        context.exit(ExitCode.INCOMPATIBLE)


def describe(found: Plan) -> str:
    """A plan as text."""
    groups = [
        (name, *(f"{group[key]:,}" for key in ("count", "n1", "n2", "rank", "trained_numbers")))
        for name, group in found.groups.items()
    ]
    files = [(name, format_size(size)) for name, size in found.files.items()]
    files += [(name, "known after the export") for name in found.open_files]
    parts = [
        table(("Adapted weights", "Count", "n1", "n2", "Rank", "Trained"), groups),
        table(("File", "Size"), files),
        *_gradients(found),
        *(_kernels(name, roles) for name, roles in found.no_kernel.items()),
        _memory(found),
        choices(found),
        "\n".join(
            [f"CANNOT WORK: {target}: {reason}" for target, reason in found.impossible.items()]
            + [f"note: {note}" for note in found.notes]
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _gradients(found: Plan) -> list[str]:
    from edge_tcur_export.operators import replacement

    if not found.no_gradient:
        return []
    lines = [f"  {node}: use {replacement(node.operator)}" for node in found.no_gradient[:_SHOWN]]
    more = len(found.no_gradient) - _SHOWN
    lines += [f"  and {more} more (--json has all)"] if more > 0 else []
    return ["\n".join(["operators without a gradient in ONNX Runtime Training:", *lines])]


def _kernels(provider: str, roles: dict[str, list[Unsupported]]) -> str:
    from edge_tcur_export.kernels import kernel_instead
    from edge_tcur_export.providers import PROVIDERS

    lines = [f"kernels of the provider {provider} ({PROVIDERS[provider].source}):"]
    for role, nodes in roles.items():
        values = [node for node in nodes if not node.integer]
        sizes = len(nodes) - len(values)
        where = (
            f"{sizes} nodes of sizes and indices stay on the CPU" if sizes else "every size is computed there"
        )
        lines.append(f"  {role}: {len(values)} nodes of values have none; {where}")
        counts = Counter(node.operator for node in values)
        for operator, count in counts.most_common(_SHOWN):
            own = [node for node in values if node.operator == operator]
            places = [f"{node.node} ({node.module or 'module not known'})" for node in own[:_PLACES]]
            places += ["..."] if count > _PLACES else []
            lines.append(f"    {operator} x {count}: {', '.join(places)}")
            lines.append(f"      use {kernel_instead(own[0], provider)}")
        more = len(counts) - _SHOWN
        lines += [f"    and {more} more operators (--json has all)"] if more > 0 else []
    return "\n".join(lines)


def choices(found: Plan) -> str:
    """What to export for the memory that there is, and how fast that trains.

    Of each form the fastest that fits, or the smallest where none does; without a budget the whole batch at
    once and one sample.
    """
    made = found.choices
    if not made.rows:
        return ""
    rows = [
        (
            row.form.precision,
            row.form.graph,
            str(row.micro_batch),
            format_size(row.form.base_bytes),
            format_size(row.peak),
            f"{row.seconds:.3g}",
            row.verdict,
        )
        for row in _worth_showing(found)
    ]
    tokens = f" of {found.length} tokens" if found.length else ""
    whose = "of one thread of this machine, from one pass here" if made.measured else "of a common core"
    header = ("Precision", "Graph", "Samples a pass", "Base", "Peak", "Seconds an update", "")
    lines = [
        f"ways to train {found.batch} samples{tokens} an update with ort-step (--json has all); peaks are\n"
        f"what a device begins with, seconds are {whose}:\na device's differ, their order hardly does",
        table(header, rows),
    ]
    if made.chosen is not None:
        lines.append(f"taken: {made.chosen.options}, {made.chosen.micro_batch} samples a pass")
    elif found.budget is not None:
        lines.append(f"NOTHING FITS: the least is --budget {made.named}MiB with {made.smallest.options}")
    return "\n".join([*lines, *(f"not planned: {text}" for text in made.lacking)])


def _worth_showing(found: Plan) -> list[Choice]:
    budget, rows = found.budget, found.choices.rows  # the fastest first
    shown = []
    for form in dict.fromkeys((row.form.precision, row.form.graph) for row in rows):
        own = [row for row in rows if (row.form.precision, row.form.graph) == form]
        least = min(own, key=lambda row: row.peak)
        if budget is None:
            shown += [max(own, key=lambda row: row.micro_batch), least][: 1 + (found.batch > 1)]
        else:
            shown.append(next((row for row in own if row.peak <= room(budget)), least))
    return sorted(shown, key=lambda row: row.seconds)


def _memory(found: Plan) -> str:
    def verdict(fits: bool | None, largest: int | None) -> str:
        if fits is None:
            return ""
        if not largest:
            return "TOO LARGE: not one sample fits"
        return f"fits; largest batch {largest}" if fits else f"TOO LARGE; largest batch {largest}"

    rows = [
        (
            role,
            *(format_size(size) for size in entry.estimate.to_dict().values()),
            verdict(entry.fits, entry.largest_batch),
        )
        for role, entry in found.memory.items()
    ]
    length = f" of {found.length} tokens" if found.length else ""
    limit = f", {format_size(found.budget)} for the app" if found.budget is not None else ""
    title = (
        f"predicted peak memory at a batch of {found.batch}{length} on {found.device or 'any device'}{limit}:"
    )
    header = ("Graph", "Libraries", "Session", "Base", "Values", "Total", "")
    return f"{title}\n{table(header, rows)}"
