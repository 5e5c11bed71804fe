"""`edge-tcur quickstart`: the whole path on bundled data, with one bar, one table and one plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.atomic import disk_error
from edge_tcur_runtime.cli.framework import DIRECTORY, SIZE, output_options
from edge_tcur_runtime.errors import OutputExistsError
from edge_tcur_runtime.output import Sink

if TYPE_CHECKING:
    from edge_tcur.quickstart.run import QuickstartResult

_MARK = ".edge-tcur-quickstart"

EPILOG = """\b
Examples:
  edge-tcur quickstart
  edge-tcur quickstart --out demo/ --budget 128MiB
  edge-tcur quickstart --json --out demo/
"""


@click.command(epilog=EPILOG)
@click.option("--out", type=DIRECTORY, default=Path("edge-tcur-quickstart"), show_default=True, metavar="DIR",
              help="Everything is written here.")  # fmt: skip
@click.option("--budget", type=SIZE, default="256MiB", show_default=True,
              help="Peak memory of the device's process.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the split, the base and the orders.")
@click.option("--force", is_flag=True, help="Replace what an earlier quickstart left in DIR.")
@output_options
def quickstart(out: Path, budget: int, seed: int, force: bool, sink: Sink) -> None:
    """See the whole path in about two minutes: no download, no account, two cores.

    On real handwriting it trains a small base, shows it failing on a user whose scans are turned and
    inverted, trains a tCURLoRA adapter (beside LoRA and full fine-tuning), exports base and factors
    separately, and personalises and swaps adapters on a device process that cannot import torch.
    """
    _prepare(out, force)
    with stage_bar(sink, "starting", total=1.0) as bar:
        from edge_tcur.quickstart.report import write_report
        from edge_tcur.quickstart.run import quickstart as run

        shown = 0.0

        def advance(text: str, done: float) -> None:
            nonlocal shown
            bar.stage(text)
            bar.advance(max(0.0, done - shown))
            shown = max(shown, done)

        result = run(out, seed=seed, budget=budget, on_progress=advance)
        payload = write_report(result)
    sink.result(payload, _text(result))


def _prepare(out: Path, force: bool) -> None:
    """Makes room: what an earlier quickstart left is replaced only when asked, anything else never."""
    mark = out / _MARK
    if out.exists() and any(out.iterdir()):
        if not (force and mark.is_file()):
            raise OutputExistsError(
                "the output directory is not empty",
                where=str(out),
                hint="choose another --out, or say --force to replace an earlier quickstart",
            )
        import shutil

        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text("written by edge-tcur quickstart; --force may remove this folder\n", encoding="utf-8")
    except OSError as error:
        raise disk_error(error, out) from error


def _text(result: QuickstartResult) -> str:
    from rich.console import Console

    from edge_tcur.quickstart.report import build_device_table, build_table

    console = Console(width=100)
    with console.capture() as capture:
        console.print(build_table(result))
        console.print(build_device_table(result))
    paths = "\n".join(f"  {name:<8} {path}" for name, path in result.paths.items())
    return f"{capture.get()}\nWritten in {result.seconds:.0f} s:\n{paths}"
