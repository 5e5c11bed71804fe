"""A frozen layer and the update that its group's core makes: the module that takes the layer's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from edge_tcur.method.cost import Sizes, cheapest_form
from edge_tcur.method.forms import FORMS, Form, beside, possible_forms
from edge_tcur.method.group import CoreGroup
from edge_tcur.method.views import View, weight_of

_DENSE = ("materialised", "merged", "spectral")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Slot:
    """Where a layer finds its update: slice `position` of a group.

    `trains_bias`: whether the adapter has a bias of its own for the layer (`modules_to_save`).
    """

    group: CoreGroup
    position: int
    trains_bias: bool = False


class AdaptedLayer(nn.Module):
    """A frozen layer plus slice `position` of the active adapter's update.

    Attributes:
        base: the layer that it replaces.
        view: how its weight is a matrix.
        form: name of the form to compute with, or None: the cheapest by `edge_tcur.method.cost`.
    """

    def __init__(self, base: nn.Module, view: View) -> None:
        super().__init__()
        self.base = base
        self.view = view
        self.form: str | None = None
        # In a plain attribute, not in the module tree: a core is one parameter of its adapter,
        # however many layers share it.
        self._slot: tuple[Slot, ...] = ()

    def use(self, slot: Slot | None) -> None:
        """Takes its update from `slot` from now on; None is the base."""
        self._slot = () if slot is None else (slot,)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight; some models read it."""
        return weight_of(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias."""
        return cast("Tensor | None", self.base.bias)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)  # sizes, which some models read

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        """The frozen layer's output plus the update; its input by position or by name."""
        if x is None:
            (x,) = named.values()
        if not self._slot:
            return cast("Tensor", self.base(x))
        slot = self._slot[0]
        return self._form(x, slot)(self.base, self.view, x, slot.group.slice(slot.position))

    def _form(self, x: Tensor, slot: Slot) -> Form:
        if _is_watched(self.base) or slot.trains_bias:
            return beside  # other forms compute from its weight, not by it, and take its bias as frozen
        form = self.form or self._cheapest(x, slot)
        if torch.is_autocast_enabled(x.device.type):
            # Our own backward passes run where nothing is cast; torch's operators remember.
            return FORMS["materialised"] if form in _DENSE else beside
        return FORMS[form]

    def _cheapest(self, x: Tensor, slot: Slot) -> str:
        spec = slot.group.spec
        forms = possible_forms(self.view, has_rows=slot.group.has_rows, in_block=slot.group.in_block)
        inner, rank = slot.group.columns_t.shape[1], slot.group.core.shape[-1]
        return cheapest_form(forms, Sizes(max(1, x.numel() // spec.n2), spec.n1, spec.n2, inner, rank))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody put hooks or a forward on a module, which have to be called."""
    return "forward" in vars(module) or any(vars(module)[kind] for kind in _HOOKS)
