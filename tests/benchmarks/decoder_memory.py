"""Peak memory of training steps of a decoder with Qwen2.5-0.5B's shapes:
``python tests/benchmarks/decoder_memory.py [--layers 24]``.

24 layers, 896 features (4,864 inside), 14 heads of which 2 hold keys and values, 151,936 words, the head
tied to the table of words; random weights, every linear layer adapted with rank 8, int8 and int4 base,
samples of 256 tokens, one at a time. Each figure is VmHWM of a fresh process, whole: interpreter, libraries,
base and activations, after three steps of ``ort-step`` on one thread, the heap set as it is for a run with a
budget. The base is mapped: its pages count as far as they were read (``RssFile``, with the libraries' own).
Writes 6 GiB to the temporary folder and takes up to 10 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

STEPS, LENGTH, SAMPLES = 3, 256, 4
BOUNDS = {"int8": 900, "int4": 600}  # MiB
GRAPHS = ("step_recompute", "step")


def write_base(root: Path, layers: int) -> None:
    """The model with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(root)
    end = "<|endoftext|>"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), end]
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=end, pad_token=end).save_pretrained(root)


def make_run(root: Path, layers: int) -> Path:
    """A run over the model; what it learns does not matter here."""
    from edge_tcur.training import TrainConfig, train

    write_base(root / "base", layers)
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh", k=12)) for _ in range(SAMPLES)]
    (root / "data.csv").write_text("\n".join(["text", *texts]) + "\n")
    config = TrainConfig(
        str(root / "base"), str(root / "data.csv"), task="causal-lm", rank=8, epochs=1, batch_size=1,
        selection="norm", max_length=LENGTH, eval_fraction=0.25, threads=1,
    )  # fmt: skip
    return train(config, root / "run").run.root


def export(run_root: Path, out: Path, precision: str, verify: bool) -> None:
    """A bundle with both step graphs."""
    from edge_tcur.training import open_run
    from edge_tcur_export.bundle import export_run
    from edge_tcur_export.settings import ExportSettings

    settings = ExportSettings(("onnx", "step"), verify=verify, precision=precision, recompute=True)
    found = export_run(open_run(run_root), out, settings)
    sys.stdout.write(json.dumps({"parity": found.parity, "stages": found.stages}) + "\n")


def run_steps(root: Path, graph: str) -> dict[str, float]:
    """MiB after the imports, of the loaded session and at the peak, and seconds of a step."""
    import numpy as np

    from edge_tcur_runtime import heap
    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.engines.session import import_onnxruntime
    from edge_tcur_runtime.feeds import build_feeds
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import bundle_adapter

    import_onnxruntime()
    imported = read_memory().peak
    heap.give_back_at_once()
    bundle = open_bundle(root, verify=False)
    feeds = build_feeds(bundle.manifest, bundle_adapter(bundle))
    engine = open_engine("ort-step", bundle, threads=1, graph=graph)
    loaded = read_memory().peak
    tokens = np.random.default_rng(0).integers(0, 151_936, (1, LENGTH))
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        result = engine.step(inputs, tokens, feeds)
        seconds.append(time.process_time() - started)
    if not np.isfinite(result.loss) or not all(
        np.abs(value).max() > 0 for value in result.gradients.values()
    ):
        raise SystemExit("the step gave no gradient")
    memory, mib = read_memory(), 2**20
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "imported": imported / mib, "loaded": loaded / mib, "peak": memory.peak / mib,
        "file": int(lines["RssFile"].split()[0]) / 1024, "seconds": min(seconds), "loss": result.loss,
    }  # fmt: skip


def child(*arguments: str) -> str:
    """The last line of a fresh process."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--verify", action="store_true", help="compare the graphs with torch, too")
    parser.add_argument("--keep", type=Path, help="folder that keeps run and bundles")
    parser.add_argument("--precision", nargs="+", default=list(BOUNDS), choices=list(BOUNDS))
    for name in ("--make", "--export", "--steps"):
        parser.add_argument(name, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_run(Path(options.make[0]), options.layers)
    elif options.export:
        run_root, out, precision = options.export
        export(Path(run_root), Path(out), precision, options.verify)
    elif options.steps:
        sys.stdout.write(json.dumps(run_steps(Path(options.steps[0]), options.steps[1])) + "\n")
    elif options.keep:
        options.keep.mkdir(exist_ok=True)
        compare(options.keep, options)
    else:
        with TemporaryDirectory() as folder:
            compare(Path(folder), options)


def compare(root: Path, options: argparse.Namespace) -> None:
    """Each part in a process of its own, so that none holds the memory of another."""
    if not (root / "run").exists():
        subprocess.run(
            [sys.executable, __file__, "--make", str(root), "--layers", str(options.layers)], check=True
        )
    for precision in options.precision:
        out = root / precision
        if not out.exists():
            verify = ["--verify"] if options.verify else []
            sys.stdout.write(child("--export", str(root / "run"), str(out), precision, *verify) + "\n")
        base = (out / "base.bin").stat().st_size / 2**20
        for graph in GRAPHS:
            found = json.loads(child("--steps", str(out), graph))
            sys.stdout.write(
                f"{precision} {graph:15} peak {found['peak']:5.0f} MiB of {BOUNDS[precision]}"
                f" (imports {found['imported']:.0f}, session loaded {found['loaded']:.0f},"
                f" mapped files at the end {found['file']:.0f}, base.bin {base:.0f}),"
                f" loss {found['loss']:.4f}, {found['seconds']:.1f} s of one thread\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
