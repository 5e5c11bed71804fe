"""`edge-tcur export`: from a run to a bundle for devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur.cli.options import DEFAULT_TARGETS, EXECUTORCH, force_option, plan_options, target_option
from edge_tcur.cli.plan import make_request, plan_export
from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.cli.framework import COUNT, DIRECTORY, EXISTING_PATH, PATH, output_options
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.formats.bundle import ADAMW, HELD_OUT, OPTIMIZERS
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_export.quantization import QuantizationReport
    from edge_tcur_export.report import ExportReport
    from edge_tcur_export.settings import ExportSettings, ReferenceSettings

EPILOG = """\b
Examples:
  edge-tcur export run/ --out bundle/
  edge-tcur export run/ --out bundle/ --target onnx --target step --device raspberry-pi-5-8gb
  edge-tcur export run/ --out bundle/ --precision int8
  edge-tcur export run/ --out bundle/ --recompute --last-blocks 2
  edge-tcur export run/ --out bundle/ --reference public.csv --reference-samples 128
  edge-tcur export run/ --out bundle/ --target executorch --backend xnnpack --max-length 64
"""
BACKENDS = ("portable", "xnnpack")
PRECISIONS = ("fp32", "int8", "int4")
VULKAN = "vulkan"
_SHOWN = 6  # operators in one line


@click.command("export", epilog=EPILOG)
@click.argument("run", type=PATH)
@click.option("--out", type=DIRECTORY, metavar="BUNDLE", help="Directory to write; needed but for --dry-run.")
@target_option("What to export; say it once for each. By default all that run on ONNX Runtime.")
@click.option(
    "--backend",
    "backends",
    type=click.Choice((*BACKENDS, VULKAN)),
    multiple=True,
    help="Kernels of ExecuTorch's programs; say it once for each. By default portable and xnnpack.",
)
@click.option(
    "--max-batch",
    type=COUNT,
    help="Samples that ExecuTorch's programs reserve memory for.  [default: the run's batch size]",
)
@click.option(
    "--max-length",
    type=COUNT,
    help="Tokens that they reserve memory for.  [default: the base's, at most 128]",
)
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    help="What optimizer.onnx of ONNX Runtime Training does.  [default: adamw]",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[0],
    show_default=True,
    help="Of the base's large weights; int8 and int4 are for ONNX Runtime.",
)
@click.option(
    "--recompute",
    is_flag=True,
    help="Also a step graph that keeps only each block's input: less memory, more time.",
)
@click.option(
    "--last-blocks",
    type=COUNT,
    metavar="K",
    help="Also a step graph in which the last K blocks alone learn.",
)
@click.option(
    "--reference",
    type=EXISTING_PATH,
    metavar="DATA",
    help="Public samples that go into the bundle: no device keeps an adapter that falls behind on them.",
)
@click.option(
    "--reference-samples",
    type=COUNT,
    metavar="N",
    help="How many; without --reference, of those that the run held out.  [default: 64]",
)
@click.option("--verify/--no-verify", default=True, help="Compare every graph with torch.", show_default=True)
@force_option
@click.option("--dry-run", is_flag=True, help="Write nothing; say what would be written, needed and lacking.")
@plan_options
@output_options
@click.pass_context
def export(
    context: click.Context, /, run: Path, out: Path | None, force: bool, sink: Sink, **options: Any
) -> None:
    """Export the frozen base of RUN, once, and the factors that are small enough to be sent often.

    The bundle appears whole or not at all; a target that does not agree with torch is left out of it.
    """
    from edge_tcur.training import open_run
    from edge_tcur_export.bundle import export_run

    settings = _settings(options)
    if options["dry_run"]:
        plan_export(open_run(run), settings, make_request(options["targets"], options), sink, context)
        return
    if out is None:
        raise UsageError("--out is missing", hint="name the directory to write, or say --dry-run")
    opened = open_run(run)
    with stage_bar(sink, "exporting") as bar:
        report = export_run(opened, out, settings, force=force, on_stage=bar.stage)
    sink.result(report.to_dict(), _describe(report, out))


def _settings(options: Mapping[str, Any]) -> ExportSettings:
    """The settings of an export from the command's options."""
    from edge_tcur_export.settings import ExportSettings, ProgramSettings

    targets = tuple(dict.fromkeys(options["targets"])) or DEFAULT_TARGETS
    for_programs = {f"--{name.replace('_', '-')}": options[name] for name in ("max_batch", "max_length")}
    idle = {"--backend": options["backends"], **for_programs}
    _refuse_idle(targets, EXECUTORCH, "ExecuTorch's programs", idle)
    training = "ort-training"
    _refuse_idle(
        targets, training, "ONNX Runtime Training's artifacts", {"--optimizer": options["optimizer"]}
    )
    for name in ("provider", "batch", "length", "budget"):
        if options[name] is not None and not options["dry_run"]:
            raise UsageError(f"--{name} is for a plan", hint="add --dry-run, or use edge-tcur plan")
    programs = ProgramSettings(
        tuple(dict.fromkeys(options["backends"])) or BACKENDS,
        options["max_batch"] or 0,
        options["max_length"] or 0,
    )
    return ExportSettings(
        targets,
        options["device"],
        options["verify"],
        programs,
        optimizer=options["optimizer"] or ADAMW,
        precision=options["precision"],
        recompute=options["recompute"],
        last_blocks=options["last_blocks"] or 0,
        reference=_reference(options["reference"], options["reference_samples"]),
    )


def _reference(data: Path | None, samples: int | None) -> ReferenceSettings | None:
    from edge_tcur_export.settings import ReferenceSettings

    if data is None and samples is None:
        return None
    return ReferenceSettings(data) if samples is None else ReferenceSettings(data, samples)


def _refuse_idle(targets: tuple[str, ...], target: str, what: str, options: Mapping[str, object]) -> None:
    """Options of a target that was not asked for would do nothing."""
    for name, value in options.items():
        if value and target not in targets:
            raise UsageError(f"{name} is for {what}", hint=f"add --target {target}")


def _describe(report: ExportReport, out: Path) -> str:
    sizes = [("base, shared by all graphs", format_size(report.base_bytes))]
    sizes += [(name, format_size(size)) for name, size in report.graph_bytes.items()]
    sizes += [(name, format_size(size)) for name, size in report.executorch.bytes.items()]
    reserved = [
        (name, format_size(program.memory), ", ".join(f"{n} {axis}" for axis, n in program.limits.items()))
        for name, program in report.executorch.programs.items()
    ]
    errors = [
        (target, quantity, f"{value:.1e}")
        for target, values in report.parity.items()
        for quantity, value in values.items()
    ]
    parity = table(("Graph", "Compared with torch", "Error"), errors) if errors else "not compared with torch"
    return "\n".join(
        [
            table(("File", "Size"), sizes),
            "",
            *([table(("Program", "Reserves", "For at most"), reserved), ""] if reserved else []),
            *_outside(report),
            *(
                f"{count} tensors of the base were {dtype}; the graphs hold them in float32"
                for dtype, count in report.converted.items()
            ),
            *_quantised(report.quantization),
            parity,
            *_compared_on(report),
            *(f"{name}: not compared: {reason}" for name, reason in report.not_run.items()),
            "",
            f"wrote {out} in {report.seconds:.1f} s",
            f"next: edge-tcur-device doctor --bundle {out}",
        ]
    )


def _compared_on(report: ExportReport) -> list[str]:
    """What inputs the graphs were compared on."""
    if not report.parity:
        return []
    held_out, note = report.held_out.inputs == HELD_OUT, report.held_out.note
    text = "compared on samples that the run held out, and on random inputs"
    return [(text if held_out else "compared on random inputs alone") + (f": {note}" if note else "")]


def _outside(report: ExportReport) -> list[str]:
    """A line for each program with delegates: the operators that are left outside them."""
    lines = [
        f"{name}: outside its delegates {sum(counts.values())} operators, "
        + ", ".join(f"{operator} {count}" for operator, count in list(counts.items())[:_SHOWN])
        for name, counts in report.executorch.left_over.items()
    ]
    lines += [
        f"{name}: holds a second copy of {format_size(size)} of the base"
        for name, size in report.executorch.packed.items()
    ]
    return [*lines, ""] if lines else []


def _quantised(report: QuantizationReport) -> list[str]:
    """What the precision changed."""
    if not report.relative_errors:
        return []
    name, error = report.worst()
    change = ", ".join(f"{which} {value:.1e}" for which, value in report.output_change.items())
    rows = [
        ("bytes of the base", f"{format_size(report.base_bytes_fp32)} -> {format_size(report.base_bytes)}"),
        ("worst weight, relative error", f"{error:.1e} ({name})"),
        ("canary's outputs, relative", change),
        ("held-out accuracy", report.note or _accuracy(report)),
    ]
    return [table((f"fp32 -> {report.precision}", "Change"), rows), ""]


def _accuracy(report: QuantizationReport) -> str:
    accuracy = report.accuracy or {}
    before, after = accuracy["fp32"], accuracy[report.precision]
    return f"{before:.1%} -> {after:.1%} ({accuracy['samples']:.0f} samples)"
