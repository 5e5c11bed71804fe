"""Other forwards in the place of the members' own for a while, and a model that is as it was after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from edge_tcur.method.group import Member
from edge_tcur.method.quantized import Int8Linear

Forward = Callable[[Tensor], Tensor]


def put_forward(member: Member) -> Forward | None:
    """The ``forward`` that somebody (accelerate's hooks) put on the module itself, or None: its class's."""
    found: Forward | None = vars(member.module).get("forward")
    return found


@contextmanager
def stand_in(members: Mapping[str, Member], make: Callable[[str, Member], Forward]) -> Iterator[None]:
    """Inside, each member's ``forward`` is the one that `make` gives; after, what was there before."""
    before = {name: put_forward(member) for name, member in members.items()}
    forwards = {name: make(name, member) for name, member in members.items()}
    try:
        for name, member in members.items():
            member.module.forward = _by_name(forwards[name])
        yield
    finally:
        for name, member in members.items():
            vars(member.module).pop("forward", None)  # the class's own is seen again
            if (own := before[name]) is not None:
                member.module.forward = own


def _by_name(forward: Forward) -> Callable[..., Tensor]:
    """The same forward, which takes its input by any name too, as the modules themselves do."""

    def called(*arguments: Tensor, **named: Tensor) -> Tensor:
        return forward(*arguments, *named.values())

    return called


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """After, the model's buffers (a BatchNorm's running statistics) hold what they held before."""
    kept = [
        (module, name, value, value.clone())
        for module in model.modules()
        if not isinstance(module, Int8Linear)  # weights: large, and changed by nobody
        for name, value in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, value, copy in kept:
            value.data.copy_(copy)
            module.register_buffer(name, value, persistent=name not in module._non_persistent_buffers_set)
