"""The task's gradients on labelled batches, for selections that look at them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from edge_tcur.data import Samples
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.targets import Targets
from edge_tcur.tasks import Task


def task_gradients(
    model: nn.Module,
    targets: Targets,
    data: Samples,
    task: Task,
    *,
    batch_size: int,
    batches: int,
    seed: int,
) -> dict[str, Tensor]:
    """Mean gradients over at most `batches` random batches of `data`; see `mean_gradients`."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(data))

    def loss_of(indices: np.ndarray) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            inputs, labels = data.take(indices)
            return task.loss(model(**inputs), labels)

        return loss

    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return mean_gradients(model, targets, map(loss_of, parts[:batches]))
