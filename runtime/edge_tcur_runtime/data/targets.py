"""How the targets of a data set are read, one form for all kinds of files.

``label``    one class name
``labels``   any number of names, separated by ``|`` (`SEPARATOR`); nothing is no label
``values``   one number for each of the named columns
``masks``    a class number for every pixel of a picture
``nothing``  no targets: a language model's are the text itself
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_tcur_runtime.errors import DataError

LABEL, LABELS, VALUES, MASKS, NOTHING = READS = ("label", "labels", "values", "masks", "nothing")
SEPARATOR = "|"
_LARGEST = float(np.finfo(np.float32).max)


def no_target(column: str, where: str) -> DataError:
    """The error of a row whose target is empty."""
    return DataError(
        f"the row has no label in the column {column!r}",
        where=where,
        hint="remove the row, or fill the column in",
    )


def parse_values(cells: Sequence[str | None], columns: Sequence[str], where: str) -> tuple[float, ...]:
    """The numbers of a row.

    Args:
        cells: one text for each of `columns`.
        where: the row, for messages.

    Raises:
        DataError: an empty cell, no number, NaN, infinity, or beyond float32; it names the column.
    """
    result = []
    for cell, column in zip(cells, columns, strict=True):
        if cell is None or not cell.strip():
            raise no_target(column, where)
        try:
            value = float(cell) if cell.isascii() and "_" not in cell else math.nan
        except ValueError:
            value = math.nan
        if not abs(value) <= _LARGEST:
            raise DataError(
                f"{cell!r} in the column {column!r} is not a finite number",
                where=where,
                hint="write a number such as 3.5 or -1e3, with a point and no unit",
            )
        result.append(value)
    return tuple(result)


def split_labels(text: str) -> tuple[str, ...]:
    """The names in a label list; spaces around a separator belong to the names."""
    return tuple(text.split(SEPARATOR)) if text.strip() else ()


def check_label_list(text: str, where: str) -> str:
    """A label list as it stands, once its names are known to be whole.

    Raises:
        DataError: an empty name, or a name twice.
    """
    names = split_labels(text)
    if any(not name.strip() for name in names):
        raise DataError(
            f"a label in {text!r} is empty",
            where=where,
            hint=f"write names with one {SEPARATOR} between two of them",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the label {twice!r} is named twice", where=where, hint="name each label once")
    return text if names else ""


def join_labels(names: Sequence[str], where: str) -> str:
    """A label list from its names.

    Raises:
        DataError: a name that is empty or holds the separator.
    """
    for name in names:
        if SEPARATOR in name or not name.strip():
            raise DataError(
                f"the label {name!r} is empty or holds {SEPARATOR!r}, which separates labels",
                where=where,
                hint="rename the label",
            )
    return SEPARATOR.join(names)


def plain_masks(masks: np.ndarray, space: tuple[int, ...], places: Sequence[str], where: str) -> np.ndarray:
    """Masks as int64 [n, *space].

    Args:
        masks: integers [n, *space].
        space: of the pictures.
        places: of the pictures, for messages.
        where: the file, for messages.

    Raises:
        DataError: another shape, or a negative class.
    """
    if masks.shape != (len(places), *space):
        raise DataError(
            f"masks of shape {list(masks.shape)}; expected {[len(places), *space]}, a class for every pixel",
            where=where,
            hint="save one mask per image, of the image's own size and without channels",
        )
    flat = masks.reshape(len(masks), -1)
    lowest = flat.min(axis=1)
    if (lowest < 0).any():
        index = int(np.argmax(lowest < 0))
        raise DataError(
            f"the mask holds the class {lowest[index]}; classes are numbered from 0",
            where=places[index],
            hint="give pixels that belong to no part the class 0",
        )
    return masks.astype(np.int64)


def check_mask_classes(masks: np.ndarray, classes: int, places: Sequence[str]) -> None:
    """Refuses masks with classes that there are not.

    Args:
        masks: int64 [n, *space].
        classes: how many there are.

    Raises:
        DataError: a class of `classes` or above; it names the picture.
    """
    highest = masks.reshape(len(masks), -1).max(axis=1)
    if (highest >= classes).any():
        index = int(np.argmax(highest >= classes))
        raise DataError(
            f"the mask holds the class {highest[index]}; the classes are 0 to {classes - 1}",
            where=places[index],
            hint="name every class in the array 'names', or repair the mask",
        )


def resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks [n, h, w] in another size (height, width): each pixel the class of the one nearest to it."""
    rows, columns = (
        (np.arange(new) + 0.5) * old // new for new, old in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows.astype(np.int64)][:, :, columns.astype(np.int64)]
