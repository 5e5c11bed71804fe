"""What frozen layers with an update have in common, and the convolution among them.

The weight is kept as torch has it, [n1, channels, *kernel]: the rows of its matrix [n1, n2]
(`edge_tcur.method.views`) are then filters as they are, and its columns are picked from a reshape, so one
stored copy serves the convolution, the gathered filters and the gathered columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parts:
    """The update of one layer: ``((x R) M) C``.

    Attributes:
        rows: ``R``, [n2, m]; of a weight alone the indices [r] of its rows, to which each kind of layer has
            its own way.
        matrix: ``M``, the core or the coupling matrix, transposed, [m, m].
        columns: ``C``, columns of the weight, transposed, [m, n1].
        places: of a weight alone, the numbers of its rows, 0 to n1, in the dtype of the indices.
    """

    rows: Tensor
    matrix: Tensor
    columns: Tensor
    places: Tensor | None = None


class Update(Protocol):
    """What the layers of one group share during one call of the model."""

    def parts(self, position: int) -> Parts:
        """The update of one layer."""
        ...


class Updates:
    """Group name -> update during one call. A class of its own: torch.export puts copies in the place
    of a module's plain dicts after tracing, and the layers would then look into another one."""

    def __init__(self) -> None:
        self.by_group: dict[str, Update] = {}


class FrozenLayer(nn.Module):
    """A layer of the base with slice `position` of a group's update, where it has one."""

    def __init__(self) -> None:
        super().__init__()
        self._update: tuple[Updates, str, int] | None = None

    def adapt(self, updates: Updates, group: str, position: int) -> None:
        """Adds slice `position` of `group`'s update, looked up in `updates` at each call."""
        self._update = (updates, group, position)

    def update(self) -> Parts | None:
        """The layer's update in this call."""
        if self._update is None:
            return None
        updates, group, position = self._update
        return updates.by_group[group].parts(position)

    def rows_t(self, rows: Tensor) -> Tensor:
        """Rows of the weight's matrix, transposed: [n2, r]."""
        raise NotImplementedError

    def columns_t(self, cols: Tensor) -> Tensor:
        """Columns of the weight's matrix, transposed: [r, n1]."""
        raise NotImplementedError


class FrozenConvolution(FrozenLayer):
    """A convolution and its update: the gathered rows as filters, then the core and the columns.

    Args:
        convolution: nn.Conv1d, nn.Conv2d or nn.Conv3d without groups.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        bias = cast("Tensor | None", convolution.bias)
        self.register_buffer("weight", cast("Tensor", convolution.weight).detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        # In a tuple, not in the module tree: it only knows stride, padding and dilation.
        self._plain = (cast("nn.Conv2d", convolution),)

    def rows_t(self, rows: Tensor) -> Tensor:
        """See `FrozenLayer`."""
        return self.weight.index_select(0, rows).flatten(1).T

    def columns_t(self, cols: Tensor) -> Tensor:
        """See `FrozenLayer`."""
        return self.weight.flatten(1).index_select(1, cols).T

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, *sizes] -> [batch, n1, *sizes]."""
        output = self._convolve(x, self.weight, self.bias)
        parts = self.update()
        return output if parts is None else output + self._updated(x, parts, output.shape)

    def _updated(self, x: Tensor, parts: Parts, shape: torch.Size) -> Tensor:
        rows_t = parts.rows if parts.places is None else self.rows_t(parts.rows)
        filters = rows_t.T.reshape(-1, *self.weight.shape[1:])
        places = len(self.weight.shape) - 2
        features = self._convolve(x, filters, None).flatten(-places).transpose(-1, -2)
        # On rows [places, m], as in a linear layer: one plain matrix product each, forward and backward.
        flat = features.reshape(-1, features.shape[-1])
        update = (flat @ parts.matrix) @ parts.columns
        return update.reshape(*features.shape[:-1], -1).transpose(-1, -2).reshape(shape)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = self._plain[0]._conv_forward(x, weight, bias)
        return result
