"""Mean gradients of a task's loss with respect to the frozen weights, for selections that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from edge_tcur.method.group import Member, members_of
from edge_tcur.method.standin import Forward, buffers_kept, put_forward, stand_in
from edge_tcur.method.targets import Targets
from edge_tcur_runtime.errors import BadInputError


def mean_gradients(
    model: nn.Module,
    targets: Targets,
    losses: Iterable[Callable[[], Tensor]],
) -> dict[str, Tensor]:
    """Gradients of the mean loss with respect to the weights that `targets` names, as matrices.

    Works on weights of any dtype and storage (int8 layers too): while it runs, each layer computes with a
    float32 copy of its matrix, which takes the gradient. The model is unchanged: a ``forward`` that somebody
    put on a module is called and stays, running statistics are as before.

    Args:
        model: the base, without adapters.
        targets: of `find_targets`.
        losses: one call a batch, each giving the mean loss of its batch.

    Returns:
        module name -> f32 [n1, n2].

    Raises:
        BadInputError: there is no loss.
        FloatingPointError: a gradient is not finite.
    """
    members = members_of(model, targets)
    totals = {
        name: torch.zeros_like(member.matrix(), dtype=torch.float32) for name, member in members.items()
    }
    leaves = {name: _leaf(member) for name, member in members.items()}
    count = 0
    with buffers_kept(model), stand_in(members, lambda name, member: _through(member, leaves[name])):
        for loss in losses:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(), list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient
            count += 1
    if not count:
        raise BadInputError("there is no batch to take gradients of", where="losses")
    means = {name: total / count for name, total in totals.items()}
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise FloatingPointError(f"the gradient of {name} is not finite")
    return means


def _leaf(member: Member) -> Tensor:
    """What takes the gradient: the matrix, or what is added where the module's own forward is called."""
    matrix = member.matrix().float()
    return (matrix if put_forward(member) is None else torch.zeros_like(matrix)).requires_grad_(True)


def _through(member: Member, leaf: Tensor) -> Forward:
    """The module's forward with its weight read from `leaf`, or with `leaf` added to it; see `_leaf`."""
    own = put_forward(member)

    def forward(x: Tensor) -> Tensor:
        if own is None:
            return member.view.call(member.module, x, leaf.to(x.dtype))
        return own(x) + member.view.call(member.module, x, leaf.to(x.dtype), bias=False)

    return forward
