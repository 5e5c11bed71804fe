"""What the factors cost at inference: ``python tests/benchmarks/infer_cost.py``.

Three ways run in turn, in one process, on one thread: the base exported alone by torch.onnx, the bundle's
``infer.onnx`` with nothing fed, and the same with an adapter of rank 8 at the default settings. Printed are
medians of processor time (the machine may be shared) and of the ratios within a round. Weights are
random: MiniLM's shape and ViT-S/16's. The session options are the runtime's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.targets import find_targets
from edge_tcur.models import Base, load_base
from edge_tcur.models.base import example_inputs
from edge_tcur.tasks import find_task
from edge_tcur_export import graph as graphs
from edge_tcur_export.infer_graph import multiply_cores_first, split_stacks
from edge_tcur_export.picks import pick_by_index
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import FactorModel, free_axes, make_example, trace_forward

LABELS = ("a", "b", "c")
MODELS = {  # name -> task and sizes of the batches
    "MiniLM": ("text-classification", ({"batch": 16, "sequence": 32}, {"batch": 1, "sequence": 32})),
    "ViT-S/16": ("image-classification", ({"batch": 1},)),
}


class Alone(nn.Module):
    """The base as anybody would export it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Outputs of the base."""
        outputs: Tensor = self.model(**inputs)
        return outputs


def write_model(name: str, root: Path) -> None:
    """A Hugging Face directory with random weights."""
    from tokenizers import Tokenizer, models
    from transformers import (
        BertConfig,
        BertModel,
        PreTrainedTokenizerFast,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    if name == "MiniLM":
        config = BertConfig(
            vocab_size=4000,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        BertModel(config).save_pretrained(root)
        words = models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), unk_token="[UNK]", pad_token="[PAD]"
        ).save_pretrained(root)
        return
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        num_labels=len(LABELS),
    )
    ViTForImageClassification(config).save_pretrained(root)
    processor = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (root / "preprocessor_config.json").write_text(json.dumps(processor))


def export_alone(base: Base, path: Path) -> None:
    """torch.onnx's own export of the base, its optimiser included."""
    inputs = example_inputs(base.inputs, {"batch": 3, "sequence": 16})
    axes = free_axes(base, {"batch": 2**16})
    shapes = ({name: axes(spec.shape) for name, spec in base.inputs.items()},)
    with quiet_torch():
        program = torch.export.export(
            Alone(base.model).eval(),
            (inputs,),
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        converted = torch.onnx.export(program, dynamo=True, opset_version=graphs.OPSET, verbose=False)
    assert converted is not None
    converted.model.ir_version = graphs.IR_VERSION
    for value, name in zip(converted.model.graph.inputs, base.inputs, strict=True):
        value.name = name
    converted.model.graph.outputs[0].name = "logits"
    ir.save(converted.model, path, external_data=f"{path.stem}.bin")


def export_infer(base: Base, task_name: str, path: Path) -> dict[str, np.ndarray]:
    """`infer.onnx` as a bundle has it; the factors of an adapter of rank 8."""
    config, task = TCurConfig(rank=8), find_task(task_name)
    groups = find_targets(base.model, config, keep=base.head).groups
    example = make_example(base, groups, lambda _: config.rank, batch=3, seed=0, config=config, task=task)
    forward = trace_forward(FactorModel(base, groups, task, config), base, groups, task, example)
    model = graphs.keep_outputs(graphs.to_graph(forward), ("logits",))
    pick_by_index(model)
    multiply_cores_first(model)
    split_stacks(model)
    fed = {name: value.detach().numpy() for name, value in example.named().items()}
    fed = {name: value for name, value in fed.items() if name not in base.inputs and name != "labels"}
    defaults = {name: np.zeros(value.shape, np.float32) for name, value in example.extras.items()}
    for group in groups:
        defaults[f"{group.name}.core"] = np.zeros((len(group.modules), 1, 1), np.float32)
        defaults |= {
            f"{group.name}.{part}": np.zeros((group.blocks, 1), np.int32) for part in ("rows", "cols")
        }
    ir.save(graphs.add_defaults(model, defaults), path, external_data=f"{path.stem}.bin")
    return fed


def measure(name: str, rounds: int) -> None:
    """Prints the ratios of one model."""
    from edge_tcur_runtime.engines.session import open_session

    task, batches = MODELS[name]
    with TemporaryDirectory() as work:
        root = Path(work)
        write_model(name, root / "model")
        export_alone(load_base(str(root / "model"), find_task(task), LABELS, {}), root / "alone.onnx")
        base = load_base(str(root / "model"), find_task(task), LABELS, {})
        specs = dict(base.inputs)
        fed = export_infer(base, task, root / "infer.onnx")
        alone, infer = (open_session(root / f"{part}.onnx", threads=1) for part in ("alone", "infer"))
        for sizes in batches:
            inputs = {k: v.numpy() for k, v in example_inputs(specs, sizes).items()}
            ways = {
                "base exported alone": (alone, inputs),
                "infer.onnx, nothing fed": (infer, inputs),
                "infer.onnx, r8": (infer, {**inputs, **fed}),
            }
            report(f"{name}, {' x '.join(f'{n} {axis}' for axis, n in sizes.items())}", run(ways, rounds))


def run(ways: dict[str, tuple[Any, dict[str, np.ndarray]]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each way, the ways in turn; two rounds are not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for count in range(rounds + 2):
        for way, (session, feeds) in ways.items():
            started = time.process_time()
            session.run(["logits"], feeds)
            if count >= 2:
                seconds[way].append(time.process_time() - started)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Prints medians, and the median of the ratios to the first way in the same round."""
    first = next(iter(seconds.values()))
    sys.stdout.write(f"{title}\n")
    for way, values in seconds.items():
        ratio = median(mine / other for mine, other in zip(values, first, strict=True))
        sys.stdout.write(f"  {way:26}{median(values) * 1e3:9.2f} ms{ratio:8.3f}\n")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from edge_tcur_runtime.installed import find_onnxruntime

    installed = find_onnxruntime()
    assert installed is not None
    sys.stdout.write(f"{installed.distribution} {installed.version}, one thread, processor time\n")
    for name in MODELS:
        measure(name, options.rounds)


if __name__ == "__main__":
    main()
