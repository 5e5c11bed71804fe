"""The task's rehearsal: a low-rank update and a head, trained before rows and columns are chosen."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from torch import Tensor

from edge_tcur.data import Samples
from edge_tcur.method.rehearsal import Rehearsal
from edge_tcur.method.targets import Targets
from edge_tcur.models import Base
from edge_tcur.tasks import Task
from edge_tcur.training.loop import LoopSettings, fit

_SMALLEST_RANK = 16
_RATE, _WIDTH, _POWER = 1e-3, 384, -0.75  # LoRA's best on MiniLM, and how it falls with the width


def rehearsal_rank(targets: Targets) -> int:
    """Rank of every update of a rehearsal: the largest of the adapter's groups, at least 16."""
    return max(_SMALLEST_RANK, *(group.rank for group in targets.groups))


def rehearsal_rate(targets: Targets) -> float:
    """Peak learning rate of a rehearsal where none is given: 0.001 * (384 / width)^0.75.

    The width is the median number of inputs n2 of the adapted weights. The rule goes through the rates at
    which LoRA did best in our sweeps (width 64: 0.004; 384: 0.001) and near those that LoRA's authors
    (arXiv 2106.09685, table 9; 768: 4e-4 to 5e-4) and QLoRA's (arXiv 2305.14314; 4096: 2e-4) trained with.
    """
    width = median(group.n2 for group in targets.groups for _ in group.modules)
    return float(_RATE * (width / _WIDTH) ** _POWER)


def rehearse(
    base: Base,
    targets: Targets,
    data: Samples,
    task: Task,
    settings: LoopSettings,
    *,
    rate: float,
    head_rate: float,
    on_epoch: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Trains a low-rank update of every target together with the base's own head, which stays trained.

    Args:
        targets: the weights that are adapted; see `rehearsal_rank`.
        rate, head_rate: peak learning rates.
        on_epoch: called with the epoch (from 1) and its mean loss.

    Returns:
        module name -> update f32 [n1, n2], for the selection ``update``.

    Raises:
        FloatingPointError: the loss, a gradient or an update is not finite.
    """
    head = list(base.head_parameters().values())
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    rehearsal = Rehearsal(base.model, targets, rehearsal_rank(targets), seed=settings.seed)
    try:
        with rehearsal.active():
            fit(
                base.model,
                [(rehearsal.parameters(), rate), (head, head_rate)],
                data,
                task,
                settings,
                on_epoch=on_epoch,
            )
    finally:
        for parameter in head:
            parameter.requires_grad_(False)
    return rehearsal.updates()
