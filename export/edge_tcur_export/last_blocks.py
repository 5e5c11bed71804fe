"""Truncated back-propagation: which blocks there are, what the last K of them leave to learn, and how torch
detaches everything before them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from edge_tcur.errors import ExportError
from edge_tcur.method.targets import Group
from edge_tcur_export.recompute import block_of
from edge_tcur_export.trace import Example, FactorModel
from edge_tcur_runtime.formats.bundle import LastBlocks


def adapted_blocks(model: nn.Module, groups: tuple[Group, ...], inputs: dict[str, Tensor]) -> list[str]:
    """The numbered blocks with adapted weights, in the order in which one call of `model` begins them."""
    names = {block_of(f"{name}.weight") for group in groups for name in group.modules}
    modules = {name: model.get_submodule(name) for name in names if name is not None}
    if not modules:
        return []
    called: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda *_: called.setdefault(name, None)

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


def split_blocks(blocks: list[str], count: int) -> tuple[list[str], list[str]]:
    """The blocks before the last `count`, and those.

    Raises:
        ExportError: there are not more than `count`.
    """
    if len(blocks) <= count:
        raise ExportError(
            f"--last-blocks {count} needs more than {count} numbered blocks (layers.0, layers.1, ...) with "
            f"adapted weights; the model has {len(blocks)}",
            hint="give a smaller number" if len(blocks) > 1 else "leave --last-blocks out for this model",
        )
    return blocks[:-count], blocks[-count:]


@contextmanager
def detached(model: nn.Module, blocks: Collection[str]) -> Iterator[None]:
    """Detaches what the blocks give while the context lasts: no gradient reaches them or what is before."""

    def cut(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        return _pytree.tree_map_only(Tensor, lambda value: value.detach(), outputs)

    hooks = [model.get_submodule(name).register_forward_hook(cut) for name in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def what_learns(
    model: FactorModel, example: Example, groups: tuple[Group, ...], before: Collection[str], count: int
) -> LastBlocks:
    """What gets a gradient with the blocks in `before` detached; to be called in that context.

    A core's slices are numbered over its group. Coupled slices learn together: each of a block of slices
    has a part in the update of every weight of it.
    """
    slices = {}
    for group in groups:
        learn = [block_of(f"{name}.weight") not in before for name in group.modules]
        size = group.size
        slices[group.name] = tuple(
            place
            for place in range(len(learn))
            if any(learn[place // size * size : (place // size + 1) * size])
        )
    loss = model(*example.arguments())[0]
    values = list(example.extras.values())
    gradients = torch.autograd.grad(loss, values, allow_unused=True) if values else ()
    extras = [name for name, value in zip(example.extras, gradients, strict=True) if value is not None]
    return LastBlocks(count, slices, tuple(extras))
