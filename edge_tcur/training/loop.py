"""The loop: batches in, parameters moved, loss and score out. It knows nothing of adapters or files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur.data import Samples, in_batches
from edge_tcur.tasks import Task
from edge_tcur_runtime.optimizer import schedule
from edge_tcur_runtime.tasks import mean_by_weight


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
    """What `fit` saw: per step the loss, per epoch the held-out score, seconds in all."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of one optimiser step."""
        return self.seconds / max(1, len(self.losses))


def optimize(
    parameters: list[tuple[list[nn.Parameter], float]],
    loss_of: Callable[[np.ndarray], Tensor],
    count: int,
    settings: LoopSettings,
    *,
    on_epoch: Callable[[int, list[float]], None] | None = None,
) -> list[float]:
    """Moves `parameters` with AdamW, linear warm-up and linear decay; returns the loss of every step.

    Args:
        parameters: groups of parameters with their peak learning rates.
        loss_of: mean loss of the samples at these indices.
        count: number of samples.
        on_epoch: called after each epoch with its number (from 1) and its losses.

    Raises:
        FloatingPointError: the loss or a gradient is not finite (the learning rate is too high).
    """
    groups = [{"params": values, "lr": rate, "peak": rate} for values, rate in parameters if values]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=settings.weight_decay)
    trained = [value for values, _ in parameters for value in values]
    total = settings.epochs * -(-count // settings.batch_size)
    generator = np.random.Generator(np.random.PCG64(settings.seed))
    losses: list[float] = []
    for epoch in range(1, settings.epochs + 1):
        first, order = len(losses), generator.permutation(count)
        for start in range(0, count, settings.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(len(losses), total)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(order[start : start + settings.batch_size])
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained, settings.max_gradient_norm or math.inf)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise FloatingPointError(
                    f"the loss is {loss.item()} and its gradient's norm {norm.item()} "
                    f"at step {len(losses) + 1}"
                )
            optimizer.step()
            losses.append(loss.item())
        if on_epoch is not None:
            on_epoch(epoch, losses[first:])
    return losses


def fit(
    model: nn.Module,
    parameters: list[tuple[list[nn.Parameter], float]],
    data: Samples,
    task: Task,
    settings: LoopSettings,
    *,
    held_out: Samples | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> History:
    """Trains `parameters` of `model` on `data`; see `optimize`.

    Args:
        model: any module with ``forward(**inputs) -> outputs``; dropout stays off, as on the device.
        parameters: groups of parameters with their peak learning rates.
        data: training data.
        held_out: scored after every epoch.
        on_epoch: called with the epoch (from 1) and its mean loss.

    Raises:
        FloatingPointError: the loss or a gradient is not finite (the learning rate is too high).
    """
    history = History()
    model.eval()
    since = time.perf_counter()

    def losses(indices: np.ndarray) -> Tensor:
        inputs, targets = data.take(indices)
        return task.loss(model(**inputs), targets)

    def after(epoch: int, found: list[float]) -> None:
        nonlocal since
        history.seconds += time.perf_counter() - since
        if held_out is not None:
            history.scores.append(score_model(model, held_out, task))
        if on_epoch is not None:
            on_epoch(epoch, float(np.mean(found)))
        since = time.perf_counter()

    history.losses = optimize(parameters, losses, len(data), settings, on_epoch=after)
    return history


def score_model(model: nn.Module, data: Samples, task: Task, *, batch_size: int = 64) -> float:
    """The task's metric of `model` over `data`, for example the part of it that is answered correctly."""
    model.eval()
    values, weights = [], []
    with torch.no_grad():
        for inputs, targets in in_batches(data, batch_size):
            values.append(task.measure(model(**inputs), targets).item())
            weights.append(task.weight(targets.cpu().numpy()))
    return mean_by_weight(values, weights)
