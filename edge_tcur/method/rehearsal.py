"""Rehearsal: a low-rank update of every target, trained before rows and columns are chosen.

A gradient says where the first step goes; the update that a short training of LoRA (Hu et al., arXiv
2106.09685) ends with says where all of them went. Rows, columns or sketches that span that update, and a
core that starts as the nearest to it, keep most of it in a few thousand numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_tcur.method.group import Member, members_of
from edge_tcur.method.standin import Forward, buffers_kept, put_forward, stand_in
from edge_tcur.method.targets import Targets
from edge_tcur_runtime.errors import ConfigError

_SCALE = 2.0  # of the update: LoRA's alpha / r at its usual setting


class Rehearsal:
    """Low-rank updates ``W + 2 B A`` of the weights that `targets` names, for as long as `active` lasts.

    Works on whatever has a view: linear layers, convolutions, int8 layers. The model is unchanged after.

    Attributes:
        members: module name -> module and view.
    """

    def __init__(self, model: nn.Module, targets: Targets, rank: int, *, seed: int = 0) -> None:
        """Draws A [r, n2] at random (Kaiming uniform, as LoRA does) and sets B [n1, r] to zero.

        Raises:
            ConfigError: a rank below 1.
        """
        if rank < 1:
            raise ConfigError(f"the rank is {rank}; expected at least 1", where="rank")
        self.members: dict[str, Member] = members_of(model, targets)
        self._model, self._is_active = model, False
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
        """Inside, the model computes with the updates; inside itself, no other than once.

        A ``forward`` that somebody put on a module (accelerate's hooks do) is called, and there again after.
        Running statistics (BatchNorm's) are after what they were before.
        """
        if self._is_active:
            yield
            return
        self._is_active = True
        try:
            with buffers_kept(self._model), stand_in(self.members, self._updated):
                yield
        finally:
            self._is_active = False

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

    def _updated(self, name: str, member: Member) -> Forward:
        put, (b, a) = put_forward(member), self._pairs[name]
        own: Forward = member.module.forward

        def through_factors(x: Tensor) -> Tensor:
            low: Tensor = functional.linear(functional.linear(x.to(a.dtype), a), b)
            output = own(x)
            return output + (_SCALE * low).to(output.dtype)

        def through_matrix(x: Tensor) -> Tensor:
            matrix = member.matrix()
            return member.view.call(member.module, x, (matrix + _SCALE * (b @ a)).to(x.dtype))

        def beside(x: Tensor) -> Tensor:
            output = own(x)
            return output + member.view.call(member.module, x, (_SCALE * (b @ a)).to(x.dtype), bias=False)

        if member.view.is_linear:
            return through_factors
        return through_matrix if put is None else beside
