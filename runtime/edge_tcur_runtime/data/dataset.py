"""One data set in memory: loading, labels, and the split into training and held-out samples."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_tcur_runtime.data.images import fit_images, read_folder, read_npz
from edge_tcur_runtime.data.limits import DEFAULT_LIMITS, DataLimits
from edge_tcur_runtime.data.text import Columns, read_csv, read_jsonl
from edge_tcur_runtime.errors import DataError, UsageError
from edge_tcur_runtime.formats.schema import nearest

KINDS = ("text", "image")
_ACCEPTED = "text: .csv or .jsonl; image: .npz, or a folder with one folder per class"
_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples, their labels and where each came from.

    Attributes:
        kind: ``"text"`` or ``"image"``.
        samples: n strings, or uint8 / float32 images [n, h, w] or [n, h, w, c].
        labels: [n] class names, or None where the data have no labels.
        source: the file or folder it was read from.
        places: [n] ``"file:line"``, ``"file.npz[index]"`` or image file name, for messages.
    """

    kind: str
    samples: Sequence[str] | np.ndarray
    labels: tuple[str, ...] | None
    source: str
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The samples at `indices` (integers [m]), in that order."""
        chosen = np.asarray(indices, dtype=np.int64).tolist()
        samples: Sequence[str] | np.ndarray
        if isinstance(self.samples, np.ndarray):
            samples = self.samples[chosen]
        else:
            samples = tuple(self.samples[index] for index in chosen)
        labels = None if self.labels is None else tuple(self.labels[index] for index in chosen)
        return Dataset(self.kind, samples, labels, self.source, tuple(self.places[index] for index in chosen))


def load_dataset(
    path: Path,
    kind: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    require_labels: bool = True,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limits: DataLimits = DEFAULT_LIMITS,
) -> Dataset:
    """Reads a data set whole.

    Args:
        path: for text a `.csv` or `.jsonl` file; for images a `.npz` file or a folder.
        kind: ``"text"`` or ``"image"``.
        text_column, label_column: names of the columns or JSON keys (text only).
        require_labels: refuse samples without a label. Without it, labels are kept only where
            every sample has one.
        image_size: (height, width) in pixels to resize to; a folder needs it.
        channels: number of channels; a folder needs it, a `.npz` file is checked against it.
        limits: bounds on what is read.

    Raises:
        UsageError: an unknown kind.
        DataError: a path that cannot be read or data that cannot be used; it names the line.
        MissingEngineError: image files, or resizing, without Pillow.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of data {kind!r}", hint=f"expected one of {', '.join(KINDS)}")
    suffix = _check_path(path, kind)
    if kind == "text":
        read = read_csv if suffix == ".csv" else read_jsonl
        rows = read(path, Columns(text_column, label_column, require_labels), limits)
        return Dataset(kind, rows.samples, rows.labels, str(path), rows.places)
    if suffix == ".npz":
        images = read_npz(path, require_labels=require_labels, limits=limits)
        pixels = fit_images(images.images, image_size, channels, str(path))
        return Dataset(kind, pixels, images.labels, str(path), images.places)
    if image_size is None or channels is None:
        raise DataError(
            "a folder of images needs the size and the number of channels to read them with",
            where=str(path),
            hint="state both, for example image_size=(32, 32) and channels=3",
        )
    images = read_folder(
        path, require_labels=require_labels, size=image_size, channels=channels, limits=limits
    )
    return Dataset(kind, images.images, images.labels, str(path), images.places)


def _check_path(path: Path, kind: str) -> str:
    """The suffix that decides the reader: ``.csv``, ``.jsonl``, ``.npz`` or ``""`` for a folder."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}", where=str(path), hint="check the path and its permissions"
        ) from error
    suffix = "" if stat.S_ISDIR(mode) else path.suffix.lower()
    if suffix not in ((".csv", ".jsonl") if kind == "text" else (".npz", "")) or (
        suffix == "" and not stat.S_ISDIR(mode)
    ):
        what = "a folder" if stat.S_ISDIR(mode) else f"the extension {suffix!r}"
        raise DataError(f"{what} is not a form of {kind} data", where=str(path), hint=_ACCEPTED)
    if suffix and not stat.S_ISREG(mode):
        raise DataError("not a regular file", where=str(path), hint="copy the data into a file first")
    return suffix


def _labels_of(dataset: Dataset) -> tuple[str, ...]:
    if dataset.labels is None:
        raise DataError("the data set has no labels", where=dataset.source, hint="label every sample")
    return dataset.labels


def encode_labels(dataset: Dataset, labels: Sequence[str]) -> np.ndarray:
    """The position of each sample's label in `labels`, int64 [n].

    Raises:
        DataError: no labels, or a label that is not in `labels`; it names the sample's place.
    """
    known = {label: index for index, label in enumerate(labels)}
    codes = np.empty(len(dataset), np.int64)
    for index, label in enumerate(_labels_of(dataset)):
        if label not in known:
            guess = nearest(label, known)
            listed = ", ".join(list(known)[:10]) + (", …" if len(known) > 10 else "")
            raise DataError(
                f"unknown label {label!r}",
                where=dataset.places[index],
                hint=f"did you mean {guess!r}?" if guess else f"known labels: {listed}",
            )
        codes[index] = known[label]
    return codes


def label_names(dataset: Dataset) -> tuple[str, ...]:
    """The distinct labels in order: numerically where all are integers, else by code point.

    Raises:
        DataError: the data set has no labels.
    """
    names = set(_labels_of(dataset))
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_trainable(dataset: Dataset) -> None:
    """Refuses data that nothing can be learnt from.

    Raises:
        DataError: no samples, no labels, or one class only.
    """
    if len(dataset) == 0:
        raise DataError("the data set is empty", where=dataset.source, hint="add labelled samples")
    names = label_names(dataset)
    if len(names) < 2:
        raise DataError(
            f"every sample has the label {names[0]!r}; training needs at least two classes",
            where=dataset.source,
            hint="add samples of another class",
        )


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits into training and held-out samples, stratified by label; both keep the order.

    ``round(n * fraction)`` samples are held out (at least one for a fraction above 0), shared out
    among the classes by largest remainder. Every class keeps at least one training sample, so a
    class of one sample stays in training whole, and fewer may be held out than asked for.

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
    codes = encode_labels(dataset, label_names(dataset))
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
