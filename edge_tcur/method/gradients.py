"""Mean gradients of a task's loss with respect to the frozen weights, for selections that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from edge_tcur.method.group import Member, members_of
from edge_tcur.method.targets import Targets


def mean_gradients(
    model: nn.Module,
    targets: Targets,
    losses: Iterable[Callable[[], Tensor]],
) -> dict[str, Tensor]:
    """Gradients of the mean loss with respect to the weights that `targets` names, as matrices.

    Works on weights of any dtype and storage (int8 layers too): while it runs, each layer computes with a
    float32 copy of its matrix, which takes the gradient. The model is unchanged.

    Args:
        model: the base, without adapters.
        targets: of `find_targets`.
        losses: one call a batch, each giving the mean loss of its batch.

    Returns:
        module name -> f32 [n1, n2].

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    members = members_of(model, targets)
    totals = {
        name: torch.zeros_like(member.matrix(), dtype=torch.float32) for name, member in members.items()
    }
    matrices: dict[str, Tensor] = {}
    for name, member in members.items():
        matrices[name] = member.matrix().float().requires_grad_(True)
        member.module.forward = _through(member, matrices[name])
    count = 0
    try:
        for loss in losses:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(), list(matrices.values()), allow_unused=True)
            for name, gradient in zip(matrices, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient
            count += 1
    finally:
        for member in members.values():
            del member.module.forward  # the class's own is seen again
    means = {name: total / max(1, count) for name, total in totals.items()}
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise FloatingPointError(f"the gradient of {name} is not finite")
    return means


def _through(member: Member, matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """The module's forward with its weight read from `matrix`, which requires gradients."""

    def forward(x: Tensor) -> Tensor:
        return member.view.call(member.module, x, matrix.to(x.dtype))

    return forward
