"""Predicted against measured peaks, and whether every accepted run keeps its budget:
``python tests/benchmarks/budget.py [--models bert vit conv minilm] [--precisions fp32 int8] [--keep DIR]``,
or over a bundle that is there: ``--bundle DIR --data FILE --runs executorch:auto``.

Each row is `edge_tcur_runtime.personalize` in a fresh process on one thread (``--threads 0``: on those that
the plan takes), two epochs, the base without torch. For each model, precision, engine and graph the first
budget is 1 MiB, which must be refused; then the smallest that the refusal names, 1.1, 1.3 and 1.8 of it.
Peaks are VmHWM. ``--heap`` leaves glibc's heap as it
is, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MIB = 2**20
SHARES = (1.0, 1.1, 1.3, 1.8)
RUNS = ["auto:auto", "ort-training:auto", "ort-step:off", "ort-step:on"]
BERTS = {  # blocks, width, heads, words, tokens of the longest text
    "bert": (4, 128, 4, 2000, 64),
    "bert-long": (2, 64, 2, 500, 256),
    "minilm": (6, 384, 12, 30522, 128),
}
NETS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.mix(torch.relu(self.conv(x)))

class Net(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 32, "width": 32, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.layers = nn.ModuleList(Block(32) for _ in range(4))
        self.out = nn.Linear(32, 3)

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        for block in self.layers:
            x = block(x)
        return self.out(x.mean(dim=(2, 3)))

def make():
    torch.manual_seed(0)
    return Net()
"""
CHILD = """
import json, sys, time
if sys.argv[4] != "executorch":
    sys.modules["torch"] = None
from pathlib import Path
from edge_tcur_runtime import fitting
from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.errors import BudgetError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import personalize
from edge_tcur_runtime.settings import PersonalizeSettings
root, data, budget, engine, recompute, epochs, heap, threads = sys.argv[1:9]
if heap == "heap":
    fitting.give_back_at_once = lambda: False
bundle = open_bundle(Path(root))
spec = bundle.manifest.preprocessing
size = {} if spec["kind"] == "text" else {"image_size": (spec["height"], spec["width"]), "channels": 1}
dataset = load_dataset(Path(data), spec["kind"], **size)
settings = PersonalizeSettings(
    epochs=int(epochs), threads=int(threads), budget=int(budget) or None, engine=engine, recompute=recompute
)
started = time.perf_counter()
try:
    result = personalize(bundle, dataset, settings)
except BudgetError as error:
    before = "cannot be met" in error.message
    print(json.dumps({"refused": error.message, "hint": error.hint, "before": before}))
else:
    print(json.dumps({
        "peak": read_memory().peak, "predicted": result.predicted_peak_bytes, "engine": result.engine,
        "graph": result.graph, "micro_batch": result.micro_batch, "step_seconds": result.step_seconds,
        "seconds": time.perf_counter() - started, "notes": result.notes, "threads": result.threads,
    }))
"""


def run_child(
    bundle: Path,
    data: Path,
    budget: int,
    engine: str,
    recompute: str,
    *,
    epochs: int = 2,
    heap: str = "",
    threads: int = 1,
    before: tuple[str, ...] = (),
) -> dict[str, object]:
    """What one personalisation says.

    Args:
        budget: bytes; 0 for none.
        before: a command that runs the command given to it.
    """
    command = [sys.executable, "-c", CHILD, str(bundle), str(data), str(budget), engine, recompute]
    command += [str(epochs), heap, str(threads)]
    done = subprocess.run([*before, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def named(found: dict[str, object]) -> int:
    """The budget in bytes that a refusal names."""
    match = re.search(r"--budget (\d+)MiB", str(found["hint"]))
    assert match is not None
    return int(match.group(1)) * MIB


def make_model(name: str, root: Path) -> tuple[str, Path, dict[str, Any]]:
    """A model with random weights and data for it: base, data and settings of a training run."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    if name in BERTS:
        return make_bert(name, root, generator)
    data = root / "data.npz"
    images = generator.integers(0, 256, (96, 32, 32)).astype(np.uint8)
    np.savez(data, images=images, labels=np.arange(96) % 3)
    options: dict[str, Any] = {"task": "image-classification"}
    if name == "conv":
        (root / "budget_net.py").write_text(NETS)
        sys.path.insert(0, str(root))
        return "budget_net:make", data, {**options, "targets": "*.layers.*"}
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=256, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(root / "model")
    processor = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5], "image_std": [0.25]}
    (root / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(root / "model"), data, options


def make_bert(name: str, root: Path, generator: np.random.Generator) -> tuple[str, Path, dict[str, Any]]:
    """A BERT and texts of all lengths; a quarter of them the longest."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    blocks, width, heads, count, longest = BERTS[name]
    config = BertConfig(
        vocab_size=count, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(count - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "model")
    rows = ["text,label"]
    for number in range(64):
        size = longest - 2 if number % 4 == 0 else int(generator.integers(2, longest - 2))
        text = " ".join(f"w{word}" for word in generator.integers(0, count - 4, size))
        rows.append(f"{text},{number % 3}")
    (root / "data.csv").write_text("\n".join(rows) + "\n")
    return str(root / "model"), root / "data.csv", {"max_length": longest}


def make_bundles(name: str, precisions: list[str], root: Path) -> tuple[Path, dict[str, Path]]:
    """Data and bundles of one model; what is there already is taken."""
    from edge_tcur.training import TrainConfig, open_run, train
    from edge_tcur_export.bundle import export_run
    from edge_tcur_export.settings import ExportSettings

    root.mkdir(exist_ok=True, parents=True)
    base, data, options = make_model(name, root)
    if not (root / "run").exists():
        config = TrainConfig(base, str(data), rank=8, epochs=1, selection="norm", threads=1, **options)
        train(config, root / "run")
    bundles = {precision: root / precision for precision in precisions}
    for precision, path in bundles.items():
        if not path.exists():
            settings = ExportSettings(
                ("onnx", "step", "ort-training"), verify=False, recompute=True, precision=precision
            )
            export_run(open_run(root / "run"), path, settings)
    return data, bundles


def rows_of(bundle: Path, data: Path, runs: list[str], **options: Any):  # type: ignore[no-untyped-def]
    """(engine, recompute, budget, what the run said) of all runs over one bundle."""
    for engine, recompute in (run.split(":") for run in runs):
        first = run_child(bundle, data, MIB, engine, recompute, **options)
        assert "refused" in first, first
        for share in SHARES:
            budget = int(named(first) * share)
            yield engine, recompute, budget, run_child(bundle, data, budget, engine, recompute, **options)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bert", "bert-long", "vit", "conv", "minilm"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--runs", nargs="+", default=RUNS, help="engine:recompute")
    parser.add_argument("--keep", type=Path, help="where models and bundles stay")
    parser.add_argument("--bundle", type=Path, help="measure this one")
    parser.add_argument("--data", type=Path, help="with --bundle")
    parser.add_argument("--threads", type=int, default=1, help="0: those that the plan takes")
    parser.add_argument("--epochs", type=int, default=2, help="many: threads are tried")
    parser.add_argument("--heap", action="store_const", const="heap", default="")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ratios, refused, crossed = [], 0, 0
    given = {"heap": options.heap, "threads": options.threads, "epochs": options.epochs}
    with TemporaryDirectory() as work:
        for name in [options.bundle.name] if options.bundle else options.models:
            if options.bundle:
                data, bundles = options.data, {"": options.bundle}
            else:
                precisions = ["fp32"] if name == "conv" else options.precisions  # linear layers are quantised
                data, bundles = make_bundles(name, precisions, (options.keep or Path(work)) / name)
            for precision, bundle in bundles.items():
                for engine, recompute, budget, found in rows_of(bundle, data, options.runs, **given):
                    head = f"{name:10}{precision:5} {engine:13}{recompute:5}{budget / MIB:7.0f}"
                    if "refused" in found:
                        refused, crossed = refused + bool(found["before"]), crossed + (not found["before"])
                        sys.stdout.write(f"{head}  {found['refused']}\n")
                    else:
                        ratios.append(found["predicted"] / found["peak"])
                        crossed += found["peak"] > budget
                        sys.stdout.write(
                            f"{head}  {found['engine']:13}{found['graph']:15}{found['micro_batch']:3}"
                            f"{found['predicted'] / MIB:8.1f}{found['peak'] / MIB:8.1f}{ratios[-1]:7.3f}"
                            f"{found['step_seconds']:8.3f} s  x{found['threads']}  {len(found['notes'])}\n"
                        )
                    sys.stdout.flush()
    sys.stdout.write(
        f"{len(ratios)} runs ended, {crossed} crossed their budget, {refused} were refused before training; "
        f"predicted / measured {min(ratios):.3f} to {max(ratios):.3f}, "
        f"{sum(0.95 <= ratio <= 1.1 for ratio in ratios)} within -5 and +10 %\n"
    )


if __name__ == "__main__":
    main()
