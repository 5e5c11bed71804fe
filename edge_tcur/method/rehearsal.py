"""Rehearsal: a low-rank update of every target, trained before rows and columns are chosen.

A gradient says where the first step goes; the update that a short training of LoRA (Hu et al., arXiv
2106.09685) ends with says where all of them went. Rows, columns or sketches that span that update, and a
core that starts as the nearest to it, keep most of it in a few thousand numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_tcur.method.group import Member, members_of
from edge_tcur.method.targets import Targets

_SCALE = 2.0  # of the update: LoRA's alpha / r at its usual setting


class Rehearsal:
    """Low-rank updates ``W + 2 B A`` of the weights that `targets` names, for as long as `active` lasts.

    Works on whatever has a view: linear layers, convolutions, int8 layers. The model is unchanged after.

    Attributes:
        members: module name -> module and view.
    """

    def __init__(self, model: nn.Module, targets: Targets, rank: int, *, seed: int = 0) -> None:
        """Draws A [r, n2] at random (Kaiming uniform, as LoRA does) and sets B [n1, r] to zero."""
        self.members: dict[str, Member] = members_of(model, targets)
        generator = torch.Generator().manual_seed(seed)
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, member in self.members.items():
            n1, n2 = member.matrix().shape
            r, device = min(rank, n1, n2), member.matrix().device
            bound = n2**-0.5
            a = (2 * bound * torch.rand(r, n2, generator=generator) - bound).to(device)
            self._pairs[name] = nn.Parameter(torch.zeros(n1, r, device=device)), nn.Parameter(a)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: B and A of every weight."""
        return [value for pair in self._pairs.values() for value in pair]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model computes with the updates.

        A ``forward`` that somebody put on a module (accelerate's hooks do) is called, and there again after.
        """
        before = {
            name: vars(member.module)["forward"]
            for name, member in self.members.items()
            if "forward" in vars(member.module)
        }
        for name, member in self.members.items():
            member.module.forward = _updated(member, *self._pairs[name])
        try:
            yield
        finally:
            for name, member in self.members.items():
                del member.module.forward  # the class's own is seen again
                if name in before:
                    member.module.forward = before[name]

    def updates(self) -> dict[str, Tensor]:
        """Module name -> the update learnt, f32 [n1, n2].

        Raises:
            FloatingPointError: one is not finite.
        """
        with torch.no_grad():
            found = {name: _SCALE * (b @ a) for name, (b, a) in self._pairs.items()}
        for name, update in found.items():
            if not torch.isfinite(update).all():
                raise FloatingPointError(f"the update of {name} is not finite")
        return found


def _updated(member: Member, b: Tensor, a: Tensor) -> Callable[[Tensor], Tensor]:
    own: Callable[[Tensor], Tensor] = member.module.forward

    def through_factors(x: Tensor) -> Tensor:
        low: Tensor = functional.linear(functional.linear(x.to(a.dtype), a), b)
        output = own(x)
        return output + (_SCALE * low).to(output.dtype)

    def through_matrix(x: Tensor) -> Tensor:
        matrix = member.matrix()
        return member.view.call(member.module, x, (matrix + _SCALE * (b @ a)).to(x.dtype))

    return through_factors if member.view.is_linear else through_matrix
