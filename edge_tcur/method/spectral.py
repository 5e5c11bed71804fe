"""All updates of a block at once, in the domain of its transform.

One slice alone costs a product of inner size p * r; all p together cost p products of inner size r in the
transform's domain and one product with the inverse transform. It pays where p * r is near the size of the
weights (the paper's attention tensor: 4 x layers slices), and keeps one dense update a weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_tcur_runtime.transform import from_domain, to_domain


class Spectrum:
    """The frozen factors of one block in the domain of its transform.

    In float32 also where core and factors are of half precision, which has no complex products.
    """

    def __init__(self, transform: str, columns: Tensor, rows: Tensor) -> None:
        """Transforms C [p, n1, r] and R [p, r, n2], both in the frame."""

        real = torch.promote_types(columns.dtype, torch.float32)

        def domain(value: np.ndarray, like: Tensor) -> Tensor:
            found = to_domain(transform, value[None])[0]
            kind = real.to_complex() if np.iscomplexobj(found) else real
            return torch.from_numpy(found).to(like.device, kind)

        left, right = (domain(value.detach().cpu().double().numpy(), value) for value in (columns, rows))
        self._left, self._right = left, right
        self._forth = domain(np.eye(len(columns)), columns)  # [f, p]
        frequencies = np.eye(len(left))
        bases = (frequencies, 1j * frequencies) if transform == "dft" else (frequencies,)
        inverse = [from_domain(transform, basis[None], len(columns))[0] for basis in bases]  # [p, f] each
        # Real and imaginary part of a frequency are neighbours, as `torch.view_as_real` has them.
        back = torch.from_numpy(np.stack(inverse, axis=2).reshape(len(columns), -1))
        self._back = back.to(columns.device, real)

    def updates(self, core: Tensor) -> Tensor:
        """``C * core * R`` [p, n1, n2], float32 or wider, of a core [p, r, r], differentiable."""
        found: Tensor = _Updates.apply(core, self)  # type: ignore[no-untyped-call]
        return found

    def multiply(self, core: Tensor) -> Tensor:
        """`updates`, without a graph."""
        inner = torch.tensordot(self._forth, core.to(self._forth.dtype), dims=1)
        product = self._left @ inner @ self._right
        if product.is_complex():
            product = torch.view_as_real(product).movedim(3, 1)
        n1, n2 = product.shape[-2:]
        together: Tensor = self._back @ product.reshape(-1, n1 * n2)
        return together.view(-1, n1, n2)

    def adjoint(self, gradient: Tensor) -> Tensor:
        """The gradient of the core [p, r, r] from that of all updates [p, n1, n2]."""
        n1, n2 = gradient.shape[1:]
        domain = self._back.T @ gradient.reshape(-1, n1 * n2)
        if self._left.is_complex():
            domain = torch.view_as_complex(domain.view(-1, 2, n1, n2).movedim(1, 3).contiguous())
        inner = self._left.mH @ domain.view(-1, n1, n2) @ self._right.mH
        found: Tensor = torch.tensordot(self._forth.mH, inner, dims=1)
        return found.real if found.is_complex() else found


class _Updates(torch.autograd.Function):
    """Linear in the core, so nothing is saved: activation checkpointing counts what layers save."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, spectrum: Spectrum) -> Tensor:
        ctx.spectrum, ctx.kind = spectrum, core.dtype
        return spectrum.multiply(core)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return ctx.spectrum.adjoint(gradients[0]).to(ctx.kind), None


class _Batch:
    """The updates of a block that no layer has taken yet."""

    def __init__(self, updates: Tensor, version: int) -> None:
        self.version, self.with_grad, self.spent = version, updates.requires_grad, False
        if updates.requires_grad:
            updates.register_hook(self._spend)  # type: ignore[no-untyped-call]
        self.parts: dict[int, Tensor] = dict(enumerate(updates.unbind()))

    def _spend(self, _: Tensor) -> None:
        """A backward pass has been through: the graph behind the parts is gone."""
        self.spent = True

    def fits(self, place: int, core: Tensor) -> bool:
        with_grad = core.requires_grad and torch.is_grad_enabled()
        current = self.version == core._version and self.with_grad == with_grad
        return current and not self.spent and place in self.parts


class Batches:
    """Hands out one slice after another of updates that are computed together.

    Every slice is handed out once: the next forward pass computes anew, and so does one in another thread,
    after a change of the core, with gradients switched on or off, or after a backward pass.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], _Batch] = {}

    def take(self, block: int, place: int, core: Tensor, build: Callable[[], Tensor]) -> Tensor:
        """Slice `place` [n1, n2] of the block's updates, which `build` computes from `core`."""
        key = (block, threading.get_ident())
        batch = self._kept.get(key)
        if batch is None or not batch.fits(place, core):
            batch = self._kept[key] = _Batch(build(), core._version)
        part = batch.parts.pop(place)
        if not batch.parts:
            del self._kept[key]
        return part

    def __deepcopy__(self, _: dict[int, object]) -> Batches:
        return Batches()  # what is kept belongs to a pass that is going on

    def __reduce__(self) -> tuple[type[Batches], tuple[()]]:
        return Batches, ()
