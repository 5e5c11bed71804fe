"""Predicted against measured peak memory: ``python tests/benchmarks/memory_model.py BUNDLE [BATCH...]``.

Each row is a fresh process that loads a graph of the bundle, or a program of ExecuTorch, through the
runtime's own engine and runs it once (a training program twice) at the batch, with ``--length`` tokens where
the base has any. Peaks are VmHWM. A program is run up to the largest batch that it reserves memory for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edge_tcur_export.memory_model import MemoryEstimate
    from edge_tcur_runtime.formats.bundle import Manifest

CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.engines.session import import_onnxruntime, open_session
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import bundle_adapter
root, role, batch, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sizes = {"batch": batch, "sequence": length}
bundle = open_bundle(root, verify=False)
feeds, inputs = bundle_adapter(bundle).feeds(), {}
for name, spec in bundle.manifest.inputs.items():
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    inputs[name] = np.ones(shape, spec.dtype)
program = bundle.manifest.programs.get(role)
if program is None:
    import_onnxruntime()
else:
    from edge_tcur_runtime.engines.executorch import ExecutorchEngine, import_training, load_program
    torch = import_training()[0]
imported = read_memory().peak
if program is not None and role.startswith("infer"):
    module = load_program(bundle, program)
    loaded = read_memory().peak
    fed = {**inputs, **feeds}
    module.run_method("forward", [torch.from_numpy(np.ascontiguousarray(fed[n])) for n in program.inputs])
elif program is not None:
    engine = ExecutorchEngine(bundle, threads=1, program=program)
    loaded = read_memory().peak
    for _ in range(2):
        engine.step(inputs, np.zeros(batch, np.int64), feeds)
elif role == "infer":
    session = open_session(bundle.graph("infer"), threads=1)
    loaded = read_memory().peak
    session.run(["logits"], {**inputs, **feeds})
else:
    engine = open_engine("ort-step" if role == "step" else "ort-training", bundle, threads=1)
    loaded = read_memory().peak
    engine.step(inputs, np.zeros(batch, np.int64), feeds)
print(json.dumps([imported, loaded, read_memory().peak]))
"""


def measure(root: Path, role: str, batch: int, length: int) -> list[int]:
    """VmHWM in bytes after the import of ONNX Runtime, after loading the graph, and after one run."""
    command = [sys.executable, "-c", CHILD, str(root), role, str(batch), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def predict(root: Path, role: str, batch: int, length: int) -> MemoryEstimate:
    """What `edge-tcur plan` says of a graph, or of a program at its limits."""
    from edge_tcur_export.memory_model import estimate_memory
    from edge_tcur_export.program_memory import written_program

    manifest, model, shapes = _graph_of(root, role, batch, length)
    if role in manifest.programs:
        return written_program(manifest, role, model, shapes)
    return estimate_memory(model, shapes, role=role)


def before_lowering(root: Path, name: str) -> MemoryEstimate:
    """What a plan says of a program before it is written."""
    from edge_tcur_export.program_memory import expected_program
    from edge_tcur_runtime.formats.bundle import BASE_PTD

    manifest, model, shapes = _graph_of(root, name, 0, 0)
    return expected_program(model, shapes, name, manifest.files[BASE_PTD].size)


def _graph_of(
    root: Path, role: str, batch: int, length: int
) -> tuple[Manifest, onnx.ModelProto, dict[str, list[int]]]:
    """Manifest, graph and shapes of its inputs; of a program at its limits."""
    import onnx

    from edge_tcur_export.memory_model import input_shapes
    from edge_tcur_export.program_memory import GRAPHS
    from edge_tcur_runtime.formats.bundle import open_bundle

    bundle = open_bundle(root, verify=False)
    manifest = bundle.manifest
    if role in manifest.programs:
        limits, role = manifest.programs[role].limits, GRAPHS[role.partition("-")[0]]
        batch, length = limits["batch"], limits.get("sequence", 0)
    model = onnx.load(str(bundle.graph(role) or bundle.graph("infer")), load_external_data=False)
    ranks = {name: group.rank for name, group in manifest.groups.items()}
    return manifest, model, input_shapes(model, manifest.inputs, batch, length, ranks)


def roles_of(root: Path) -> list[str]:
    """Graphs and programs of a bundle that can be run here."""
    from edge_tcur_runtime.formats.bundle import open_bundle

    programs = open_bundle(root, verify=False).manifest.programs
    graphs = [role for role in ("infer", "step", "train") if (root / f"{role}.onnx").is_file()]
    return [*graphs, *(name for name in programs if not name.endswith("-vulkan"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--role", action="append", help="a graph or program; say it once for each")
    options = parser.parse_args()
    mib = 2**20
    sys.stdout.write(
        "graph           batch  import  loaded  measured  predicted  ratio  (session, base, activations)\n"
    )
    for role in options.role or roles_of(options.bundle):
        for batch in options.batches:
            imported, loaded, peak = measure(options.bundle, role, batch, options.length)
            found = predict(options.bundle, role, batch, options.length)
            parts = ", ".join(f"{part / mib:.1f}" for part in (found.session, found.base, found.activations))
            sys.stdout.write(
                f"{role:<15}{batch:>6}{imported / mib:>8.1f}{loaded / mib:>8.1f}{peak / mib:>10.1f}"
                f"{found.total / mib:>11.1f}{found.total / peak:>7.2f}  ({parts})"
            )
            if "-" in role:
                planned = before_lowering(options.bundle, role)
                sys.stdout.write(f" before lowering {planned.total / mib:.1f} {planned.total / peak:.2f}")
            sys.stdout.write("\n")


if __name__ == "__main__":
    main()
