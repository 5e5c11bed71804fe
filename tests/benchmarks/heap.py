"""What glibc's heap costs and saves by the size from which blocks are mapped by themselves:
``python tests/benchmarks/heap.py BUNDLE [--engine ort-step] [--rounds 3]`` (a bundle that takes texts).

Each figure is of fresh processes on one thread, interleaved: the third least processor time of eight passes,
the least of the rounds, and VmHWM after passes of all shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

SHAPES = ((16, 32), (4, 128), (2, 32), (1, 16))  # samples, tokens
THRESHOLDS = {"glibc's own": 0, "128 KiB": 2**17, "1 MiB": 2**20, "4 MiB": 2**22}


def run_child(root: Path, engine: str, threshold: int) -> None:
    """Prints milliseconds of a pass of each shape, and MiB."""
    if threshold and not ctypes.CDLL(None).mallopt(-3, threshold):
        raise SystemExit("mallopt refused")
    import numpy as np

    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.feeds import build_feeds
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import bundle_adapter

    bundle = open_bundle(root, verify=False)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    opened, generator, found = open_engine(engine, bundle, threads=1), np.random.default_rng(0), []
    for samples, length in SHAPES:
        inputs = {name: np.ones((samples, length), np.int64) for name in bundle.manifest.inputs}
        inputs["input_ids"] = generator.integers(4, 1900, (samples, length))
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] *= 0
        seconds = []
        for _ in range(9):
            started = time.process_time()
            opened.step(inputs, np.zeros(samples, np.int64), feeds)
            seconds.append(time.process_time() - started)
        found.append(1000 * sorted(seconds[1:])[2])
    sys.stdout.write(json.dumps([found, read_memory().peak / 2**20]))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="ort-step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.bundle, options.engine, options.child)
        return
    best: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {name: [] for name in THRESHOLDS}
    for _ in range(options.rounds):
        for name, threshold in THRESHOLDS.items():
            command = [sys.executable, __file__, str(options.bundle), "--engine", options.engine]
            done = subprocess.run(
                [*command, "--child", str(threshold)], capture_output=True, text=True, check=True
            )
            times, peak = json.loads(done.stdout.splitlines()[-1])
            best[name] = [min(pair) for pair in zip(best.get(name, times), times, strict=True)]
            peaks[name].append(peak)
    own = best["glibc's own"]
    for name, times in best.items():
        shown = "  ".join(
            f"{samples} x {length}: {ms:.1f} ms ({ms / first:.2f})"
            for (samples, length), ms, first in zip(SHAPES, times, own, strict=True)
        )
        sys.stdout.write(f"{name:12} {shown}  peak {min(peaks[name]):.0f} to {max(peaks[name]):.0f} MiB\n")


if __name__ == "__main__":
    main()
