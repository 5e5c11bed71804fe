"""`edge-tcur-device doctor`: what works on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from edge_tcur_runtime.cli.framework import EXISTING_DIRECTORY, output_options, store_option
from edge_tcur_runtime.doctor import examine, render
from edge_tcur_runtime.output import Sink

EPILOG = """\b
Examples:
  edge-tcur-device doctor
  edge-tcur-device doctor --bundle bundle/ --json
"""


@click.command(epilog=EPILOG)
@click.option("--bundle", type=EXISTING_DIRECTORY, metavar="DIR", help="Verify every file of this bundle.")
@store_option
@output_options
@click.pass_context
def doctor(context: click.Context, bundle: Path | None, store: Path, sink: Sink) -> None:
    """Show what works on this machine: engines, libraries, memory and the store.

    Exits with 0 however little works; with --bundle, a bundle that is refused gives the exit code
    of its fault (6 where a digest does not match).
    """
    report = examine(store, bundle)
    sink.result(report.to_dict(), render(report))
    if report.bundle is not None and not report.bundle.ok:
        context.exit(report.bundle.exit_code)
