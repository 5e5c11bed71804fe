"""A labelled data set turned into model inputs once, and served in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_tcur_runtime.data import Dataset, encode_labels
from edge_tcur_runtime.preprocess import build_preprocessor


@dataclass(frozen=True)
class PreparedData:
    """Model inputs and targets of a whole data set.

    Attributes:
        dataset: where it came from.
        targets: int64 [n].
        spec: the ``preprocessing`` object; text is padded batch by batch, to its buckets.
        root: directory of the tokenizer that `spec` names.
    """

    dataset: Dataset
    targets: np.ndarray
    spec: Mapping[str, Any]
    root: Path

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self, size: int, *, order: np.ndarray | None = None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches of at most `size` samples in `order` (the data's own by default)."""
        preprocess = build_preprocessor(self.spec, self.root)
        indices = np.arange(len(self)) if order is None else order
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            inputs = preprocess(self.dataset.select(chosen).samples)
            yield (
                {name: torch.from_numpy(value) for name, value in inputs.items()},
                torch.from_numpy(self.targets[chosen]),
            )


def prepare(dataset: Dataset, labels: tuple[str, ...], spec: Mapping[str, Any], root: Path) -> PreparedData:
    """Encodes the labels of `dataset` as positions in `labels`.

    Raises:
        DataError: a label that is not in `labels` (file and line named).
    """
    return PreparedData(dataset, encode_labels(dataset, labels), spec, root)
