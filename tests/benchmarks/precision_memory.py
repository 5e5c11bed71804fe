"""Peak memory and seconds of a step over a float32, int8 and int4 base:
``python tests/benchmarks/precision_memory.py FP32 INT8 INT4``, bundles that were exported from one run.

Each figure comes from a fresh process that loads an engine and runs steps with the bundle's adapter. The peak
(VmHWM) is that of one step of a few short samples, where the base dominates, and of the batch of the other
benchmarks; what importing ONNX Runtime takes is given apart. Seconds are processor time of one thread, the
fastest step of each process, interleaved over the bundles, medians of the rounds. Ratios are to the first
bundle.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

_BATCHES = {"4 x 16 tokens": (4, 16), "16 x 32 tokens": (16, 32)}
_ENGINES = {"ort-step": "step.onnx", "ort-training": "train.onnx"}
_STEPS = 4


def run_child(root: Path, engine: str, batch: int, length: int) -> None:
    import numpy as np

    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.engines.session import import_onnxruntime
    from edge_tcur_runtime.feeds import build_feeds
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import bundle_adapter

    import_onnxruntime()
    bundle = open_bundle(root)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    imported = read_memory().peak
    opened = open_engine(engine, bundle, threads=1)
    sizes = {"batch": batch, "sequence": length}
    inputs = {
        name: np.ones([sizes[a] if isinstance(a, str) else a for a in spec.shape], spec.dtype)
        for name, spec in bundle.manifest.inputs.items()
    }
    targets = np.zeros(batch, np.int64)
    opened.step(inputs, targets, feeds)
    peak, seconds = read_memory().peak, []
    for _ in range(_STEPS):
        started = time.process_time()
        opened.step(inputs, targets, feeds)
        seconds.append(time.process_time() - started)
    result = {"imported": imported, "peak": peak, "seconds": min(seconds)}
    sys.stdout.write(json.dumps(result) + "\n")


def measure(bundles: list[Path], engine: str, sizes: tuple[int, int], rounds: int) -> list[dict[str, float]]:
    """Bundle by bundle: the largest peak over the rounds, and the median seconds."""
    found: list[list[dict[str, float]]] = [[] for _ in bundles]
    for _ in range(rounds):
        for bundle, results in zip(bundles, found, strict=True):
            command = [sys.executable, __file__, str(bundle), "--child", engine, *map(str, sizes)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
    return [
        {
            "peak": max(result["peak"] for result in results),
            "added": max(result["peak"] - result["imported"] for result in results),
            "seconds": median(result["seconds"] for result in results),
        }
        for results in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        engine, batch, length = options.child
        run_child(options.bundles[0], engine, int(batch), int(length))
        return
    for engine, graph in _ENGINES.items():
        if not all((bundle / graph).is_file() for bundle in options.bundles):
            sys.stdout.write(f"{engine}: not every bundle has {graph}\n")
            continue
        for name, sizes in _BATCHES.items():
            sys.stdout.write(f"{engine}, {name}\n")
            rows = measure(options.bundles, engine, sizes, options.rounds)
            for bundle, row in zip(options.bundles, rows, strict=True):
                manifest = json.loads((bundle / "manifest.json").read_text())
                size = manifest["files"]["base.bin"]["size"]
                sys.stdout.write(
                    f"  {manifest.get('precision', 'fp32'):<5} base {size / 2**20:6.1f} MiB"
                    f"  peak {row['peak'] / 2**20:4.0f} MiB"
                    f"  beyond the import {row['added'] / 2**20:4.0f} MiB"
                    f" ({row['added'] / rows[0]['added']:.2f} x)"
                    f"  {row['seconds']:.3f} s ({row['seconds'] / rows[0]['seconds']:.2f} x)\n"
                )


if __name__ == "__main__":
    main()
