"""The reference set of a bundle: samples on which a device's new adapter must not fall behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from edge_tcur.data import PreparedData, in_batches, prepare
from edge_tcur.errors import ExportError
from edge_tcur.models import Base
from edge_tcur.tasks import Task, find_task
from edge_tcur.training.run import Run
from edge_tcur.training.train import read_data
from edge_tcur_export.cases import adapted
from edge_tcur_export.quantization import held_out_samples
from edge_tcur_export.settings import ReferenceSettings
from edge_tcur_runtime.data import Dataset, split
from edge_tcur_runtime.errors import DataError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import MAX_REFERENCE_BYTES, ReferenceSpec
from edge_tcur_runtime.reference import reference_tensors
from edge_tcur_runtime.tasks import mean_by_weight
from edge_tcur_runtime.units import format_size

FILE = "reference.safetensors"
_BATCH = 64


def write_reference(
    base: Base, run: Run, adapter: Adapter, work: Path, settings: ReferenceSettings
) -> ReferenceSpec:
    """Writes encoded samples to `work` and scores what a device's adapter is measured by.

    Args:
        base: as it goes into the bundle, quantised where that is asked for.
        work: the bundle; holds the tokenizer.

    Raises:
        DataError: no samples, or unusable ones; without data of their own, the run's held-out samples cannot
            be had.
        ExportError: the file would be larger than a device reads.
    """
    task = find_task(run.config.task)
    data = _samples(base, run, work, task, settings)
    inputs, _ = data.take(np.arange(len(data)))
    tensors = reference_tensors({name: value.numpy() for name, value in inputs.items()}, data.targets)
    content = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    if len(content) > MAX_REFERENCE_BYTES:
        raise ExportError(
            f"{len(data)} reference samples take {format_size(len(content))}; a device reads at most "
            f"{format_size(MAX_REFERENCE_BYTES)}",
            hint="use a smaller --reference-samples",
        )
    (work / FILE).write_bytes(content)
    if base.head_parameters():  # of the base it is a head that nobody trained
        with adapted(base, run, adapter):
            return ReferenceSpec(FILE, len(data), "adapter", *_score(base, data, task))
    return ReferenceSpec(FILE, len(data), "base", *_score(base, data, task))


def _samples(base: Base, run: Run, work: Path, task: Task, settings: ReferenceSettings) -> PreparedData:
    if settings.data is not None:
        dataset = read_data(str(settings.data), task, run.config, base=base)
    else:
        found, note = held_out_samples(base, run)
        if found is None:
            raise DataError(
                f"no reference set can be taken from the run: {note}", hint="name a file: --reference DATA"
            )
        dataset = found.dataset
    if not len(dataset):
        raise DataError("the reference set is empty", where=dataset.source, hint="add labelled samples")
    return prepare(_some(dataset, settings.samples), run.labels, base.preprocessing, work, task)


def _some(dataset: Dataset, count: int) -> Dataset:
    """`count` samples at most, shared out among the classes, always the same ones."""
    return dataset if len(dataset) <= count else split(dataset, count / len(dataset), seed=0)[1]


def _score(base: Base, data: PreparedData, task: Task) -> tuple[float, float]:
    """Metric and mean loss."""
    metrics, losses, weights = [], [], []
    with torch.no_grad():
        for inputs, targets in in_batches(data, _BATCH):
            outputs = base.model(**inputs)
            metrics.append(task.measure(outputs, targets).item())
            losses.append(task.loss(outputs, targets).item())
            weights.append(task.weight(targets.numpy()))
    return mean_by_weight(metrics, weights), mean_by_weight(losses, weights)
