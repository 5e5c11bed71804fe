"""`edge-tcur-device adapters compare`: several adapters in one live process, the base loaded once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur_runtime.cli.framework import EXISTING_DIRECTORY, data_options, output_options, store_option
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.formats.adapter import Adapter
    from edge_tcur_runtime.predict import Model

    Load = Callable[[], Adapter | None]

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
    verifying and attaching; the median of five. Where the active adapter does not work, what
    predictions use in its place is scored, with a note; the store is left as it is.
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
        swapped = _swap(model, *_resolve(model, ref, store, sink))
        score = model.score(dataset)
        scored = {"score": score, "accuracy": score if metric.name == ACCURACY else None}
        rows.append((ref, metric.format(score), f"{swapped['swap_ms']:.2f}"))
        results.append({"adapter": ref, **scored, **swapped})
    peak = read_memory().peak
    human = table(("adapter", metric.name, "swap ms"), rows) + f"\npeak memory {format_size(peak)}"
    payload = {"samples": len(dataset), "metric": metric.name, "adapters": results, "peak_rss_bytes": peak}
    sink.result(payload, human)


def _resolve(model: Model, ref: str, store: Path, sink: Sink) -> tuple[Load, list[dict[str, str]]]:
    """How the adapter that `ref` names is read, and what was passed over on the way to it.

    An adapter that was asked for by its name must work; for the active one there is a way on, as in
    `edge_tcur_runtime.cli.predict`.
    """
    from edge_tcur_runtime.cli.references import load_reference
    from edge_tcur_runtime.store import Store
    from edge_tcur_runtime.trial import serve_with

    if ref != "active" or not store.is_dir():
        return partial(load_reference, ref, model.bundle, store), []
    opened = Store.open(store, create=False)
    found = serve_with(opened, model, change=False)
    for note in found.notes:
        sink.note(note)
    passed = [asdict(one) for one in found.passed_over]
    return (lambda: None if found.digest is None else opened.verified(found.digest)), passed


def _swap(model: Model, load: Load, passed: list[dict[str, str]]) -> dict[str, Any]:
    """Attaches the adapter `_SWAPS` times; its digest (None is the base) and the median in milliseconds."""
    from edge_tcur_runtime.origin import content_digest

    seconds = []
    for _ in range(_SWAPS):
        started = time.perf_counter()
        adapter = load()
        model.attach(adapter)
        seconds.append(time.perf_counter() - started)
    digest = None if adapter is None else content_digest(adapter)
    return {"digest": digest, "swap_ms": 1000 * statistics.median(seconds), "passed_over": passed}
