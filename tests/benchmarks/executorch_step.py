"""A training step of each ExecuTorch program against the step graph on ONNX Runtime, interleaved, one thread.

    python tests/benchmarks/executorch_step.py BUNDLE --samples 16 --length 32

`BUNDLE` was exported with ``--target step --target executorch``. Prints the median seconds of each, and
their ratio to the step graph.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from edge_tcur_runtime.engines import TrainingEngine, open_engine
from edge_tcur_runtime.engines.executorch import ExecutorchEngine
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import Bundle, open_bundle


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    steppers: dict[str, TrainingEngine] = {"ort-step": open_engine("ort-step", bundle, threads=1)}
    for name, program in bundle.manifest.programs.items():
        if name.startswith("train"):
            steppers[name] = ExecutorchEngine(bundle, threads=1, program=program)
    inputs, targets = _batch(bundle, options.samples, options.length)
    feeds = read_adapter(bundle.path(bundle.manifest.adapter or "")).feeds()
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for stepper in steppers.values():
        stepper.step(inputs, targets, feeds)
    for _ in range(options.rounds):
        for name, stepper in steppers.items():
            began = time.perf_counter()
            stepper.step(inputs, targets, feeds)
            seconds[name].append(time.perf_counter() - began)
    reference = statistics.median(seconds["ort-step"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:16s} {median:.3f} s   {median / reference:.2f} x the step graph")


def _batch(bundle: Bundle, samples: int, length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    sizes = {"batch": samples, "sequence": length}
    inputs = {
        name: np.ones([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
        for name, spec in bundle.manifest.inputs.items()
    }
    return inputs, np.arange(samples) % max(1, len(bundle.manifest.labels))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
