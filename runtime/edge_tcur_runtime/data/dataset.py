"""One data set in memory, and loading it."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_tcur_runtime.data.images import ImageRows, fit_images, read_folder, read_npz
from edge_tcur_runtime.data.limits import DEFAULT_LIMITS, DataLimits
from edge_tcur_runtime.data.targets import (
    LABEL,
    MASKS,
    NOTHING,
    READS,
    VALUES,
    plain_masks,
    resize_masks,
)
from edge_tcur_runtime.data.text import Columns, read_csv, read_jsonl
from edge_tcur_runtime.errors import DataError, UsageError

KINDS = ("text", "image")
_ACCEPTED = "text: .csv or .jsonl; image: .npz, or a folder with one folder per class"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples, their labels and where each came from.

    Attributes:
        kind: ``"text"`` or ``"image"``.
        samples: n strings, or uint8 / float32 images [n, *size] or [n, *size, c], size being (h, w) or, of
            volumes, (d, h, w).
        labels: [n] class names or label lists, or None where the data have no labels.
        source: the file or folder it was read from.
        places: [n] ``"file:line"``, ``"file.npz[index]"`` or image file name, for messages.
        targets: numbers f32 [n, columns] or masks int64 [n, *size], or None.
        reads: how targets are read; see `edge_tcur_runtime.data.targets`.
        names: of the columns of numbers, or of the classes of masks (empty where the data do not name them).
    """

    kind: str
    samples: Sequence[str] | np.ndarray
    labels: tuple[str, ...] | None
    source: str
    places: tuple[str, ...]
    targets: np.ndarray | None = None
    reads: str = LABEL
    names: tuple[str, ...] = ()

    @property
    def has_targets(self) -> bool:
        """Whether there is something that answers can be compared with."""
        return self.reads == NOTHING or self.labels is not None or self.targets is not None

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
        return replace(
            self,
            samples=samples,
            labels=labels,
            places=tuple(self.places[index] for index in chosen),
            targets=None if self.targets is None else self.targets[chosen],
        )


@dataclass(frozen=True)
class Layout:
    """What a data set holds, and how it is read.

    Attributes:
        kind: ``"text"`` or ``"image"``.
        reads: how targets are read; see `edge_tcur_runtime.data.targets`.
        text_column: name of the column or JSON key of the text.
        label_column: of the label; of ``values`` the names of all columns, separated by commas (pictures
            have the columns of one array, in this order).
        require_labels: refuse samples without a target. Without it, targets are kept only where
            every sample has one.
        image_size: (height, width) in pixels to resize to, or (depth, height, width) of volumes; a folder
            needs it.
        channels: number of channels; a folder needs it, a `.npz` file is checked against it.

    Raises:
        UsageError: an unknown kind or form of targets, or columns that are not named once each.
    """

    kind: str
    reads: str = LABEL
    text_column: str = "text"
    label_column: str = "label"
    require_labels: bool = True
    image_size: tuple[int, ...] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"unknown kind of data {self.kind!r}", hint=f"expected one of {', '.join(KINDS)}"
            )
        if self.reads not in READS or (self.kind == "text" and self.reads == MASKS):
            raise UsageError(f"{self.kind} data are not read with {self.reads!r} as targets")
        if not all(self.columns) or len(set(self.columns)) != len(self.columns):
            raise UsageError(
                f"the columns {self.label_column!r} are not names, each given once",
                where="--label-column",
                hint="separate the names of the columns with commas",
            )

    @property
    def required(self) -> bool:
        """Whether every sample must have a target."""
        return self.require_labels and self.reads != NOTHING

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold targets."""
        if self.reads == NOTHING:
            return ()
        if self.reads != VALUES:
            return (self.label_column,)
        return tuple(name.strip() for name in self.label_column.split(","))


def load_dataset(
    path: Path,
    kind: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    require_labels: bool = True,
    image_size: tuple[int, ...] | None = None,
    channels: int | None = None,
    limits: DataLimits = DEFAULT_LIMITS,
) -> Dataset:
    """Reads a data set with one label a sample; see `read_dataset`."""
    layout = Layout(
        kind,
        text_column=text_column,
        label_column=label_column,
        require_labels=require_labels,
        image_size=image_size,
        channels=channels,
    )
    return read_dataset(path, layout, limits)


def read_dataset(path: Path, layout: Layout, limits: DataLimits = DEFAULT_LIMITS) -> Dataset:
    """Reads a data set whole.

    Args:
        path: for text a `.csv` or `.jsonl` file; for images a `.npz` file or a folder.
        layout: what it holds.
        limits: bounds on what is read.

    Raises:
        DataError: a path that cannot be read or data that cannot be used; it names the line.
        MissingEngineError: image files, or resizing, without Pillow.
    """
    suffix = _check_path(path, layout.kind)
    if layout.kind == "text":
        columns = Columns(layout.text_column, layout.columns, layout.reads, layout.required)
        rows = (read_csv if suffix == ".csv" else read_jsonl)(path, columns, limits)
        names = layout.columns if layout.reads == VALUES else ()
        return Dataset(
            layout.kind, rows.samples, rows.labels, str(path), rows.places, rows.values, layout.reads, names
        )
    if suffix == ".npz":
        axes = None if layout.image_size is None else len(layout.image_size)
        images = read_npz(path, require_labels=layout.required, limits=limits, reads=layout.reads, axes=axes)
        return _fit(images, layout, path)
    return _load_folder(path, layout, limits)


def _load_folder(path: Path, layout: Layout, limits: DataLimits) -> Dataset:
    if layout.required and layout.reads != LABEL:
        raise DataError(
            f"a folder of images gives one label an image; the task takes {layout.reads}",
            where=str(path),
            hint="use a .npz file",
        )
    if layout.image_size is None or layout.channels is None:
        raise DataError(
            "a folder of images needs the size and the number of channels to read them with",
            where=str(path),
            hint="state both, for example image_size=(32, 32) and channels=3",
        )
    if len(layout.image_size) != 2:
        raise DataError(
            "a folder holds pictures; the model takes volumes", where=str(path), hint="use a .npz file"
        )
    size = (layout.image_size[0], layout.image_size[1])
    rows = read_folder(
        path, require_labels=layout.required, size=size, channels=layout.channels, limits=limits
    )
    labels = rows.labels if layout.reads == LABEL else None
    return Dataset(layout.kind, rows.images, labels, str(path), rows.places, reads=layout.reads)


def _fit(rows: ImageRows, layout: Layout, path: Path) -> Dataset:
    """The rows of a `.npz` file with pictures, and masks, of the asked-for size."""
    size, reads, targets, names = layout.image_size, layout.reads, rows.targets, rows.names
    pixels = fit_images(rows.images, size, layout.channels, str(path))
    if targets is not None and reads == VALUES:
        names = layout.columns
        if targets.shape[1] != len(names):
            raise DataError(
                f"the array 'targets' has {targets.shape[1]} columns; {len(names)} are named: "
                f"{', '.join(names)}",
                where=str(path),
                hint="name all of them, separated by commas, with --label-column",
            )
    if targets is not None and reads == MASKS and size is not None:
        targets = plain_masks(targets, rows.images.shape[1 : len(size) + 1], rows.places, str(path))
        if len(size) == 2 and targets.shape[1:] != size:
            targets = resize_masks(targets, (size[0], size[1]))
    return Dataset(layout.kind, pixels, rows.labels, str(path), rows.places, targets, reads, names)


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
