"""The task interface and its registry.

A task states the kind of its samples, the dtype and axes of its targets, a loss and a score, all in
terms that also hold for segmentation (targets [batch, height, width]) and causal language models
(targets [batch, sequence] with ignored positions): nothing outside this module assumes one label a
sample but through `Task`. Imports no torch until a loss is computed: settings are checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.schema import nearest

if TYPE_CHECKING:
    from torch import Tensor


class Task(Protocol):
    """What training, evaluation and export need to know of a task."""

    @property
    def name(self) -> str:
        """Stable name, written to adapters and manifests."""
        ...

    @property
    def kind(self) -> str:
        """Kind of the samples, ``text`` or ``image``."""
        ...

    @property
    def target_axes(self) -> tuple[int | str, ...]:
        """Axes of the targets; a string is dynamic."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch (scalar f32), written in operators that every export target has."""
        ...

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Number of correctly answered targets (scalar)."""
        ...


@dataclass(frozen=True)
class Classification:
    """One label a sample: outputs [batch, classes] f32, targets [batch] int64."""

    name: str
    kind: str
    target_axes: tuple[int | str, ...] = ("batch",)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy. The label is picked by comparison: its backward needs no scatter."""
        import torch

        log_probability = outputs.log_softmax(dim=-1)
        classes = torch.arange(outputs.shape[-1], device=outputs.device)
        chosen = (targets.unsqueeze(-1) == classes).to(outputs.dtype)
        return -(log_probability * chosen).sum(dim=-1).mean()

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Samples whose largest output is their label."""
        return (outputs.argmax(dim=-1) == targets).sum()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification("text-classification", "text"),
        Classification("image-classification", "image"),
    )
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no such task; the nearest name is suggested.
    """
    if name not in TASKS:
        guess = nearest(name, TASKS)
        raise ConfigError(
            f"the task {name!r} is not known; expected one of {', '.join(TASKS)}",
            where="task",
            hint=f"did you mean {guess!r}?" if guess else None,
        )
    return TASKS[name]
