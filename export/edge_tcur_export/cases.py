"""What torch computes for fixed inputs: the cases that parity compares with, and the canary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from edge_tcur.errors import ExportError
from edge_tcur.models import Base
from edge_tcur.training.evaluate import apply_adapter
from edge_tcur.training.run import Run
from edge_tcur_export.parity import OPTIMIZER, STEPS, Case
from edge_tcur_export.trace import Example, FactorModel
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.preprocess import build_preprocessor, image_size

_CANARY_BYTES = 16 * 2**20  # of outputs over a vocabulary, which a device holds whole as it runs the canary
_CANARY_ENTRIES = 2**16  # of each sample's outputs, that are kept
_CANARY_TEXTS = ("The quick brown fox jumps over the lazy dog.", "What can you do for me today?")


def make_case(model: FactorModel, example: Example, *, partial: bool = False) -> Case:
    """What torch computes for one example: outputs, loss, the gradient of every core and extra, and the
    loss after some steps of the optimiser.

    Args:
        partial: some of them may be without a gradient; theirs is zero.
    """
    feeds = {name: value.detach().numpy().copy() for name, value in example.named().items()}
    trained = example.trained()
    loss, outputs, _ = model(*example.arguments())
    gradients = torch.autograd.grad(
        loss, list(trained.values()), allow_unused=True, materialize_grads=partial
    )
    idle = [name for name, value in zip(trained, gradients, strict=True) if value is None]
    if idle:
        raise ExportError(
            f"{', '.join(idle[:4])}: no gradient, because the loss does not depend on it",
            hint="leave its module out of --targets and --modules-to-save: it then stays frozen (a buffer)",
        )
    later = _later_loss(model, example)
    return Case(
        feeds=feeds,
        outputs=outputs.numpy(),
        loss=loss.item(),
        gradients={name: value.numpy() for name, value in zip(trained, gradients, strict=True)},
        later=later,
    )


def _later_loss(model: FactorModel, example: Example) -> float:
    """The loss after torch's own AdamW; the example's factors are as before afterwards."""
    trained = example.trained()
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(
        list(trained.values()),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(*example.arguments())[0].backward()
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        loss = model(*example.arguments())[0].item()
        for name, value in trained.items():
            value.copy_(before[name])
    return float(loss)


@contextmanager
def adapted(base: Base, run: Run, adapter: Adapter) -> Iterator[None]:
    """The base under an adapter; as it was before, head included, afterwards."""
    head = {name: value.detach().clone() for name, value in base.head_parameters().items()}
    injection = apply_adapter(base, run, adapter)
    try:
        yield
    finally:
        injection.remove()
        with torch.no_grad():
            for name, value in base.head_parameters().items():
                value.copy_(head[name])


def make_canary(base: Base, run: Run, adapter: Adapter, directory: Path) -> dict[str, np.ndarray]:
    """Fixed inputs (``input.*``) and torch's outputs of base and adapter on them (``output.*``).

    Of a language model with a large vocabulary, texts of as few tokens as give `_CANARY_BYTES` of outputs,
    and of these evenly spread places alone (``output.places``, ``output.sizes``: see `Canary`).

    Args:
        directory: holds the tokenizer.
    """
    inputs = build_preprocessor(base.preprocessing, directory)(_canary_samples(base))
    outputs = _answers(base, inputs)
    if outputs.nbytes > _CANARY_BYTES and outputs.ndim == 3:
        tokens = max(2, _CANARY_BYTES * outputs.shape[1] // outputs.nbytes)
        inputs = {name: value[:, :tokens].copy() for name, value in inputs.items()}
        outputs = _answers(base, inputs)
    with adapted(base, run, adapter):
        adapter_outputs = _answers(base, inputs)
    found, content = {"base": outputs, "adapter": adapter_outputs}, dict[str, np.ndarray]()
    whole = outputs[0].size
    if whole > _CANARY_ENTRIES:
        places = np.linspace(0, whole - 1, _CANARY_ENTRIES).astype(np.int64)
        # safetensors writes an array as it lies in memory, whatever its strides.
        found = {n: np.ascontiguousarray(v.reshape(len(v), -1)[:, places]) for n, v in found.items()}
        content = {"output.places": places, "output.sizes": np.array(outputs.shape, np.int64)}
    content |= {f"input.{name}": value for name, value in inputs.items()}
    return content | {f"output.{name}": value for name, value in found.items()}


def _answers(base: Base, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        answers: np.ndarray = base.model(
            **{n: torch.from_numpy(value) for n, value in inputs.items()}
        ).numpy()
    return answers


def _canary_samples(base: Base) -> list[str] | np.ndarray:
    spec = base.preprocessing
    if spec["kind"] == "text":
        return list(_CANARY_TEXTS)
    shape = (2, *image_size(spec), spec["channels"])
    generator = np.random.Generator(np.random.PCG64(0))
    scans = generator.random(shape) / max(float(spec["scale"]), 1e-6)
    return np.asarray(scans, dtype=np.float32)
