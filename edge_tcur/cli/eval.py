"""`edge-tcur eval`: the score of an adapter and of its base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.cli.framework import PATH, output_options
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.tasks import find_device_task

EPILOG = """\b
Examples:
  edge-tcur eval run/ --data test.csv
  edge-tcur eval run/ --data test.csv --adapter personal.safetensors --json
"""


@click.command("eval", epilog=EPILOG)
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Labelled data of the run's kind.")
@click.option("--adapter", type=PATH, metavar="FILE", help="Another adapter of the same base.")
@output_options
def evaluate(run: Path, data: Path, adapter: Path | None, sink: Sink) -> None:
    """Score the adapter of RUN, and its base without it, on labelled data."""
    from edge_tcur.training import evaluate_run, open_run
    from edge_tcur_runtime.formats.adapter import read_adapter

    opened = open_run(run)
    scored = opened.adapter_path if adapter is None else adapter
    content = read_adapter(scored)
    with stage_bar(sink, "scoring"):
        result = evaluate_run(opened, data, adapter=content)
    metric = find_device_task(opened.config.task).metric
    rows = [("base", metric.format(result.base_score)), ("adapter", metric.format(result.adapter_score))]
    payload = {"run": str(run), "adapter": str(scored), "data": str(data), **asdict(result)}
    sink.result(
        payload, f"{table(('Model', metric.name.capitalize()), rows)}\non {result.samples} samples of {data}"
    )
