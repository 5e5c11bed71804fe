"""The task interface and its registry: the device's facts of each task, its loss and its metric in torch.

`edge_tcur_runtime.tasks` defines what a task means; nothing outside the two modules assumes one label a
sample but through them. Losses are written in operators that ONNX Runtime Training 1.19.2 can differentiate,
that a step graph of standard operators can hold, and that ExecuTorch has. Imports no torch until one is
computed: settings are checked without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from edge_tcur_runtime import tasks as device
from edge_tcur_runtime.tasks import IGNORED, DeviceTask, find_device_task

if TYPE_CHECKING:
    from torch import Generator, Tensor

SMOOTHING = 1e-5  # of the Dice loss, above and below the line, as MONAI's DiceLoss has it


class Task(DeviceTask, Protocol):
    """What training, evaluation and export need to know of a task."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch over its weight (scalar f32), written in operators that every export target
        has; 0 where the weight is 0."""
        ...

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task's metric of a batch (scalar f32): `DeviceTask.score` in torch."""
        ...

    def example_targets(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Random valid targets for outputs of this shape."""
        ...


def _one_hot(targets: Tensor, classes: int, axis: int) -> Tensor:
    """f32 with a class axis at `axis`, by comparison: its backward needs no scatter."""
    import torch

    shape = [1] * (targets.dim() + 1)
    shape[axis] = classes
    return (targets.unsqueeze(axis) == torch.arange(classes, device=targets.device).reshape(shape)).float()


class Classification(device.Classification):
    """One label a sample: outputs f32 [batch, classes], targets int64 [batch]."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        chosen = _one_hot(targets, outputs.shape[-1], 1)
        return -(outputs.log_softmax(dim=-1) * chosen).sum(dim=-1).mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Accuracy."""
        return (outputs.argmax(dim=-1) == targets).float().mean()

    def example_targets(self, outputs: Tensor, generator: Generator) -> Tensor:
        """See `Task`."""
        import torch

        return torch.randint(outputs.shape[1], (len(outputs),), generator=generator)


class Regression(device.Regression):
    """Numbers: outputs and targets f32 [batch, outputs]."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over samples and outputs."""
        difference = outputs - targets
        return (difference * difference).mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean absolute error."""
        return (outputs - targets).abs().mean()

    def example_targets(self, outputs: Tensor, generator: Generator) -> Tensor:
        """See `Task`."""
        import torch

        return torch.randn(outputs.shape, generator=generator)


class Multilabel(device.Multilabel):
    """Any number of labels a sample: outputs f32 [batch, labels], targets f32 [batch, labels] of 0 and 1."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of the outputs, mean over samples and labels.

        As the log-softmax of the pair (output, 0), whose halves are the logarithms of ``sigmoid(output)``
        and ``1 - sigmoid(output)``: finite for every output, and with the right gradient at 0, where a new
        head begins; ``max(x, 0) - x t + log(1 + exp(-|x|))`` has neither `Abs` nor `Relu` a gradient there.
        """
        import torch

        pair = torch.stack([outputs, torch.zeros_like(outputs)], dim=-1).log_softmax(dim=-1)
        return -(pair * torch.stack([targets, 1 - targets], dim=-1)).sum(dim=-1).mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Part of the decisions that are right."""
        return ((outputs >= 0) == (targets >= device.THRESHOLD)).float().mean()

    def example_targets(self, outputs: Tensor, generator: Generator) -> Tensor:
        """See `Task`."""
        import torch

        return torch.randint(2, outputs.shape, generator=generator).float()


class Segmentation(device.Segmentation):
    """One class a pixel: outputs f32 [batch, classes, *space], targets int64 [batch, *space]."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Dice loss plus cross-entropy: MONAI's ``DiceCELoss(softmax=True, to_onehot_y=True)`` as it comes.

        Dice is taken sample by sample and class by class, the background (class 0) among them:
        ``1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)`` with s = `SMOOTHING`, averaged over both, so that
        micro-batches add up to the batch. A class that is neither there nor answered costs nothing.
        """
        log_probability = outputs.flatten(2).log_softmax(dim=1)
        truth = _one_hot(targets.flatten(1), outputs.shape[1], 1)
        entropy = -(log_probability * truth).sum(dim=1).mean()
        probability = log_probability.exp()
        overlap = (probability * truth).sum(dim=2)
        sizes = probability.sum(dim=2) + truth.sum(dim=2)
        return entropy + 1 - ((2 * overlap + SMOOTHING) / (sizes + SMOOTHING)).mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean Dice coefficient of the answer."""
        answer = _one_hot(outputs.flatten(2).argmax(dim=1), outputs.shape[1], 1)
        truth = _one_hot(targets.flatten(1), outputs.shape[1], 1)
        sizes = answer.sum(dim=2) + truth.sum(dim=2)
        overlap = 2 * (answer * truth).sum(dim=2) / sizes.clamp(min=1.0)
        return (overlap.sum(dim=1) / (sizes > 0).float().sum(dim=1)).mean()

    def example_targets(self, outputs: Tensor, generator: Generator) -> Tensor:
        """See `Task`."""
        import torch

        shape = (len(outputs), *outputs.shape[2:])
        return torch.randint(outputs.shape[1], shape, generator=generator)


class CausalLm(device.CausalLm):
    """The next token: outputs f32 [batch, sequence, vocabulary], targets int64 [batch, sequence]."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the positions whose next token is not `IGNORED`.

        torch's own, of the sum: ONNX Runtime Training then has one operator with a gradient of its own, and
        holds three tensors of the outputs' size in place of five. Comparing every label with every token of
        the vocabulary, as `Classification` does, takes one more in the step graph (docs/tasks.md).
        """
        from torch.nn import functional

        following = _following(targets)
        total = functional.cross_entropy(
            outputs.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / (following != IGNORED).float().sum().clamp(min=1.0)

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Part of the tokens that were the most probable ones."""
        following = _following(targets)
        right = (outputs.argmax(dim=-1) == following).float()  # `IGNORED` is never an answer
        return right.sum() / (following != IGNORED).float().sum().clamp(min=1.0)

    def example_targets(self, outputs: Tensor, generator: Generator) -> Tensor:
        """See `Task`; about one in four is ignored."""
        import torch

        shape = outputs.shape[:2]
        tokens = torch.randint(outputs.shape[2], shape, generator=generator)
        return tokens.masked_fill(torch.rand(shape, generator=generator) < 0.25, IGNORED)


def _following(targets: Tensor) -> Tensor:
    """Each position's next token, int64 [batch, sequence]. The targets are shifted and not the outputs, which
    would be copied."""
    from torch.nn import functional

    return functional.pad(targets[:, 1:], (0, 1), value=IGNORED)


def _registry(kinds: Mapping[type[DeviceTask], type[Task]], facts: Iterable[DeviceTask]) -> dict[str, Task]:
    """The device's tasks with losses, under the same names."""
    return {task.name: kinds[type(task)](task.name, task.kind) for task in facts}  # type: ignore[call-arg]


TASKS: dict[str, Task] = _registry(
    {
        device.Classification: Classification,
        device.Regression: Regression,
        device.Multilabel: Multilabel,
        device.Segmentation: Segmentation,
        device.CausalLm: CausalLm,
    },
    device.DEVICE_TASKS.values(),
)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no such task; the nearest name is suggested.
    """
    return TASKS[find_device_task(name).name]
