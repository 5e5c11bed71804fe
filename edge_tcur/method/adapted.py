"""Adapted layers: a frozen linear layer plus the update that its group's core makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.selection import SELECTIONS
from edge_tcur.method.targets import Group, Targets, find_targets
from edge_tcur.method.tproduct import (
    apply_update,
    coupling_index,
    coupling_matrix,
    flatten_columns,
    flatten_rows,
)
from edge_tcur_runtime.errors import BaseMismatchError
from edge_tcur_runtime.formats.adapter import Factors
from edge_tcur_runtime.frame import Frame, build_frame


class CoreGroup(nn.Module):
    """The factors of one group: a trained core between frozen columns and rows.

    Attributes:
        core: Parameter f32 [n3, r, r] in the frame's coordinates, zero at the start, so that the
            adapted model begins as the base (no ``U0 = pinv(...)`` and its rounding).
        rows, cols: int64 [r], indices into the base's weights.
        columns_t: f32 [n3 * r, n1], rows_t: f32 [n2, n3 * r]: the frozen factors in the frame.
    """

    rows: Tensor
    cols: Tensor
    columns_t: Tensor
    rows_t: Tensor
    index: Tensor

    def __init__(self, weights: list[Tensor], rows: Tensor, cols: Tensor, frame: str) -> None:
        super().__init__()
        stack = torch.stack([weight.detach() for weight in weights]).double()
        columns, lines = stack[:, :, cols], stack[:, rows, :]
        self.frame: Frame = build_frame(frame, columns.cpu().numpy(), lines.cpu().numpy())
        identity = np.zeros((len(stack), len(rows), len(rows)))
        identity[0] = np.eye(len(rows))
        left = torch.from_numpy(identity if self.frame.left is None else self.frame.left)
        right = torch.from_numpy(identity if self.frame.right is None else self.frame.right)
        device = weights[0].device
        self.core = nn.Parameter(torch.zeros(len(stack), len(rows), len(rows), device=device))
        for name, value in (
            ("rows", rows),
            ("cols", cols),
            ("columns_t", flatten_columns(_t_product(columns, left.to(device))).float().contiguous()),
            ("rows_t", flatten_rows(_t_product(right.to(device), lines)).float().contiguous()),
            ("index", coupling_index(len(stack)).to(device)),
        ):
            self.register_buffer(name, value, persistent=False)

    def update(self, x: Tensor, position: int) -> Tensor:
        """What slice `position` adds to the layer's output, in x's dtype: [..., n1]."""
        matrix_t = coupling_matrix(self.core, self.index[position])
        return apply_update(x.to(self.core.dtype), self.rows_t, matrix_t, self.columns_t).to(x.dtype)

    def factors(self) -> Factors:
        """The group's factors as the adapter file holds them (raw core)."""
        raw = self.frame.to_raw(self.core.detach().double().cpu().numpy())
        return Factors(
            raw.astype(np.float32),
            self.rows.cpu().numpy().astype(np.int32),
            self.cols.cpu().numpy().astype(np.int32),
        )

    def load(self, factors: Factors) -> None:
        """Sets the core from an adapter file's raw core over the same rows and columns."""
        value = torch.from_numpy(self.frame.from_raw(factors.core.astype(np.float64)))
        with torch.no_grad():
            self.core.copy_(value)


def _t_product(a: Tensor, b: Tensor) -> Tensor:
    product = torch.fft.fft(a, dim=0) @ torch.fft.fft(b, dim=0)
    result: Tensor = torch.fft.ifft(product, dim=0).real
    return result


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` plus slice `position` of its group's update.

    The group is held outside the module tree (in a tuple), so that its core is one parameter of
    the model however many layers share it.
    """

    def __init__(self, base: nn.Linear, group: CoreGroup, position: int) -> None:
        super().__init__()
        self.base = base
        self.position = position
        self.enabled = True
        self._group = (group,)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the update: [..., n2] -> [..., n1]."""
        output = cast("Tensor", self.base(x))
        return output + self._group[0].update(x, self.position) if self.enabled else output


class Injection:
    """A model whose targets were replaced by adapted layers; undone by `remove`.

    Attributes:
        groups: group name -> `CoreGroup`.
        targets: what was adapted and what was left alone.
    """

    def __init__(self, model: nn.Module, targets: Targets, groups: dict[str, CoreGroup]) -> None:
        self.model = model
        self.targets = targets
        self.groups = groups
        self._layers: dict[str, AdaptedLinear] = {}
        for spec in targets.groups:
            for position, name in enumerate(spec.modules):
                linear = cast("nn.Linear", model.get_submodule(name))
                self._layers[name] = AdaptedLinear(linear, groups[spec.name], position)
                _replace(model, name, self._layers[name])

    def parameters(self) -> list[nn.Parameter]:
        """The trained cores."""
        return [group.core for group in self.groups.values()]

    def factors(self) -> dict[str, Factors]:
        """Every group's factors as the adapter file holds them."""
        return {name: group.factors() for name, group in self.groups.items()}

    def enable(self, on: bool) -> None:
        """Switches the update on, or off (the model is then exactly the base)."""
        for layer in self._layers.values():
            layer.enabled = on

    def remove(self) -> None:
        """Puts the base's own layers back."""
        for name, layer in self._layers.items():
            _replace(self.model, name, layer.base)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _weights(model: nn.Module, group: Group) -> list[Tensor]:
    return [cast("nn.Linear", model.get_submodule(name)).weight for name in group.modules]


def inject(
    model: nn.Module,
    config: TCurConfig,
    *,
    keep: tuple[str, ...] = (),
    factors: Mapping[str, Factors] | None = None,
) -> Injection:
    """Freezes `model` and replaces its targets by adapted layers.

    Args:
        model: the base; changed in place, its parameters no longer require gradients.
        config: see `TCurConfig`.
        keep: modules that are not adapted (a head).
        factors: start from these (an adapter's) instead of from new rows, columns and a zero core.

    Raises:
        BadInputError, ConfigError: see `find_targets`.
        BaseMismatchError: `factors` do not fit the model's groups; the model is unchanged.
    """
    targets = find_targets(model, config, keep=keep)
    if factors is not None:
        _check_fit(factors, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups: dict[str, CoreGroup] = {}
    for spec in targets.groups:
        weights = _weights(model, spec)
        if factors is None:
            rows, cols = SELECTIONS[config.selection](torch.stack(weights), config.rank)
        else:
            rows, cols = (torch.from_numpy(i.astype(np.int64)) for i in _indices(factors[spec.name]))
        groups[spec.name] = CoreGroup(weights, rows, cols, config.frame)
        if factors is not None:
            groups[spec.name].load(factors[spec.name])
    return Injection(model, targets, groups)


def _check_fit(factors: Mapping[str, Factors], targets: Targets) -> None:
    names = [group.name for group in targets.groups]
    if set(factors) != set(names):
        raise BaseMismatchError(f"the adapter has the groups {sorted(factors)}, the model {sorted(names)}")
    for group in targets.groups:
        own = factors[group.name]
        if len(own.core) != len(group.modules) or own.rows.max() >= group.n1 or own.cols.max() >= group.n2:
            raise BaseMismatchError(
                f"the adapter's factors do not fit {len(group.modules)} weights [{group.n1}, {group.n2}]",
                where=group.name,
            )


def _indices(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    return factors.rows, factors.cols
