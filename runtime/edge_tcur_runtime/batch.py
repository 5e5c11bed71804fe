"""Samples of a data set as a model takes them, a few at a time, with what a plan must know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.preprocess import Preprocessor
from edge_tcur_runtime.tasks import DeviceTask


@dataclass(frozen=True)
class Batch:
    """Encoded samples: preprocessing of any part of a data set, and its targets."""

    dataset: Dataset
    targets: np.ndarray
    preprocess: Preprocessor
    task: DeviceTask

    def take(self, indices: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """Model inputs and targets of the samples at `indices`."""
        inputs = self.preprocess(self.dataset.select(indices).samples)
        return inputs, self.task.batch_targets(self.targets[indices], inputs)

    def longest_first(self) -> np.ndarray:
        """Indices of the samples, the ones that need most memory first."""
        samples = self.dataset.samples
        if isinstance(samples, np.ndarray):  # pictures are all of one size
            return np.arange(len(samples))
        return np.argsort([-len(text) for text in samples], kind="stable")

    @cached_property
    def elements(self) -> int:
        """Numbers that its longest sample feeds to the model."""
        inputs, _ = self.take(self.longest_first()[:1])
        return sum(value.size for value in inputs.values())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample as it is padded, int64 [n]; zeros where samples have no length."""
        return self._survey[0]

    @cached_property
    def picked(self) -> dict[str, np.ndarray]:
        """Model input -> the numbers in it, each once and sorted, over all samples."""
        return self._survey[1]

    @cached_property
    def _survey(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        lengths, picked = np.zeros(len(self.targets), np.int64), dict[str, np.ndarray]()
        if isinstance(self.dataset.samples, np.ndarray):
            return lengths, picked
        for place in range(len(lengths)):
            for name, value in self.preprocess(self.dataset.samples[place : place + 1]).items():
                lengths[place] = value.shape[1]
                picked[name] = np.union1d(picked[name], value) if name in picked else np.unique(value)
        return lengths, picked
