"""From what the data say to numbers: names of the outputs, encoded targets, and the split."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from edge_tcur_runtime.data.dataset import Dataset
from edge_tcur_runtime.data.targets import (
    LABEL,
    LABELS,
    MASKS,
    NOTHING,
    VALUES,
    check_mask_classes,
    split_labels,
)
from edge_tcur_runtime.errors import DataError, UsageError
from edge_tcur_runtime.formats.schema import nearest

_INTEGER = re.compile(r"-?[0-9]{1,18}")


def _labels_of(dataset: Dataset) -> tuple[str, ...]:
    if dataset.labels is None:
        raise DataError("the data set has no labels", where=dataset.source, hint="label every sample")
    return dataset.labels


def _targets_of(dataset: Dataset) -> np.ndarray:
    if dataset.targets is None:
        raise DataError(
            f"the data set has no {dataset.reads}", where=dataset.source, hint="give every sample its target"
        )
    return dataset.targets


def encode_targets(dataset: Dataset, labels: Sequence[str]) -> np.ndarray:
    """The targets of each sample for outputs that `labels` name.

    Returns:
        ``label``: positions in `labels`, int64 [n]; ``labels``: 0 and 1, f32 [n, labels]; ``values``: f32
        [n, labels]; ``masks``: int64 [n, *size]; ``nothing``: int64 [n, 0].

    Raises:
        DataError: no targets, or a label, column or class that is not in `labels`; it names the place.
    """
    if dataset.reads == LABEL:
        return encode_labels(dataset, labels)
    if dataset.reads == LABELS:
        return _encode_label_lists(dataset, labels)
    if dataset.reads == NOTHING:
        return np.empty((len(dataset), 0), np.int64)
    targets, same = _targets_of(dataset), not dataset.names or tuple(dataset.names) == tuple(labels)
    if dataset.reads == MASKS:
        check_mask_classes(targets, len(labels), dataset.places)
    if not same or (dataset.reads == VALUES and targets.shape[1] != len(labels)):
        raise DataError(
            f"the data have {', '.join(dataset.names)}; the outputs are {', '.join(labels)}",
            where=dataset.source,
            hint="name the same ones in the same order",
        )
    return targets


def encode_labels(dataset: Dataset, labels: Sequence[str]) -> np.ndarray:
    """The position of each sample's label in `labels`, int64 [n].

    Raises:
        DataError: no labels, or a label that is not in `labels`; it names the sample's place.
    """
    known = {label: index for index, label in enumerate(labels)}
    codes = np.empty(len(dataset), np.int64)
    for index, label in enumerate(_labels_of(dataset)):
        if label not in known:
            raise _unknown_label(label, known, dataset.places[index])
        codes[index] = known[label]
    return codes


def _encode_label_lists(dataset: Dataset, labels: Sequence[str]) -> np.ndarray:
    known = {label: index for index, label in enumerate(labels)}
    result = np.zeros((len(dataset), len(labels)), np.float32)
    for index, text in enumerate(_labels_of(dataset)):
        for label in split_labels(text):
            if label not in known:
                raise _unknown_label(label, known, dataset.places[index])
            result[index, known[label]] = 1
    return result


def _unknown_label(label: str, known: dict[str, int], place: str) -> DataError:
    guess = nearest(label, known)
    listed = ", ".join(list(known)[:10]) + (", …" if len(known) > 10 else "")
    return DataError(
        f"unknown label {label!r}",
        where=place,
        hint=f"did you mean {guess!r}?" if guess else f"known labels: {listed}",
    )


def label_names(dataset: Dataset) -> tuple[str, ...]:
    """What the outputs of a model for these data are called.

    Distinct labels come in order: numerically where all are integers, else by code point. The classes of
    masks are called as the file says, else by their numbers; numbers by their columns.

    Raises:
        DataError: the data set has no targets.
    """
    if dataset.reads in (VALUES, NOTHING):
        return dataset.names
    if dataset.reads == MASKS:
        highest = int(_targets_of(dataset).max(initial=0))
        return dataset.names or tuple(map(str, range(highest + 1)))
    names = set(_labels_of(dataset))
    if dataset.reads == LABELS:
        names = {name for text in names for name in split_labels(text)}
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_trainable(dataset: Dataset) -> None:
    """Refuses data that nothing can be learnt from.

    Raises:
        DataError: no samples, no targets, or one class only.
    """
    if len(dataset) == 0:
        raise DataError("the data set is empty", where=dataset.source, hint="add labelled samples")
    if dataset.reads == VALUES:
        _targets_of(dataset)
        return
    names = label_names(dataset)
    if dataset.reads == LABELS and not names:
        raise DataError("no sample has a label", where=dataset.source, hint="label some of the samples")
    if dataset.reads == LABEL and len(names) < 2:
        raise DataError(
            f"every sample has the label {names[0]!r}; training needs at least two classes",
            where=dataset.source,
            hint="add samples of another class",
        )
    if dataset.reads == MASKS and len(np.unique(_targets_of(dataset))) < 2:
        raise DataError(
            "every pixel has the same class; training needs at least two",
            where=dataset.source,
            hint="add masks that mark something",
        )


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits into training and held-out samples; both keep the order.

    ``round(n * fraction)`` samples are held out (at least one for a fraction above 0). With one label a
    sample they are shared out among the classes by largest remainder: every class keeps at least one
    training sample, so a class of one sample stays in training whole, and fewer may be held out than asked
    for. With other targets they are drawn at random.

    Args:
        fraction: share to hold out, ``0 <= fraction < 1``.
        seed: of numpy's PCG64, at least 0; the same seed gives the same split.

    Raises:
        UsageError: a fraction or seed out of range.
        DataError: the data set has no labels.
    """
    if not 0 <= fraction < 1 or seed < 0:
        raise UsageError(
            f"cannot split with fraction {fraction} and seed {seed}",
            hint="the fraction must be at least 0 and below 1, and the seed at least 0",
        )
    if dataset.reads == LABEL:
        codes = encode_labels(dataset, label_names(dataset))
    else:
        codes = np.zeros(len(dataset), np.int64)
    counts = np.bincount(codes)
    generator = np.random.Generator(np.random.PCG64(seed))
    held_out = np.zeros(len(dataset), dtype=bool)
    for code, count in enumerate(_held_out_counts(counts, fraction)):
        members = generator.permutation(np.flatnonzero(codes == code))
        held_out[members[:count]] = True
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _held_out_counts(counts: np.ndarray, fraction: float) -> list[int]:
    quotas = counts * fraction
    held = np.minimum(np.floor(quotas).astype(np.int64), counts - 1)
    wanted = max(round(int(counts.sum()) * fraction), 1 if fraction > 0 else 0)
    missing = wanted - int(held.sum())
    for index in np.argsort(held - quotas, kind="stable"):
        if missing > 0 and held[index] < counts[index] - 1:
            held[index] += 1
            missing -= 1
    return [int(count) for count in held]
