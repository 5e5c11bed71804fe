"""`edge-tcur compare`: methods against each other on the same problems."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.cli.framework import COUNT, DIRECTORY, output_options
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.output import Sink

if TYPE_CHECKING:
    from edge_tcur.compare.problems import AnyProblem
    from edge_tcur.compare.records import Record
    from edge_tcur.compare.runner import Grid

EPILOG = """\b
Examples:
  edge-tcur compare --problem digits --out comparison/
  edge-tcur compare --text trec trec/train.csv trec/test.csv 100 --method gradient-r8 --method lora-r8
      --method full --method head --seeds 5 --out comparison/
  edge-tcur compare --problem digits --method '{"preset": "gradient", "rank": 4}' --out comparison/
"""
DEFAULT_METHODS = ("head", "full", "lora-r8", "gradient-r8", "sketch-r8")
PROBLEMS = ("digits", "segmentation")
PATH = click.Path(path_type=Path)


@click.command("compare", epilog=EPILOG)
@click.option("--problem", "problems", type=click.Choice(PROBLEMS), multiple=True, help="Built-in problem.")
@click.option(
    "--text",
    "texts",
    type=(str, PATH, PATH, COUNT),
    multiple=True,
    metavar="NAME TRAIN TEST SHOTS",
    help="Text classification from two CSV files, SHOTS training rows a class.",
)
@click.option("--base", default="all-MiniLM-L6-v2", show_default=True, help="Encoder of the text problems.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="Method (see --list), or a JSON object of TCurConfig's settings. By default "
    f"{', '.join(DEFAULT_METHODS)}.",
)
@click.option("--seeds", type=COUNT, default=3, show_default=True, help="Seeds of each method.")
@click.option("--epochs", type=COUNT, metavar="N", help="Passes over the training data.")
@click.option("--workers", type=COUNT, metavar="N", help="Runs at once; one a core by default.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where to train: cpu, cuda.")
@click.option(
    "--out", type=DIRECTORY, default=Path("comparison"), show_default=True, help="Folder of records."
)
@click.option("--list", "listing", is_flag=True, help="List the methods and stop.")
@output_options
def compare(out: Path, listing: bool, sink: Sink, **options: Any) -> None:
    """Train several methods on the same problems and write records, a table and a plot.

    Every method's learning rate is swept on the validation part of the first seed, and goes beyond its
    range while the best lies at an end. What is recorded is not run again: an interrupted comparison
    goes on where it stopped, and one more seed adds only its own runs.
    """
    if listing:
        _list(sink)
        return
    if not options["problems"] and not options["texts"]:
        raise UsageError("no problem was named", hint="say --problem digits, or --text NAME TRAIN TEST SHOTS")
    from edge_tcur.compare.methods import find_method
    from edge_tcur.compare.runner import Grid

    chosen = tuple(dict.fromkeys(options["methods"])) or DEFAULT_METHODS
    for name in chosen:
        find_method(name)
    grid = Grid(_problems(options), chosen, options["seeds"])
    _run(grid, out, options["workers"] or os.cpu_count() or 1, options["device"], sink)


def _list(sink: Sink) -> None:
    from edge_tcur.compare.methods import METHODS

    lines = [f"{name:18} {method.about}" for name, method in METHODS.items()]
    sink.result({"methods": {name: method.about for name, method in METHODS.items()}}, "\n".join(lines))


def _problems(options: Mapping[str, Any]) -> list[AnyProblem]:
    from edge_tcur.compare.problems import DigitsProblem, SegmentationProblem, TextProblem

    own = {} if options["epochs"] is None else {"epochs": options["epochs"]}
    built_in: dict[str, Any] = {"digits": DigitsProblem, "segmentation": SegmentationProblem}
    found: list[AnyProblem] = [built_in[name](**own) for name in dict.fromkeys(options["problems"])]
    for name, train, test, shots in options["texts"]:
        base = options["base"]
        found.append(TextProblem(f"{name}-{shots}", base, train.resolve(), test.resolve(), shots, **own))
    return found


def _run(grid: Grid, out: Path, workers: int, device: str, sink: Sink) -> None:
    from edge_tcur.compare.records import RECORDS
    from edge_tcur.compare.report import describe, draw_plot, summarize
    from edge_tcur.compare.runner import run_grid

    with stage_bar(sink, "comparing") as bar:

        def on_record(record: Record, left: int) -> None:
            text = f"{record.problem} {record.method} {record.rate:g} seed {record.seed}: {record.test:.1%}"
            bar.advance(0, detail=f"{text}, {left} left")
            sink.note(text)

        records = run_grid(grid, out, workers=workers, device=device, on_record=on_record)
    summary = summarize(records)
    plot = out / "comparison.png"
    draw_plot(summary, plot)
    payload = {"records": str(out / RECORDS), "plot": str(plot), **summary.to_dict()}
    sink.result(payload, f"{describe(summary)}\n\nwrote {plot} from {out / RECORDS}")
