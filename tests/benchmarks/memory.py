"""Peak memory of training steps against ONNX Runtime Training's documented path, on the same model and batch:
``python tests/benchmarks/memory.py [--side 2048] [--layers 24]``, or ``--run RUN`` for a run of your own.

The documented path: the base in ``frozen_params`` of `generate_artifacts`, a checkpoint that holds it,
defaults everywhere, its own AdamW. Ours: a bundle (fp32 and int8) with either engine, the heap set as it is
for a run with a budget; with a run of your own also the step graph that recomputes. The model is a stack of
linear layers with random weights, rank 8, coupling none, or the base of a run. Each figure is VmHWM of a
fresh process on one thread after three steps, less what it was after the imports. Writes three bases to the
temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edge_tcur_runtime.formats.bundle import Manifest

STEPS, BATCH, CLASSES = 3, 16, 10
MODEL = """
import torch
from torch import nn

class Stack(nn.Module):
    preprocessing = {{
        "kind": "image", "input": "pixel_values", "height": {side} // 32, "width": 32, "channels": 1,
        "scale": 1.0, "mean": [0.0], "std": [1.0],
    }}

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear({side}, {side}, bias=False) for _ in range({layers}))
        self.last = nn.Linear({side}, {classes})

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)

def make():
    torch.manual_seed(0)
    return Stack()
"""


def make_run(root: Path, side: int, layers: int) -> Path:
    """A run over a stack of linear layers."""
    import numpy as np

    from edge_tcur.training import TrainConfig, train

    (root / "memory_stack.py").write_text(MODEL.format(side=side, layers=layers, classes=CLASSES))
    generator = np.random.default_rng(0)
    scans = generator.normal(size=(BATCH, side // 32, 32)).astype(np.float32)
    np.savez(root / "data.npz", images=scans, labels=np.arange(BATCH) % CLASSES)
    config = TrainConfig(
        "memory_stack:make", str(root / "data.npz"), task="image-classification", rank=8, epochs=1,
        selection="norm", targets="*.layers.*", eval_fraction=0.2, threads=1,
    )  # fmt: skip
    return train(config, root / "run").run.root


def write_documented(run_root: Path, out: Path) -> None:
    """The artifacts of ONNX Runtime's documentation: all weights of the base in ``frozen_params``."""
    import onnx
    from onnxruntime.training import artifacts

    from edge_tcur.training import open_run
    from edge_tcur.training.evaluate import load_run_base
    from edge_tcur_export import graph as graphs
    from edge_tcur_export.bundle import BundleWriter
    from edge_tcur_export.report import Stages
    from edge_tcur_export.settings import ExportSettings

    run = open_run(run_root)
    with TemporaryDirectory() as work:
        writer = BundleWriter(
            run, load_run_base(run), run.adapter(), Path(work), Stages(None), ExportSettings()
        )
        converted = writer.convert()[2]
        trained = list(writer.trained)
        graphs.inputs_to_initializers(converted, writer._trained_values())
        graphs.declare_layer_norm_outputs(converted)
        proto = graphs.to_proto(converted)
    floats = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    artifacts.generate_artifacts(
        proto,
        requires_grad=trained,
        frozen_params=[name for name in floats if name not in trained],
        loss=None,
        optimizer=artifacts.OptimType.AdamW,
        artifact_directory=str(out),
    )
    for path in out.glob("*.onnx"):
        model = onnx.load(str(path))
        model.ir_version = graphs.IR_VERSION
        onnx.save(model, str(path))


def batch_of(manifest: Manifest) -> tuple[dict[str, np.ndarray], np.ndarray]:
    import numpy as np

    sizes = {"batch": BATCH, "sequence": 32}
    inputs = {
        name: np.ones([sizes[a] if isinstance(a, str) else a for a in spec.shape], spec.dtype)
        for name, spec in manifest.inputs.items()
    }
    return inputs, np.zeros(BATCH, np.int64)


def run_ours(root: Path, engine: str, graph: str) -> tuple[int, int]:
    from edge_tcur_runtime import heap
    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.feeds import build_feeds
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import bundle_adapter

    bundle = open_bundle(root, verify=False)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    inputs, targets = batch_of(bundle.manifest)
    heap.give_back_at_once()
    imported = read_memory().peak
    opened = open_engine(engine, bundle, threads=1, graph=graph)
    for _ in range(STEPS):
        opened.step(inputs, targets, feeds)
    return imported, read_memory().peak


def run_documented(root: Path, folder: Path) -> tuple[int, int]:
    from onnxruntime import SessionOptions
    from onnxruntime.training import api

    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.feeds import build_feeds
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import bundle_adapter

    bundle = open_bundle(root, verify=False)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    inputs, targets = batch_of(bundle.manifest)
    imported, options = read_memory().peak, SessionOptions()
    options.intra_op_num_threads = 1
    state = api.CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    module = api.Module(
        str(folder / "training_model.onnx"), state, str(folder / "eval_model.onnx"), session_options=options
    )
    optimizer = api.Optimizer(str(folder / "optimizer_model.onnx"), module)
    fed = {**inputs, "labels": targets, **feeds}
    for _ in range(STEPS):
        module.train()
        module(*(fed[name] for name in module.input_names()))
        optimizer.step()
        module.lazy_reset_grad()
    return imported, read_memory().peak


def measure(*arguments: str) -> tuple[int, int]:
    """What a fresh process took: after its imports, and at its peak."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; "
    code += "from edge_tcur_runtime.engines.session import import_onnxruntime; import_onnxruntime(); "
    code += "from onnxruntime.training import api; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    imported, peak = json.loads(done.stdout.splitlines()[-1])
    return imported, peak


def compare(run_root: Path, work: Path, recompute: bool) -> None:
    from edge_tcur.training import open_run
    from edge_tcur_export.bundle import export_run
    from edge_tcur_export.settings import ExportSettings

    settings = ExportSettings(("onnx", "step", "ort-training"), verify=False, recompute=recompute)
    ways = [("ort-step", "step"), ("ort-training", "step")]
    ways += [("ort-step", "step_recompute")] if recompute else []
    for precision in ("fp32", "int8"):
        export_run(open_run(run_root), work / precision, replace(settings, precision=precision))
    (work / "documented").mkdir()
    subprocess.run([sys.executable, __file__, "--write", str(run_root), str(work / "documented")], check=True)
    rows = [("documented", measure("--documented", str(work / "fp32"), str(work / "documented")))]
    rows += [
        (f"{precision}, {engine}, {graph}", measure("--ours", str(work / precision), engine, graph))
        for precision in ("fp32", "int8")
        for engine, graph in ways
    ]
    reference = rows[0][1][1] - rows[0][1][0]
    for name, (imported, peak) in rows:
        sys.stdout.write(
            f"{name:<30} peak {peak / 2**20:6.0f} MiB, over the imports "
            f"{(peak - imported) / 2**20:6.0f} MiB, "
            f"{(peak - imported) / reference:.3f} of the documented path\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--run", type=Path, help="a run with one label a sample, in the place of the stack")
    for name in ("--ours", "--documented", "--write"):
        parser.add_argument(name, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_documented(Path(options.write[0]), Path(options.write[1]))
    elif options.ours:
        sys.stdout.write(json.dumps(run_ours(Path(options.ours[0]), *options.ours[1:])) + "\n")
    elif options.documented:
        sys.stdout.write(json.dumps(run_documented(*map(Path, options.documented))) + "\n")
    else:
        with TemporaryDirectory() as folder:
            os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
            sys.path.insert(0, folder)
            run_root = options.run or make_run(Path(folder), options.side, options.layers)
            compare(run_root, Path(folder), options.run is not None)


if __name__ == "__main__":
    main()
