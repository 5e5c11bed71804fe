"""`edge-tcur merge`, `migrate` and `reduce`: what can be made of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_tcur.cli.options import force_option, run_out_option
from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.cli.framework import COUNT, DIRECTORY, output_options
from edge_tcur_runtime.output import Sink, table

if TYPE_CHECKING:
    from edge_tcur.training.rework import Reworked

RUN = click.Path(path_type=Path)
_MERGE = """\b
Examples:
  edge-tcur merge run/ --out merged/
  edge-tcur merge merged/ --undo --out base/
"""
_MIGRATE = """\b
Examples:
  edge-tcur migrate run/ --base new-version/ --out moved/
  edge-tcur export moved/ --out bundle/
"""
_REDUCE = """\b
Examples:
  edge-tcur reduce run/ --rank 4 --out smaller/
"""


@click.command("merge", epilog=_MERGE)
@click.argument("source", type=RUN, metavar="RUN")
@click.option("--undo", is_flag=True, help="RUN is a merged base: make the base again, bit by bit.")
@click.option("--out", type=DIRECTORY, required=True, metavar="DIR", help="Directory to write.")
@force_option
@output_options
def merge(source: Path, undo: bool, out: Path, force: bool, sink: Sink) -> None:
    """Write the base of RUN with its adapter in the weights, as a model like any other.

    Beside it goes what --undo needs to make the base again, exactly to the bit.
    """
    from edge_tcur.training import open_run
    from edge_tcur.training.rework import merge_run, unmerge

    with stage_bar(sink, "merging"):
        merged = unmerge(source, out, force=force) if undo else merge_run(open_run(source), out, force=force)
    payload = {"directory": str(out), "weights": merged.weights, "files": list(merged.files), "undone": undo}
    done = "brought back" if undo else "changed"
    sink.result(payload, f"{merged.weights} weights {done}\nwrote {out}: {', '.join(merged.files)}")


@click.command("migrate", epilog=_MIGRATE)
@click.argument("run", type=RUN)
@click.option("--base", required=True, metavar="TEXT", help="The new version of the run's base.")
@run_out_option
@force_option
@output_options
def migrate(run: Path, base: str, out: Path, force: bool, sink: Sink) -> None:
    """Bring the adapter of RUN to a new version of its base, as a run of its own.

    Its rows and columns stay; the core is the least-squares fit of the old update onto the new rows and
    columns. The part that is lost is shown for each group: check the accuracy with edge-tcur eval.
    """
    from edge_tcur.training import open_run
    from edge_tcur.training.rework import migrate_run

    with stage_bar(sink, "migrating"):
        result = migrate_run(open_run(run), base, out, force=force)
    _report(result, sink)


@click.command("reduce", epilog=_REDUCE)
@click.argument("run", type=RUN)
@click.option("--rank", type=COUNT, required=True, metavar="N", help="Rank of the new adapter.")
@run_out_option
@force_option
@output_options
def reduce(run: Path, rank: int, out: Path, force: bool, sink: Sink) -> None:
    """Give the adapter of RUN fewer rows and columns, those that hold most of it, as a run of its own."""
    from edge_tcur.training import open_run
    from edge_tcur.training.rework import reduce_run

    with stage_bar(sink, "reducing"):
        result = reduce_run(open_run(run), rank, out, force=force)
    _report(result, sink)


def _report(result: Reworked, sink: Sink) -> None:
    run = result.run
    payload = {
        "run": str(run.root),
        "adapter": str(run.adapter_path),
        "base_digest": result.base_digest,
        "trained_numbers": run.metrics["trained_numbers"],
        "adapter_bytes": run.metrics["adapter_bytes"],
        "residuals": result.residuals,
    }
    rows = [(name, f"{residual:.1%}") for name, residual in result.residuals.items()]
    sink.result(
        payload,
        f"{table(('Group', 'Lost of the update'), rows)}\n\nbase      {result.base_digest}\n"
        f"wrote {run.adapter_path}\nnext: edge-tcur eval {run.root} --data FILE",
    )
