"""Memory and time of the token cross-entropy by how it is written: ``python tests/benchmarks/token_loss.py``.

One linear layer from 16 features to a vocabulary of 50,257, 8 sequences of 64 tokens, one thread. Each
figure is measured in a fresh process: peak resident memory of one step over that of the loaded session, in
tensors of the outputs' size, and processor time of the step.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, WIDTH, BATCH, LENGTH = 50257, 16, 8, 64
VARIANTS = ("cross_entropy", "gather", "compare", "where")
IGNORED = -100


def loss_of(variant: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss [scalar] in one of the `VARIANTS`."""
    import torch
    from torch.nn import functional

    following = functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
    known = following != IGNORED
    count = known.float().sum().clamp(min=1.0)
    if variant == "cross_entropy":
        flat = outputs.flatten(0, 1), following.flatten()
        return functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / count
    log_probability, tokens = outputs.log_softmax(dim=-1), following * known
    if variant == "gather":
        chosen = log_probability.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    else:
        same = tokens.unsqueeze(-1) == torch.arange(outputs.shape[-1])
        product = log_probability * same if variant == "compare" else None
        where = torch.where(same, log_probability, torch.zeros(())) if product is None else product
        chosen = where.sum(dim=-1)
    return -(chosen * known).sum() / count


def export(variant: str, folder: Path) -> None:
    """Writes the step graph and ONNX Runtime Training's graphs."""
    import onnx_ir as ir
    import torch
    from torch.export import Dim
    from torch.export.graph_signature import OutputKind
    from torch.utils import _pytree

    from edge_tcur_export import graph as graphs
    from edge_tcur_export.ort_training import _generate
    from edge_tcur_export.trace import Signature, Traced, trace_backward, trace_program

    class Model(torch.nn.Module):
        weight: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(WIDTH, VOCABULARY))

        def forward(self, x: Tensor, labels: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
            outputs = (x @ core) @ self.weight
            return loss_of(variant, outputs, labels), outputs.detach()

    axes = {0: Dim("batch", min=1, max=4096), 1: Dim("sequence", min=2, max=1024)}
    core = torch.eye(WIDTH).requires_grad_(True)
    example = (torch.randn(3, 16, WIDTH), torch.randint(100, (3, 16)), core)
    program = trace_program(Model(), example, (axes, axes, {}))
    names = ("x", "labels", "core")
    forward = graphs.to_graph(Traced(program, Signature(names, ("loss", "logits"))))
    joint = trace_backward(program)
    for spec in joint.graph_signature.output_specs:
        spec.kind, spec.target = OutputKind.USER_OUTPUT, None
    joint.module_call_graph[0].signature.out_spec = _pytree.tree_structure((0, 1, 2))
    step = graphs.to_graph(Traced(joint, Signature(names, ("loss", "logits", "core.grad"))))
    ir.save(step, folder / "step.onnx")
    graphs.inputs_to_initializers(forward, {"core": np.eye(WIDTH, dtype=np.float32)})
    _generate(graphs.to_proto(forward), ["core"], folder, "adamw")


def measure(engine: str, folder: Path) -> None:
    """Prints the peak over the loaded session in tensors, and seconds of processor time."""
    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines.ort_training import import_training_api
    from edge_tcur_runtime.engines.session import open_session, session_options

    generator = np.random.default_rng(0)
    labels = generator.integers(0, VOCABULARY, (BATCH, LENGTH))
    labels[:, 50:] = IGNORED
    x = generator.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    fed = {"x": x, "labels": labels, "core": np.eye(WIDTH, dtype=np.float32)}
    if engine == "step":
        session = open_session(folder / "step.onnx", threads=1)

        def step() -> None:
            session.run(None, fed)
    else:
        api = import_training_api()
        state = api.CheckpointState.load_checkpoint(str(folder / "checkpoint"))
        graph = str(folder / "training_model.onnx")
        module = api.Module(graph, state, session_options=session_options(1))

        def step() -> None:
            module(*(fed[name] for name in module.input_names()))

    before, since = read_memory().peak, time.process_time()
    step()
    seconds = time.process_time() - since
    tensor = 4 * BATCH * LENGTH * VOCABULARY
    sys.stdout.write(f"{(read_memory().peak - before) / tensor:.1f} tensors, {seconds:.2f} s\n")


def main() -> None:
    """Measures every variant on both engines."""
    for variant in VARIANTS:
        with TemporaryDirectory() as work:
            for arguments in (("export", variant), ("step", ""), ("train", "")):
                command = [sys.executable, __file__, *arguments, work]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                if arguments[0] != "export":
                    sys.stdout.write(f"{variant:14} {arguments[0]:6} {done.stdout.splitlines()[-1]}\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "export":
        export(sys.argv[2], Path(sys.argv[3]))
    else:
        measure(sys.argv[1], Path(sys.argv[3]))
