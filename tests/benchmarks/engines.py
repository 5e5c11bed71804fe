"""The three engines on one bundle: seconds of a step, interleaved; the loss curve; peak memory of each alone.

    python tests/benchmarks/engines.py BUNDLE --samples 16 --length 32

`BUNDLE` was exported with every target (``--target ort-training --target step --target executorch``). A step
is forward, backward and the runtime's AdamW on one random batch, one thread. The peak is that of a fresh
process (VmHWM) that makes five steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.engines import ENGINES, open_engine
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.bundle import Bundle, open_bundle
from edge_tcur_runtime.optimizer import AdamW
from edge_tcur_runtime.personalize import bundle_adapter
from edge_tcur_runtime.settings import AdamWSettings

_CURVE = 20  # updates whose losses are compared
_MIB = 2**20


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--alone", choices=list(ENGINES), help="Print the peak of this one alone, and end.")
    options = parser.parse_args()
    bundle, sizes = open_bundle(options.bundle, verify=False), (options.samples, options.length)
    if options.alone:
        update = make_update(options.alone, bundle, *sizes)
        for _ in range(5):
            update()
        print(json.dumps(read_memory().peak))
        return
    peaks = {name: alone(name, options.bundle, *sizes) for name in ENGINES}
    updates = {name: make_update(name, bundle, *sizes) for name in ENGINES}
    losses: dict[str, list[float]] = {name: [] for name in ENGINES}
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(_CURVE):
        for name, update in updates.items():
            began = time.perf_counter()
            losses[name].append(update())
            seconds[name].append(time.perf_counter() - began)
    expected = np.array(losses["ort-step"])
    print(f"losses {expected[0]:.4f} -> {expected[-1]:.4f} over {_CURVE} steps")
    for name in ENGINES:
        median = statistics.median(seconds[name][1:])
        apart = np.abs(np.array(losses[name]) / expected - 1).max()
        print(
            f"{name:13s} {median * 1000:7.1f} ms a step   {peaks[name] / _MIB:6.0f} MiB   "
            f"losses within {apart:.1e} of ort-step's"
        )


def alone(name: str, bundle: Path, samples: int, length: int) -> int:
    """Peak resident bytes of a fresh process."""
    command = [sys.executable, __file__, str(bundle), "--alone", name]
    command += ["--samples", str(samples), "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def make_update(name: str, bundle: Bundle, samples: int, length: int) -> Callable[[], float]:
    """One step of training from the bundle's own adapter; it returns the loss."""
    engine = open_engine(name, bundle, threads=1)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    optimizer, settings = AdamW(AdamWSettings()), AdamWSettings(learning_rate=0.001)
    generator, manifest = np.random.default_rng(0), bundle.manifest
    sizes = {"batch": samples, "sequence": length}
    inputs = {
        key: np.ones([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
        for key, spec in manifest.inputs.items()
    }
    inputs["input_ids"] = generator.integers(1000, 2000, (samples, length))
    targets = np.arange(samples) % max(1, len(manifest.labels))

    def update() -> float:
        result = engine.step(inputs, targets, feeds)
        values = {key: feeds[key].astype(np.float64) for key in result.gradients}
        gradients = {key: value.astype(np.float64) for key, value in result.gradients.items()}
        moved = optimizer.step(values, gradients, dict.fromkeys(values, settings.learning_rate))
        feeds.update({key: value.astype(np.float32) for key, value in moved.items()})
        return result.loss

    return update


if __name__ == "__main__":
    main()
