"""What each task means: its samples, its targets, the weight of a batch, its answers and its metric.

The one definition of these facts. The workstation's `edge_tcur.tasks` adds the loss and the metric in torch
to the same classes; the device needs neither, because the exported graphs compute them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from edge_tcur_runtime.data.targets import LABEL, LABELS, MASKS, NOTHING, VALUES
from edge_tcur_runtime.errors import ConfigError, IncompatibleError
from edge_tcur_runtime.formats.bundle import InputSpec
from edge_tcur_runtime.formats.schema import nearest

IGNORED = -100  # a target that counts neither in the loss nor in the metric
ACCURACY = "accuracy"  # name of the metric of tasks with one label a sample
THRESHOLD = 0.5  # probability from which a label of several belongs to the answer
Axes = tuple[int | str, ...]


@dataclass(frozen=True)
class Metric:
    """How answers are scored: a mean over the weight of the samples.

    Attributes:
        name: as it is printed.
        larger_is_better: its direction.
        is_share: a number from 0 to 1, printed as a percentage.
    """

    name: str
    larger_is_better: bool = True
    is_share: bool = True

    def format(self, value: float) -> str:
        """The value as people read it."""
        return f"{value:.1%}" if self.is_share else f"{value:.4g}"


class Answer(Protocol):
    """What a model says to one sample."""

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        ...

    def cells(self) -> tuple[str, ...]:
        """The columns of a table, as `DeviceTask.columns` names them."""
        ...


@dataclass(frozen=True)
class Prediction:
    """One label.

    Attributes:
        label: the most probable class.
        scores: probability of every class, in label order; they sum to 1.
    """

    label: str
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """See `Answer`."""
        return {"label": self.label, "scores": list(self.scores)}

    def cells(self) -> tuple[str, ...]:
        """See `Answer`."""
        return self.label, f"{max(self.scores):.3f}"


@dataclass(frozen=True)
class LabelSet:
    """Any number of labels.

    Attributes:
        labels: those of a probability of at least `THRESHOLD`.
        scores: probability of every label, in label order, each from 0 to 1.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """See `Answer`."""
        return {"labels": list(self.labels), "scores": list(self.scores)}

    def cells(self) -> tuple[str, ...]:
        """See `Answer`."""
        return "|".join(self.labels) or "(none)", f"{max(self.scores):.3f}"


@dataclass(frozen=True)
class Values:
    """Numbers, one for each of the bundle's labels."""

    values: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        """See `Answer`."""
        return {"values": dict(self.values)}

    def cells(self) -> tuple[str, ...]:
        """See `Answer`."""
        return (", ".join(f"{name} {value:.4g}" for name, value in self.values.items()),)


@dataclass(frozen=True, eq=False)
class Mask:
    """A class for every pixel.

    Attributes:
        mask: class numbers int64 [*space].
        shares: class -> part of the pixels, 0 to 1, of the classes that there are.
    """

    mask: np.ndarray
    shares: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        """See `Answer`; the mask itself is written to a file, not printed."""
        return {"shares": dict(self.shares)}

    def cells(self) -> tuple[str, ...]:
        """See `Answer`."""
        return (", ".join(f"{name} {share:.1%}" for name, share in self.shares.items()),)


@dataclass(frozen=True)
class Likelihood:
    """How probable a text is.

    Attributes:
        log_likelihood: sum of the natural logarithms of every token's probability after those before it.
        tokens: how many tokens that are; the first one has none before it and is not counted.
    """

    log_likelihood: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(-log_likelihood / tokens)``; 1 is certain. Infinity where it is beyond a float."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.log_likelihood / max(1, self.tokens)))

    def to_dict(self) -> dict[str, object]:
        """See `Answer`."""
        perplexity = self.perplexity if self.tokens and np.isfinite(self.perplexity) else None
        return {"log_likelihood": self.log_likelihood, "tokens": self.tokens, "perplexity": perplexity}

    def cells(self) -> tuple[str, ...]:
        """See `Answer`."""
        known = f"{self.perplexity:.4g}" if self.tokens else "-"
        return f"{self.log_likelihood:.4f}", str(self.tokens), known


class DeviceTask(Protocol):
    """What a device needs to know of a task.

    Attributes:
        name: stable name, written to adapters and manifests.
        kind: kind of the samples, ``text`` or ``image``.
        reads: how targets are read from a data set; see `edge_tcur_runtime.data.targets`.
        target_dtype: numpy name of the targets' dtype.
        metric: how answers are scored.
        judged_by_loss: whether the loss, not the metric, says which of two adapters is better.
        columns: titles of an answer's columns.
    """

    @property
    def name(self) -> str:
        """Stable name."""
        ...

    @property
    def kind(self) -> str:
        """Kind of the samples."""
        ...

    reads: ClassVar[str]
    target_dtype: ClassVar[str]
    metric: ClassVar[Metric]
    judged_by_loss: ClassVar[bool]
    columns: ClassVar[tuple[str, ...]]

    def target_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """Axes of the targets; a string is dynamic."""
        ...

    def output_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """Axes of the outputs; ``vocabulary`` is any size, other strings are dynamic."""
        ...

    def batch_targets(self, encoded: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The graphs' targets of a batch.

        Args:
            encoded: the batch's targets as `edge_tcur_runtime.data.encode_targets` gave them.
            inputs: its model inputs.
        """
        ...

    def weight(self, targets: np.ndarray) -> int:
        """What the batch's mean loss and metric count for beside other batches': samples, or positions that
        are not ignored. Batches averaged by it give the mean over all of them together."""
        ...

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """The metric of a batch; 0 where its weight is 0."""
        ...

    def answer(
        self, outputs: np.ndarray, inputs: Mapping[str, np.ndarray], labels: Sequence[str]
    ) -> Sequence[Answer]:
        """Raw outputs as answers, one a sample."""
        ...


def mean_by_weight(values: Sequence[float], weights: Sequence[int]) -> float:
    """Mean of batches' means; 0 where nothing has a weight."""
    total = sum(weights)
    return (
        sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0
    )


def ranks(task: DeviceTask, metric: float, loss: float) -> tuple[float, ...]:
    """A key that is larger for the better of two scores on the same data.

    A share that was averaged over other batches differs in its last bits; that is no difference.
    """
    if task.judged_by_loss:
        return (-loss,)
    if task.metric.is_share:
        metric = round(metric, 9)
    return metric if task.metric.larger_is_better else -metric, -loss


@dataclass(frozen=True)
class _Samples:
    """What tasks with targets of a data set have in common: every sample weighs the same."""

    name: str
    kind: str

    judged_by_loss: ClassVar[bool] = False

    def batch_targets(self, encoded: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `DeviceTask`."""
        del inputs
        return encoded

    def weight(self, targets: np.ndarray) -> int:
        """See `DeviceTask`: the number of samples."""
        return len(targets)


@dataclass(frozen=True)
class Classification(_Samples):
    """One label a sample: outputs f32 [batch, classes], targets int64 [batch]."""

    reads: ClassVar[str] = LABEL
    target_dtype: ClassVar[str] = "int64"
    metric: ClassVar[Metric] = Metric(ACCURACY)
    columns: ClassVar[tuple[str, ...]] = ("label", "score")

    def target_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`."""
        del inputs, labels
        return ("batch",)

    def output_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`."""
        del inputs
        return "batch", len(labels)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Part of the samples whose largest output is their label."""
        return _mean(outputs.argmax(axis=-1) == targets)

    def answer(
        self, outputs: np.ndarray, inputs: Mapping[str, np.ndarray], labels: Sequence[str]
    ) -> list[Prediction]:
        """See `DeviceTask`."""
        del inputs
        shifted = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        scores = shifted / shifted.sum(axis=-1, keepdims=True)
        return [Prediction(labels[int(row.argmax())], tuple(map(float, row))) for row in scores]


@dataclass(frozen=True)
class _Columns(_Samples):
    """A number for each label: outputs and targets f32 [batch, labels]."""

    target_dtype: ClassVar[str] = "float32"

    def target_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`."""
        del inputs
        return "batch", len(labels)

    output_axes = target_axes


@dataclass(frozen=True)
class Regression(_Columns):
    """Numbers: outputs and targets f32 [batch, outputs], which the labels name."""

    reads: ClassVar[str] = VALUES
    metric: ClassVar[Metric] = Metric("mean absolute error", larger_is_better=False, is_share=False)
    columns: ClassVar[tuple[str, ...]] = ("values",)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Mean over samples and outputs of the distance to the target."""
        return _mean(np.abs(outputs - targets))

    def answer(
        self, outputs: np.ndarray, inputs: Mapping[str, np.ndarray], labels: Sequence[str]
    ) -> list[Values]:
        """See `DeviceTask`."""
        del inputs
        return [Values(dict(zip(labels, map(float, row), strict=True))) for row in outputs]


@dataclass(frozen=True)
class Multilabel(_Columns):
    """Any number of labels a sample: outputs f32 [batch, labels], targets f32 [batch, labels] of 0 and 1."""

    reads: ClassVar[str] = LABELS
    metric: ClassVar[Metric] = Metric("label accuracy")
    columns: ClassVar[tuple[str, ...]] = ("labels", "highest score")

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Part of all decisions, one for each sample and label, that are right."""
        return _mean((outputs >= 0) == (targets >= THRESHOLD))

    def answer(
        self, outputs: np.ndarray, inputs: Mapping[str, np.ndarray], labels: Sequence[str]
    ) -> list[LabelSet]:
        """See `DeviceTask`. A probability is at least `THRESHOLD` where its output is at least 0."""
        del inputs
        smaller = np.exp(-np.abs(outputs.astype(np.float64)))
        scores = np.where(outputs >= 0, 1.0, smaller) / (1 + smaller)
        return [
            LabelSet(
                tuple(label for label, value in zip(labels, row, strict=True) if value >= 0),
                tuple(map(float, chances)),
            )
            for row, chances in zip(outputs, scores, strict=True)
        ]


@dataclass(frozen=True)
class Segmentation(_Samples):
    """One class a pixel: outputs f32 [batch, classes, *space], targets int64 [batch, *space]."""

    reads: ClassVar[str] = MASKS
    target_dtype: ClassVar[str] = "int64"
    metric: ClassVar[Metric] = Metric("Dice")
    columns: ClassVar[tuple[str, ...]] = ("parts",)

    def target_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`; the space is that of the picture [batch, channels, *space]."""
        del labels
        (picture,) = inputs.values()
        return "batch", *picture.shape[2:]

    def output_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`."""
        batch, *space = self.target_axes(inputs, labels)
        return batch, len(labels), *space

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Dice coefficient ``2 |A n T| / (|A| + |T|)`` of answer and truth, averaged over the classes that
        either of the two holds, then over the samples."""
        classes = np.arange(outputs.shape[1])[:, None]
        answers = outputs.argmax(axis=1).reshape(len(targets), 1, -1) == classes
        truth = targets.reshape(len(targets), 1, -1) == classes
        sizes = answers.sum(axis=2) + truth.sum(axis=2)
        overlap = 2 * (answers & truth).sum(axis=2) / np.maximum(sizes, 1)
        return _mean(overlap.sum(axis=1) / np.maximum((sizes > 0).sum(axis=1), 1))

    def answer(
        self, outputs: np.ndarray, inputs: Mapping[str, np.ndarray], labels: Sequence[str]
    ) -> list[Mask]:
        """See `DeviceTask`."""
        del inputs
        masks = outputs.argmax(axis=1)
        counts = [np.bincount(mask.ravel(), minlength=len(labels)) / mask.size for mask in masks]
        return [
            Mask(mask, {name: float(part) for name, part in zip(labels, parts, strict=True) if part})
            for mask, parts in zip(masks, counts, strict=True)
        ]


@dataclass(frozen=True)
class CausalLm:
    """The next token at every position: outputs f32 [batch, sequence, vocabulary], targets int64
    [batch, sequence], the input's own tokens with `IGNORED` at padding. The output at a position answers the
    target of the next one; that shift is part of loss and metric."""

    name: str
    kind: str

    reads: ClassVar[str] = NOTHING
    target_dtype: ClassVar[str] = "int64"
    metric: ClassVar[Metric] = Metric("token accuracy")
    judged_by_loss: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("log-likelihood", "tokens", "perplexity")

    def target_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`."""
        del inputs, labels
        return "batch", "sequence"

    def output_axes(self, inputs: Mapping[str, InputSpec], labels: Sequence[str]) -> Axes:
        """See `DeviceTask`."""
        del inputs, labels
        return "batch", "sequence", "vocabulary"

    def batch_targets(self, encoded: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `DeviceTask`.

        Raises:
            IncompatibleError: the model has no attention mask: its padding cannot be told from text.
        """
        del encoded
        if "attention_mask" not in inputs:
            raise IncompatibleError(f"the task {self.name} needs the input 'attention_mask'", where="inputs")
        return np.where(inputs["attention_mask"] == 0, np.int64(IGNORED), inputs["input_ids"])

    def weight(self, targets: np.ndarray) -> int:
        """See `DeviceTask`: the number of tokens that have one before them."""
        return int((targets[:, 1:] != IGNORED).sum())

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Part of the tokens that were the most probable ones."""
        known = targets[:, 1:] != IGNORED
        return _mean((outputs[:, :-1].argmax(axis=-1) == targets[:, 1:])[known])

    def answer(
        self, outputs: np.ndarray, inputs: Mapping[str, np.ndarray], labels: Sequence[str]
    ) -> list[Likelihood]:
        """See `DeviceTask`."""
        del labels
        targets = self.batch_targets(np.empty(0), inputs)
        return [_likelihood(*pair) for pair in zip(outputs, targets, strict=True)]


def _likelihood(outputs: np.ndarray, targets: np.ndarray) -> Likelihood:
    """Of one text: outputs [sequence, vocabulary], targets [sequence]."""
    places = np.flatnonzero(targets[1:] != IGNORED)
    total = 0.0
    for place in places:  # row by row: a copy of all of them would be as large as the outputs
        row = outputs[place].astype(np.float64)
        top = row.max()
        total += row[targets[place + 1]] - top - np.log(np.exp(row - top).sum())
    return Likelihood(float(total), len(places))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else 0.0


DEVICE_TASKS: dict[str, DeviceTask] = {
    task.name: task
    for task in (
        Classification("text-classification", "text"),
        Classification("image-classification", "image"),
        Regression("text-regression", "text"),
        Regression("image-regression", "image"),
        Multilabel("text-multilabel", "text"),
        Multilabel("image-multilabel", "image"),
        Segmentation("image-segmentation", "image"),
        CausalLm("causal-lm", "text"),
    )
}


def find_device_task(name: str) -> DeviceTask:
    """The task of that name.

    Raises:
        ConfigError: no such task; the nearest name is suggested.
    """
    if name not in DEVICE_TASKS:
        guess = nearest(name, DEVICE_TASKS)
        raise ConfigError(
            f"the task {name!r} is not known; expected one of {', '.join(DEVICE_TASKS)}",
            where="task",
            hint=f"did you mean {guess!r}?" if guess else None,
        )
    return DEVICE_TASKS[name]
