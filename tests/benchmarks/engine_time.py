"""Seconds of a training step of both engines against torch: ``python tests/benchmarks/engine_time.py RUN``.

`RUN` is a text run of rank 8; its bundle and the graphs of the frozen base are written to ``--work`` (and
used again where they are there). Every way is a process that lives through the whole measurement; the
parent asks one after another for one step, so that all see the same machine, and a ratio is the median of
those of steps next to each other. Medians and ratios are of the clock. Ways:

- torch, LoRA r8: peft on the same weights, eager: forward, backward and AdamW; the head is trained too
- torch, products alone: the matrix products of the adapted layers and of their backward pass, one after
  another, and nothing else: what any step takes at least at torch's speed
- ort-step, ort-training: the engine's step at default settings, then what a personalisation does with it:
  gradients pulled back into the frame, AdamW, the new cores in raw coordinates
- frozen base in the same engine: the base without adapters, its head fixed, forward and backward down to the
  input of the first block. The one gradient that comes out is that of the bias of the layer norm in front of
  the first block: the gradient of that input, summed over samples and tokens. So it is the whole backward
  pass through every block, one sum, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load, save

LORA = "torch, LoRA r8"
ENGINES = ("ort-step", "ort-training")
FROZEN = "frozen base, "
PRODUCTS = "torch, products alone"
WAYS = (LORA, PRODUCTS, *(way for engine in ENGINES for way in (engine, FROZEN + engine)))
ENTRY = "embeddings.LayerNorm"  # of BERT: what stands in front of the first block
Step = Callable[[], object]


def batch(samples: int, length: int, labels: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Token ids and a full mask, int64 [samples, length]; labels int64 [samples]."""
    ids = np.random.default_rng(0).integers(1000, 20000, (samples, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, np.arange(samples) % labels


# --- graphs of the frozen base ---------------------------------------------------------------------------


def write_frozen(run_path: Path, work: Path) -> None:
    """A bundle without adapters whose graphs give the gradient of `ENTRY`'s bias alone."""
    import onnx_ir as ir

    from edge_tcur.tasks import find_task
    from edge_tcur.training.evaluate import load_run_base
    from edge_tcur.training.run import open_run
    from edge_tcur_export import graph as graphs
    from edge_tcur_export.base_file import BaseFile
    from edge_tcur_export.log_softmax import write_log_softmax
    from edge_tcur_export.ort_training import write_artifacts
    from edge_tcur_export.trace import FactorModel, make_example, trace_forward, trace_step

    run = open_run(run_path)
    base, task = load_run_base(run), find_task(run.config.task)
    config = replace(run.config.method(), modules_to_save=(f"*{ENTRY}",))
    example = make_example(base, (), lambda _: 1, batch=3, seed=0, config=config, task=task)
    trained = next(name for name in example.extras if name.endswith(f"{ENTRY}.bias"))
    values = {name: value.detach().numpy().copy() for name, value in example.extras.items()}
    for name, value in example.extras.items():
        value.requires_grad_(name == trained)
    work.mkdir()
    model = FactorModel(base, (), task, config)
    forward = trace_forward(model, base, (), task, example)
    fixed = {name: value for name, value in values.items() if name != trained}
    step = graphs.inputs_to_initializers(graphs.to_graph(trace_step(forward, example)), fixed)
    write_log_softmax(step)
    base_file = BaseFile(work)
    base_file.externalize(step)
    ir.save(step, work / "step.onnx")
    training = graphs.inputs_to_initializers(graphs.to_graph(forward), values)
    write_artifacts(training, (trained,), base_file, work, "adamw")
    (work / "trained.safetensors").write_bytes(save({trained: values[trained]}))


# --- one way, in a process of its own --------------------------------------------------------------------


def torch_step(run_path: Path, samples: int, length: int, threads: int) -> Step:
    """A step of LoRA r8 by peft."""
    import peft
    import torch

    from edge_tcur.method.targets import find_targets
    from edge_tcur.tasks import find_task
    from edge_tcur.training.evaluate import load_run_base
    from edge_tcur.training.run import open_run

    torch.set_num_threads(threads)
    run = open_run(run_path)
    base, task = load_run_base(run), find_task(run.config.task)
    groups = find_targets(base.model, run.config.method(), keep=base.head).groups
    names = [module for group in groups for module in group.modules]
    model = base.model.train(mode=False).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=names), model)
    for parameter in base.head_parameters().values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    arrays, labels = batch(samples, length, len(run.labels))
    inputs, targets = {k: torch.from_numpy(v) for k, v in arrays.items()}, torch.from_numpy(labels)

    def step() -> float:
        loss = task.loss(model(**inputs), targets)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def products_step(run_path: Path, samples: int, length: int, threads: int) -> Step:
    """The products of the frozen layers: outputs, and gradients of inputs."""
    import torch

    from edge_tcur.method.targets import find_targets
    from edge_tcur.training.evaluate import load_run_base
    from edge_tcur.training.run import open_run

    torch.set_num_threads(threads)
    run = open_run(run_path)
    base = load_run_base(run)
    groups = find_targets(base.model, run.config.method(), keep=base.head).groups
    names = [module for group in groups for module in group.modules]
    weights = [base.model.get_parameter(f"{name}.weight").detach() for name in names]
    tokens = samples * length
    pairs = [(torch.randn(tokens, w.shape[1]), w, torch.randn(tokens, w.shape[0])) for w in weights]

    def step() -> None:
        for x, weight, _ in pairs:
            torch.mm(x, weight.T)
        for _, weight, gradient in pairs:
            torch.mm(gradient, weight)

    return step


def engine_step(engine_name: str, root: Path, samples: int, length: int, threads: int) -> Step:
    """A step of an engine and of the runtime's optimiser."""
    from edge_tcur_runtime.coordinates import read_coordinates
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.feeds import build_feeds
    from edge_tcur_runtime.formats.adapter import read_adapter
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.optimizer import AdamW
    from edge_tcur_runtime.settings import AdamWSettings

    bundle = open_bundle(root)
    adapter = read_adapter(bundle.path(bundle.manifest.adapter or ""))
    engine = open_engine(engine_name, bundle, threads=threads)
    coordinates, optimizer = read_coordinates(bundle, adapter), AdamW(AdamWSettings())
    values, feeds = coordinates.initial(), build_feeds(bundle.manifest, adapter)
    inputs, targets = batch(samples, length, len(bundle.manifest.labels))
    rates = dict.fromkeys(values, 1e-3)

    def step() -> float:
        nonlocal values
        found = engine.step(inputs, targets, feeds)
        values = optimizer.step(values, coordinates.pull_back(found.gradients), rates)
        feeds.update(coordinates.raw(values))
        return found.loss

    return step


def frozen_step(engine_name: str, root: Path, work: Path, samples: int, length: int, threads: int) -> Step:
    """Forward and backward of the frozen base in an engine, whose settings are the same."""
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.formats.bundle import Bundle, open_bundle

    manifest = open_bundle(root, verify=False).manifest
    feeds = load((work / "trained.safetensors").read_bytes())
    roles = {"step": "step.onnx", "train": "train.onnx", "eval": "eval.onnx", "checkpoint": "checkpoint"}
    extras = {name: value.shape for name, value in feeds.items()}
    bundle = Bundle(work, replace(manifest, groups={}, extras=extras, graphs=roles))
    engine = open_engine(engine_name, bundle, threads=threads)
    inputs, targets = batch(samples, length, len(manifest.labels))
    return lambda: engine.step(inputs, targets, feeds)


def run_child(options: argparse.Namespace) -> None:
    """Runs one step for each line on standard input, and answers with its seconds."""
    root, frozen = options.work / "bundle", options.work / "frozen"
    sizes = (options.samples, options.length, options.threads)
    if options.child == LORA:
        step = torch_step(options.run, *sizes)
    elif options.child == PRODUCTS:
        step = products_step(options.run, *sizes)
    elif options.child.startswith(FROZEN):
        step = frozen_step(options.child.removeprefix(FROZEN), root, frozen, *sizes)
    else:
        step = engine_step(options.child, root, *sizes)
    step()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        sys.stdout.write(f"{time.perf_counter() - began}\n")
        sys.stdout.flush()


# --- the measurement -------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, threads: int) -> dict[str, list[float]]:
    """Way -> seconds of each round; two rounds are not counted."""
    children = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    sizes = [f"--samples={options.samples}", f"--length={options.length}", f"--threads={threads}"]
    for way in WAYS:
        command = [
            sys.executable,
            __file__,
            str(options.run),
            f"--work={options.work}",
            *sizes,
            "--child",
            way,
        ]
        children[way] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        for child in children.values():
            ask(child, None)
        for count in range(options.rounds + 2):
            for way, child in children.items():
                found = ask(child, "step")
                if count >= 2:
                    seconds[way].append(float(found))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return seconds


def ask(child: subprocess.Popen[str], word: str | None) -> str:
    """Writes a line to a child where there is one, and reads one."""
    assert child.stdin is not None
    assert child.stdout is not None
    if word is not None:
        child.stdin.write(f"{word}\n")
        child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise SystemExit("a way has ended")
    return answer


def report(options: argparse.Namespace, threads: int, seconds: dict[str, list[float]]) -> None:
    """Prints medians, and medians of the ratios within a round."""

    def ratio(first: str, second: str) -> float:
        return median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))

    sys.stdout.write(
        f"{options.samples} x {options.length} tokens, {threads} thread(s), {options.rounds} rounds\n"
    )
    for way, values in seconds.items():
        line = f"  {way:26}{median(values) * 1e3:8.1f} ms   LoRA takes {ratio(LORA, way):5.2f} x as long"
        if way in ENGINES:
            line += f"   {ratio(way, FROZEN + way):5.2f} x the frozen base"
        sys.stdout.write(line + "\n")
    sys.stdout.flush()


def prepare(options: argparse.Namespace) -> None:
    """Writes the bundle and the frozen graphs where they are missing."""
    if not (options.work / "bundle").is_dir():
        command = [sys.executable, "-m", "edge_tcur", "export", str(options.run), "--quiet"]
        targets = ["--target", "onnx", "--target", "step", "--target", "ort-training"]
        subprocess.run([*command, *targets, "--out", str(options.work / "bundle")], check=True)
    if not (options.work / "frozen").is_dir():
        write_frozen(options.run, options.work / "frozen")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, help="where bundle and graphs are kept")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prepare", action="store_true", help="write what is needed and end")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.threads = options.threads[0]
        run_child(options)
        return
    with TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        options.work.mkdir(exist_ok=True)
        prepare(options)
        for threads in () if options.prepare else options.threads:
            report(options, threads, measure(options, threads))


if __name__ == "__main__":
    main()
