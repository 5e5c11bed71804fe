"""What a step gains by features that are picked from products: ``python tests/benchmarks/picks.py RUN``.

The training graphs of a text run are exported twice, as they are and with the rows of each weight gathered,
and run in turn, in one process and on one thread, with the runtime's session options. Printed are medians
of processor time (the machine may be shared) and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

from edge_tcur.training.run import open_run
from edge_tcur_export import trace
from edge_tcur_export.bundle import export_run
from edge_tcur_export.convolution import Parts
from edge_tcur_export.settings import ExportSettings
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import bundle_adapter

WAYS = {"step": "ort-step", "step_recompute": "ort-step", "train": "ort-training"}  # graph -> engine
BATCHES = ((1, 32), (4, 32), (16, 32))


def gathered(alone: Any, position: int) -> Parts:
    """The update of one layer with its rows gathered from the weight, in the place of `parts`."""
    found = PICKED(alone, position)
    return Parts(alone._layers[position].rows_t(found.rows), found.matrix, found.columns)


PICKED = trace._Alone.parts


def export(run: Path, folder: Path, *, picked: bool) -> None:
    """A bundle with every training graph of ONNX Runtime."""
    settings = ExportSettings(("onnx", "step", "ort-training"), recompute=True, verify=False)
    with patch.object(trace._Alone, "parts", PICKED if picked else gathered):
        export_run(open_run(run), folder, settings)


def engines(folder: Path) -> dict[str, Any]:
    """An engine of each graph, and what its steps are fed."""
    bundle = open_bundle(folder)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    graphs = {role: "step" if role == "train" else role for role in WAYS}
    return {
        role: (open_engine(WAYS[role], bundle, threads=1, graph=graph), feeds)
        for role, graph in graphs.items()
    }


def measure(ways: dict[str, tuple[Any, Any]], samples: int, length: int, rounds: int) -> None:
    """Prints a line for each way."""
    ids = np.random.default_rng(0).integers(1000, 20000, (samples, length))
    inputs, targets = {"input_ids": ids, "attention_mask": np.ones_like(ids)}, np.arange(samples) % 2
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for count in range(rounds + 2):
        for way, (engine, feeds) in ways.items():
            started = time.process_time()
            engine.step(inputs, targets, feeds)
            if count >= 2:
                seconds[way].append(time.process_time() - started)
    for role in WAYS:
        before, after = (seconds[f"{kind} {role}"] for kind in ("gathered", "picked"))
        ratio = median(mine / other for mine, other in zip(after, before, strict=True))
        sys.stdout.write(
            f"{samples:3} x {length}  {role:15} rows gathered {median(before) * 1e3:8.2f} ms"
            f"   picked {median(after) * 1e3:8.2f} ms   ratio {ratio:.2f}\n"
        )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with TemporaryDirectory() as work:
        ways: dict[str, tuple[Any, Any]] = {}
        for kind, picked in (("gathered", False), ("picked", True)):
            export(options.run, Path(work) / kind, picked=picked)
            ways |= {f"{kind} {role}": way for role, way in engines(Path(work) / kind).items()}
        for samples, length in BATCHES:
            measure(ways, samples, length, options.rounds)


if __name__ == "__main__":
    main()
