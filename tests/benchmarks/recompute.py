"""Peak memory and time of the three step graphs: ``python tests/benchmarks/recompute.py``.

A small BERT with random weights on large batches: what is kept for the backward pass dominates. Each row
is a fresh process on one thread: growth of VmHWM by one step over what was resident before it, and the least
processor time of three steps, both also as ratios to the plain step of the same depth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

WIDTH, HEADS = 64, 4
LAST = 2  # blocks that learn in the last row


def run_child(path: Path, batch: int, length: int) -> None:
    """Prints growth in bytes and seconds."""
    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines.session import open_session

    session = open_session(path, threads=1, in_order=True)
    feeds = dict(np.load(path.with_name("feeds.npz")))
    feeds |= {
        "input_ids": np.arange(batch * length).reshape(batch, length) % 90,
        "attention_mask": np.ones((batch, length), np.int64),
        "labels": np.arange(batch) % 3,
    }
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    before = read_memory().resident
    session.run(None, feeds)
    growth, seconds = read_memory().peak - before, []
    for _ in range(3):
        started = time.process_time()
        session.run(None, feeds)
        seconds.append(time.process_time() - started)
    sys.stdout.write(json.dumps([growth, min(seconds)]))


def write_graphs(blocks: int, root: Path) -> list[str]:
    """The step graphs of a BERT with that many blocks; their names."""
    import onnx_ir as ir
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from edge_tcur.method.config import TCurConfig
    from edge_tcur.method.targets import find_targets
    from edge_tcur.models import load_base
    from edge_tcur.tasks import find_task
    from edge_tcur_export.graph import to_graph
    from edge_tcur_export.last_blocks import adapted_blocks, detached, split_blocks
    from edge_tcur_export.recompute import recompute_blocks
    from edge_tcur_export.trace import FactorModel, make_example, trace_forward, trace_step

    config = BertConfig(
        vocab_size=100, hidden_size=WIDTH, num_hidden_layers=blocks, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(root / "model")
    task, method = find_task("text-classification"), TCurConfig(rank=8)
    base = load_base(str(root / "model"), task, ("a", "b", "c"), {})
    groups = find_targets(base.model, method, keep=base.head).groups
    example = make_example(base, groups, lambda _: 8, batch=3, seed=0, config=method, task=task)
    before, _ = split_blocks(adapted_blocks(base.model, groups, example.inputs), LAST)
    feeds: dict[str, Any] = {name: value.detach().numpy() for name, value in example.named().items()}
    np.savez(root / "feeds.npz", **feeds)
    model = FactorModel(base, groups, task, method)
    graph = to_graph(trace_step(trace_forward(model, base, groups, task, example), example))
    ir.save(graph, root / "step.onnx")
    recompute_blocks(graph, (*example.inputs, "labels"))
    ir.save(graph, root / "step-recompute.onnx")
    with detached(model.model, before):
        forward = trace_forward(model, base, groups, task, example)
    ir.save(to_graph(trace_step(forward, example)), root / "step-last.onnx")
    return ["step", "step-recompute", "step-last"]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, options.batch, options.length)
        return
    for blocks in options.blocks:
        with TemporaryDirectory() as work:
            root, plain = Path(work), None
            for name in write_graphs(blocks, root):
                size = ["--batch", str(options.batch), "--length", str(options.length)]
                command = [sys.executable, __file__, "--child", str(root / f"{name}.onnx"), *size]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                growth, seconds = json.loads(done.stdout.splitlines()[-1])
                plain = plain or (growth, seconds)
                sys.stdout.write(
                    f"{blocks:3} blocks  {name:15}{growth / 2**20:7.0f} MiB{growth / plain[0]:6.2f}"
                    f"{seconds:8.3f} s{seconds / plain[1]:6.2f}\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
