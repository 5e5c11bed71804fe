"""Warming up a new head: trained alone on the frozen base's features, before rows and columns are chosen.

A new head is zero and passes no gradient back; a gradient taken before it has learnt anything says
nothing of the task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur.data import Samples, in_batches
from edge_tcur.models import Base
from edge_tcur.tasks import Task
from edge_tcur.training.loop import LoopSettings, optimize


def warm_head(base: Base, data: Samples, task: Task, settings: LoopSettings, rate: float) -> list[float]:
    """Trains the base's head alone and returns the losses; nothing where the base has no head of its own.

    The base runs once over the data: its features are kept, and the head learns from them.

    Args:
        settings: epochs, batch size, weight decay and seed of this phase.
        rate: peak learning rate.
    """
    head = list(base.head_parameters().values())
    if not head or not settings.epochs:
        return []
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    module = base.model.get_submodule(base.head[0])
    features, targets = _features(base.model, module, data)

    def losses(indices: np.ndarray) -> Tensor:
        chosen = torch.from_numpy(indices)
        return task.loss(module(features[chosen]), targets[chosen])

    try:
        return optimize([(head, rate)], losses, len(data), settings)
    finally:
        for parameter in head:
            parameter.requires_grad_(False)


def _features(model: nn.Module, head: nn.Module, data: Samples) -> tuple[Tensor, Tensor]:
    """What `head` is given for every sample, and the targets."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(_keep(seen))
    try:
        with torch.no_grad():
            targets = []
            for inputs, labels in in_batches(data, 64):
                model(**inputs)
                targets.append(labels)
    finally:
        hook.remove()
    return torch.cat(seen), torch.cat(targets)


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].detach())

    return hook
