"""`edge-tcur export`: from a run to a bundle for devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.cli.framework import DIRECTORY, output_options
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_export.bundle import ExportReport

EPILOG = """\b
Examples:
  edge-tcur export run/ --out bundle/
  edge-tcur export run/ --out bundle/ --target onnx --target step --device raspberry-pi-5-8gb
"""
TARGETS = ("onnx", "ort-training", "step")


@click.command("export", epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=DIRECTORY, required=True, metavar="BUNDLE", help="Directory to write.")
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    help="What to export; say it once for each. By default all of them.",
)
@click.option("--device", metavar="NAME", help="A device profile (see edge-tcur devices), or its file.")
@click.option("--verify/--no-verify", default=True, help="Compare every graph with torch.", show_default=True)
@click.option("--force", is_flag=True, help="Replace what is at --out.")
@output_options
def export(
    run: Path, out: Path, targets: tuple[str, ...], device: str | None, verify: bool, force: bool, sink: Sink
) -> None:
    """Export the frozen base of RUN, once, and the factors that are small enough to be sent often.

    The bundle appears whole or not at all.
    """
    from edge_tcur.training import open_run
    from edge_tcur_export.bundle import export_run

    opened = open_run(run)
    chosen = tuple(dict.fromkeys(targets)) or TARGETS
    with stage_bar(sink, "exporting") as bar:
        report = export_run(
            opened, out, targets=chosen, device=device, verify=verify, force=force, on_stage=bar.stage
        )
    sink.result(report.to_dict(), _describe(report, out))


def _describe(report: ExportReport, out: Path) -> str:
    sizes = [("base, shared by all graphs", format_size(report.base_bytes))]
    sizes += [(name, format_size(size)) for name, size in report.graph_bytes.items()]
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
            parity,
            "",
            f"wrote {out} in {report.seconds:.1f} s",
            f"next: edge-tcur-device doctor --bundle {out}",
        ]
    )
