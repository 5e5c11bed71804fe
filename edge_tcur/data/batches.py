"""A labelled data set turned into model inputs once, and served in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from edge_tcur.tasks import Task
from edge_tcur_runtime.data import Dataset, encode_targets
from edge_tcur_runtime.preprocess import Preprocessor, build_preprocessor


class Samples(Protocol):
    """Model inputs and targets by sample number, as the training loop reads them."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and targets of the samples at `indices`, in that order."""
        ...


def in_batches(data: Samples, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of at most `size` samples, in the data's order."""
    for start in range(0, len(data), size):
        yield data.take(np.arange(start, min(start + size, len(data))))


@dataclass(frozen=True)
class PreparedData:
    """Model inputs and targets of a whole data set.

    Attributes:
        dataset: where it came from.
        targets: as `edge_tcur_runtime.data.encode_targets` gives them, one a sample.
        task: makes a batch's targets of them.
        spec: the ``preprocessing`` object; text is padded batch by batch, to its buckets.
        root: directory of the tokenizer that `spec` names.
    """

    dataset: Dataset
    targets: np.ndarray
    task: Task
    spec: Mapping[str, Any]
    root: Path

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and targets of the samples at `indices`, in that order."""
        inputs = self._preprocess(self.dataset.select(indices).samples)
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return tensors, torch.from_numpy(self.task.batch_targets(self.targets[indices], inputs))

    @cached_property
    def _preprocess(self) -> Preprocessor:
        return build_preprocessor(self.spec, self.root)


def prepare(
    dataset: Dataset, labels: tuple[str, ...], spec: Mapping[str, Any], root: Path, task: Task
) -> PreparedData:
    """Encodes the targets of `dataset` for outputs that `labels` name.

    Raises:
        DataError: a label that is not in `labels` (file and line named).
    """
    return PreparedData(dataset, encode_targets(dataset, labels), task, spec, root)
