"""The loop: batches in, parameters moved, loss and accuracy out. It knows nothing of adapters or files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from edge_tcur.data import PreparedData
from edge_tcur.tasks import Task
from edge_tcur_runtime.optimizer import schedule


@dataclass(frozen=True)
class LoopSettings:
    """Settings of `fit`.

    Attributes:
        epochs, batch_size: passes over the data, samples a step.
        weight_decay: decoupled weight decay.
        max_gradient_norm: global norm to which gradients are clipped; 0 for no clipping.
        seed: of the order of the data.
    """

    epochs: int
    batch_size: int
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0


@dataclass
class History:
    """What `fit` saw: per step the loss, per epoch the held-out accuracy, seconds in all."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of one optimiser step."""
        return self.seconds / max(1, len(self.losses))


def fit(
    model: nn.Module,
    parameters: list[tuple[list[nn.Parameter], float]],
    data: PreparedData,
    task: Task,
    settings: LoopSettings,
    *,
    held_out: PreparedData | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> History:
    """Trains `parameters` of `model` with AdamW, linear warm-up and linear decay.

    Args:
        model: any module with ``forward(**inputs) -> outputs``; dropout stays off, as on the device.
        parameters: groups of parameters with their peak learning rates.
        data: training data.
        held_out: scored after every epoch.
        on_epoch: called with the epoch (from 1) and its mean loss.

    Raises:
        FloatingPointError: the loss or a gradient is not finite (the learning rate is too high).
    """
    groups = [{"params": values, "lr": rate, "peak": rate} for values, rate in parameters if values]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=settings.weight_decay)
    trained = [value for values, _ in parameters for value in values]
    total = settings.epochs * -(-len(data) // settings.batch_size)
    generator = np.random.Generator(np.random.PCG64(settings.seed))
    history = History()
    model.eval()
    for epoch in range(1, settings.epochs + 1):
        started, first = time.perf_counter(), len(history.losses)
        for inputs, targets in data.batches(settings.batch_size, order=generator.permutation(len(data))):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(len(history.losses), total)
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss(model(**inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained, settings.max_gradient_norm or math.inf)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise FloatingPointError(
                    f"the loss is {loss.item()} and its gradient's norm {norm.item()} "
                    f"at step {len(history.losses) + 1}"
                )
            optimizer.step()
            history.losses.append(loss.item())
        history.seconds += time.perf_counter() - started
        if held_out is not None:
            history.accuracies.append(accuracy(model, held_out, task))
        if on_epoch is not None:
            on_epoch(epoch, float(np.mean(history.losses[first:])))
    return history


def accuracy(model: nn.Module, data: PreparedData, task: Task, *, batch_size: int = 64) -> float:
    """Part of `data` that `model` answers correctly, 0 to 1."""
    model.eval()
    correct = 0
    with torch.no_grad():
        for inputs, targets in data.batches(batch_size):
            correct += int(task.correct(model(**inputs), targets))
    return correct / max(1, len(data))
