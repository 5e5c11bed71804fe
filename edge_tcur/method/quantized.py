"""A frozen linear layer with int8 weights, one scale an output feature: a quarter of the memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_tcur_runtime.errors import BadInputError


class Int8Linear(nn.Module):
    """Weight-only int8: ``y = x (scale * weight)^T + bias``, symmetric, per output feature.

    Attributes:
        weight: int8 [n1, n2]; scale: [n1] in the dtype of the layer that it replaces; bias: [n1] or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        found = weight.float().abs().amax(dim=1) / 127
        # Rounded as it is kept: a half precision scale that differs would be wrong 127 times over.
        scale = found.clamp_min(_smallest_scale(weight.dtype)).to(weight.dtype).float()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer(
            "weight", (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        )
        self.register_buffer("scale", scale.to(weight.dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def dequantize(self) -> Tensor:
        """The weight [n1, n2] in the dtype of the scales."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[..., n2] -> [..., n1]."""
        return functional.linear(x, self.dequantize(), self.bias)


def _smallest_scale(dtype: torch.dtype) -> float:
    """Of those that `dtype` holds to within the 254th part, which moves no entry by more than half a step."""
    return torch.finfo(dtype).tiny / (8 if dtype is torch.float16 else 1)


def quantize_linears(model: nn.Module, *, keep: tuple[str, ...] = ()) -> list[str]:
    """Replaces every `nn.Linear` of `model` in place by `Int8Linear`; returns their names.

    Args:
        keep: names of modules that stay as they are, with everything below them (a head).

    Raises:
        BadInputError: a weight is not finite; nothing is replaced.
    """
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(f"{name}.".startswith(f"{kept}.") for kept in keep)
    ]
    for name in names:
        if not torch.isfinite(model.get_submodule(name).get_parameter("weight")).all():
            raise BadInputError("the weight holds NaN or infinity", where=name)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, Int8Linear(getattr(owner, leaf)))
    return names
