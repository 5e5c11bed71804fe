"""`edge-tcur-device adapters compare`: several adapters in one live process, the base loaded once."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_tcur_runtime.cli.framework import EXISTING_DIRECTORY, data_options, output_options, store_option
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.predict import Model

_SWAPS = 5
EPILOG = """\b
Example:
  edge-tcur-device adapters compare bundle/ --data test.csv --adapter base --adapter bundle --adapter personal
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", type=EXISTING_DIRECTORY)
@click.option("--adapter", "refs", multiple=True, required=True, metavar="REF",
              help="base, bundle, active, a file, or a name or digest in the store; repeatable.")  # fmt: skip
@data_options(required=True)
@store_option
@output_options
def compare(
    bundle: Path, refs: tuple[str, ...], data: Path, columns: dict[str, str], store: Path, sink: Sink
) -> None:
    """Swap through adapters without reloading the base; show score and swap time of each.

    A swap is timed from the adapter's file to the point where the next prediction uses it: reading,
    verifying and attaching; the median of five.
    """
    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.cli.inputs import load_for
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.predict import Model
    from edge_tcur_runtime.tasks import ACCURACY

    opened = open_bundle(bundle)
    dataset = load_for(opened, data, columns, require_labels=True)
    model = Model(opened)
    metric, results, rows = model.task.metric, [], []
    for ref in refs:
        swap_ms = _swap(model, ref, store)
        score = model.score(dataset)
        scored = {"score": score, "accuracy": score if metric.name == ACCURACY else None}
        rows.append((ref, metric.format(score), f"{swap_ms:.2f}"))
        results.append({"adapter": ref, **scored, "swap_ms": swap_ms})
    peak = read_memory().peak
    human = table(("adapter", metric.name, "swap ms"), rows) + f"\npeak memory {format_size(peak)}"
    payload = {"samples": len(dataset), "metric": metric.name, "adapters": results, "peak_rss_bytes": peak}
    sink.result(payload, human)


def _swap(model: Model, ref: str, store: Path) -> float:
    """Attaches the adapter `_SWAPS` times; the median in milliseconds."""
    from edge_tcur_runtime.cli.references import load_reference

    seconds = []
    for _ in range(_SWAPS):
        started = time.perf_counter()
        model.attach(load_reference(ref, model.bundle, store))
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)
