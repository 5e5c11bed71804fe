"""A case of parity on the run's own held-out samples, under the adapter that it trained.

The random cases have other factors and ranks, but their tokens are all one number, so that most of a word
table and of the positions is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edge_tcur.models import Base
from edge_tcur.tasks import Task, find_task
from edge_tcur.training.run import Run
from edge_tcur_export.parity import TOLERANCES
from edge_tcur_export.quantization import held_out_samples
from edge_tcur_export.trace import Example, FactorModel, GroupFactors
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import HELD_OUT, RANDOM

_SAMPLES = 3
_TOKENS = 32  # of a sample at most: every engine takes four steps on them
_NOISE = 1e-6  # of the largest output: what two right engines differ by
_OTHER_TARGETS = (
    "with random targets: with their own the loss is so small that rounding decides its gradients"
)


@dataclass(frozen=True)
class HeldOut:
    """What parity can say of held-out inputs.

    Attributes:
        example: arguments of the model: held-out samples, the adapter's factors; None where there are none.
        note: why there is none, or what else should be known.
    """

    example: Example | None = None
    note: str = ""

    @property
    def inputs(self) -> str:
        """For the manifest: what the outputs are compared on."""
        return RANDOM if self.example is None else HELD_OUT


def held_out_example(
    model: FactorModel, base: Base, run: Run, adapter: Adapter, like: Example, limits: Mapping[str, int]
) -> HeldOut:
    """Some of the samples that the run held out, spread over them, as arguments of `model`.

    Args:
        like: another example: names and order of factors and extras.
        limits: largest ``sequence`` that every target takes, where the base has one.
    """
    task = find_task(run.config.task)
    found, note = held_out_samples(base, run)
    if found is None:
        return HeldOut(None, note)
    places = np.linspace(0, len(found) - 1, min(len(found), _SAMPLES)).astype(np.int64)
    inputs, targets = found.take(places)
    longest = min(_TOKENS, limits.get("sequence", _TOKENS))
    axes = {name: spec.shape for name, spec in base.inputs.items()}
    inputs = {name: _cut(inputs[name], axes[name], longest) for name in axes}
    targets = _cut(targets, task.target_axes(base.inputs, run.labels), longest)
    example = _with_adapter(replace(like, inputs=inputs, targets=targets), adapter)
    with torch.no_grad():
        outputs = model.outputs(example.inputs, example.factors, example.extras)
    if task.weight(targets.numpy()) and _is_sound(task, outputs, targets):
        return HeldOut(example)
    random = task.example_targets(outputs, torch.Generator().manual_seed(0))
    return HeldOut(replace(example, targets=random), _OTHER_TARGETS)


def _cut(value: Tensor, axes: tuple[int | str, ...], longest: int) -> Tensor:
    """The first tokens of each sample."""
    place = axes.index("sequence") if "sequence" in axes else None
    if place is None:
        return value
    return value.narrow(place, 0, min(longest, value.shape[place])).contiguous()


def _with_adapter(example: Example, adapter: Adapter) -> Example:
    """The example with an adapter's factors and extras in the place of its own."""
    feeds = {name: torch.from_numpy(value.copy()) for name, value in adapter.feeds().items()}
    factors: dict[str, GroupFactors] = {}
    for group in example.factors:
        first, second, third = (feeds[f"{group}.{part}"] for part in example.parts)
        factors[group] = (first, second, third)
    extras = {name: feeds[name] for name in example.extras}
    found = replace(example, factors=factors, extras=extras)
    for value in found.trained().values():
        value.requires_grad_(True)
    return found


def _is_sound(task: Task, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the loss of these outputs is no matter of their last bits: an answer that is sure and right has
    a loss, and gradients, below what float32 can resolve."""
    scale = _NOISE * float(outputs.abs().max())
    noise = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    loss = float(task.loss(outputs, targets))
    shaken = float(task.loss(outputs.double() + 2 * scale * noise, targets))
    return abs(loss - shaken) <= TOLERANCES["loss"] / 4 * abs(loss)
