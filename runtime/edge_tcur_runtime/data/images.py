"""Image data sets: `.npz` files, and folders with one subfolder per class (needs Pillow)."""

from __future__ import annotations

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from edge_tcur_runtime.data.limits import DataLimits
from edge_tcur_runtime.data.targets import LABEL, LABELS, MASKS, NOTHING, VALUES, check_label_list
from edge_tcur_runtime.errors import DataError, MissingEngineError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_FORMATS = ("PNG", "JPEG", "BMP")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# How targets are read -> arrays that hold them, the first of them one a picture.
_ARRAYS = {
    LABEL: ("labels",),
    LABELS: ("labels",),
    VALUES: ("targets",),
    MASKS: ("masks", "names"),
    NOTHING: ("labels",),
}
_ONE = {"labels": "label", "targets": "target", "masks": "mask"}
# Kinds of dtype, numbers of axes, what is expected and what to do.
_TARGETS = {
    "labels": ("iuU", (1,), "[n] integers or strings", "save one integer or string per image"),
    "targets": (
        "iuf",
        (1, 2),
        "[n] or [n, columns] numbers",
        "save the same columns of numbers for each image",
    ),
    "masks": ("iub", (3, 4), "[n, height, width] integers", "save the number of a class for each pixel"),
    "names": ("U", (1,), "[classes] strings", "save one name for each class, in the order of their numbers"),
}
# What zipfile and numpy raise on a damaged archive or array header.
_DAMAGED = (
    ValueError, EOFError, KeyError, TypeError, SyntaxError, NotImplementedError, MemoryError, RecursionError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class ImageRows:
    """What a reader found.

    Attributes:
        images: uint8 or float32 [n, *size] or [n, *size, c], size being (h, w) or, of volumes, (d, h, w).
        labels: [n] class names or label lists, or None.
        places: [n] ``"file.npz[index]"`` or image file name.
        targets: numbers f32 [n, columns] or masks (integers as they are in the file), or None.
        names: of the classes of masks, where the file has them.
    """

    images: np.ndarray
    labels: tuple[str, ...] | None
    places: tuple[str, ...]
    targets: np.ndarray | None = None
    names: tuple[str, ...] = ()


def read_npz(
    path: Path, *, require_labels: bool, limits: DataLimits, reads: str = LABEL, axes: int | None = None
) -> ImageRows:
    """Reads the arrays of a `.npz` file; pickled objects are refused.

    `images` is uint8 or floating (returned as float32), [n, *size] or [n, *size, c]. The targets lie in
    `labels` (n integers or strings), in `targets` (numbers [n] or [n, columns]) or in `masks` (integers
    [n, *size]) with or without `names` (strings, one for each class).

    Args:
        reads: how targets are read; see `edge_tcur_runtime.data.targets`.
        axes: of a picture's size, 2 or 3; None where that is not known yet.

    Raises:
        DataError: unreadable, damaged, wrong shapes or dtypes, counts that differ, NaN or infinity,
            or over a limit (headers are checked before anything is decompressed).
    """
    wanted = ("images", *_ARRAYS[reads])
    try:
        with zipfile.ZipFile(path) as archive:
            members = _check_headers(archive, path, limits, wanted, axes)
            arrays = {name: _read_array(archive, members.get(name)) for name in wanted}
    except OSError as error:
        raise _unreadable(path, error) from error
    except _DAMAGED as error:
        raise _damaged(path, str(error)) from error
    images, target = arrays["images"], arrays[wanted[1]]
    if images is None or (target is None and require_labels):
        raise DataError(
            f"the array {'images' if images is None else wanted[1]!r} is missing",
            where=str(path),
            hint=f"save the file with np.savez(path, images=…, {wanted[1]}=…)",
        )
    places = tuple(f"{path}[{index}]" for index in range(len(images)))
    rows = ImageRows(_plain_pixels(images, places), None, places)
    return rows if target is None else _with_targets(rows, target, arrays.get("names"), reads, path)


def _with_targets(
    rows: ImageRows, target: np.ndarray, names: np.ndarray | None, reads: str, path: Path
) -> ImageRows:
    if len(target) != len(rows.images):
        array = _ARRAYS[reads][0]
        raise DataError(
            f"{len(rows.images)} images but {len(target)} {array}",
            where=str(path),
            hint=f"save one {_ONE[array]} per image",
        )
    if reads == MASKS:
        texts = () if names is None else tuple(str(name) for name in names.tolist())
        return replace(rows, targets=target, names=texts)
    if reads == VALUES:
        return replace(rows, targets=_plain_values(target, rows.places))
    return replace(rows, labels=_label_texts(target, rows.places, reads))


def _plain_values(values: np.ndarray, places: Sequence[str]) -> np.ndarray:
    """f32 [n, columns]."""
    with np.errstate(over="ignore"):
        plain = values.reshape(len(values), -1).astype(np.float32)
    finite = np.isfinite(plain).all(axis=1)
    if not finite.all():
        raise DataError(
            "a target is NaN, infinity or too large for float32",
            where=places[int(np.argmin(finite))],
            hint="repair or remove the sample",
        )
    return plain


def _check_headers(
    archive: zipfile.ZipFile, path: Path, limits: DataLimits, wanted: Sequence[str], axes: int | None
) -> dict[str, zipfile.ZipInfo]:
    """The wanted arrays' members of the archive, their shapes, dtypes and sizes checked by header alone."""
    members = {}
    total = 0
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name not in wanted or name == info.filename:
            continue
        if info.flag_bits & 1 or info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise _damaged(path, "encrypted, or compressed in a way that numpy does not write")
        with archive.open(info) as member:
            shape, dtype = _array_header(member)
        _check_array(name, shape, dtype, path, axes)
        total += max(info.file_size, math.prod(shape) * dtype.itemsize)
        if total > limits.decoded_bytes or shape[0] > limits.samples:
            raise DataError(
                f"{name!r} of shape {list(shape)} is over the limit of {limits.samples} images "
                f"and {limits.decoded_bytes} bytes for a file",
                where=str(path),
                hint="split it into smaller files",
            )
        members[name] = info
    return members


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> np.ndarray | None:
    if info is None:
        return None
    with archive.open(info) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _array_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"array format {version} is not one that holds plain numbers or strings")
    if any(size < 0 for size in shape):
        raise ValueError(f"negative size in the shape {shape}")
    return shape, dtype


def _check_array(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], path: Path, axes: int | None
) -> None:
    where = f"{path}: {name}"
    if name in _TARGETS:
        kinds, allowed, expected, hint = _TARGETS[name]
        if len(shape) not in allowed or dtype.kind not in kinds or 0 in shape[1:]:
            raise DataError(
                f"shape {list(shape)} and dtype {dtype}; expected {expected}", where=where, hint=hint
            )
        return
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise DataError(
            f"dtype {dtype}; expected uint8 or floating point",
            where=where,
            hint='convert the array, for example images.astype("uint8")',
        )
    size = "depth, height, width" if axes == 3 else "height, width"
    allowed = (3, 4, 5) if axes is None else (axes + 1, axes + 2)
    if len(shape) not in allowed or 0 in shape[1:]:
        raise DataError(
            f"shape {list(shape)}; expected [n, {size}] or [n, {size}, channels]",
            where=where,
            hint="reorder or reshape the array: channels come last",
        )
    if shape[0] == 0:
        raise DataError("the data set is empty", where=str(path), hint="add at least one image")


def _label_texts(labels: np.ndarray, places: Sequence[str], reads: str) -> tuple[str, ...]:
    texts = tuple(str(label) for label in labels.tolist())
    if reads == LABELS:
        return tuple(check_label_list(text, place) for text, place in zip(texts, places, strict=True))
    for text, place in zip(texts, places, strict=True):
        if not text.strip():
            raise DataError("the label is empty", where=place, hint="give every image a label")
    return texts


def _plain_pixels(images: np.ndarray, places: Sequence[str]) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    with np.errstate(over="ignore"):
        pixels = images.astype(np.float32, copy=False)
    finite = np.isfinite(pixels).reshape(len(pixels), -1).all(axis=1)
    if not finite.all():
        raise DataError(
            "the image holds NaN, infinity or a value too large for float32",
            where=places[int(np.argmin(finite))],
            hint="repair or remove the image",
        )
    return pixels


def fit_images(
    images: np.ndarray, size: tuple[int, ...] | None, channels: int | None, where: str
) -> np.ndarray:
    """Images of the asked-for size: resized (bilinear, antialiased) where they differ from it.

    Args:
        images: uint8 or float32 [n, *size] or [n, *size, c].
        size: (height, width) in pixels, or (depth, height, width) of volumes, which are not resized; None
            keeps the size.
        channels: number of channels to insist on, or None; they are never converted here.
        where: the file, for messages.

    Raises:
        DataError: another number of channels, or volumes of another size.
        MissingEngineError: another size, and Pillow is not installed.
    """
    axes = 2 if size is None else len(size)
    actual = images.shape[-1] if images.ndim == axes + 2 else 1
    if channels is not None and actual != channels:
        raise DataError(
            f"the images have {actual} channels; expected {channels}",
            where=where,
            hint="convert the array before saving it",
        )
    if size is None or images.shape[1 : axes + 1] == size:
        return images
    if axes == 3:
        raise DataError(
            f"volumes of {'x'.join(map(str, images.shape[1:4]))}; expected {'x'.join(map(str, size))}",
            where=where,
            hint="volumes are not resized: resample or cut them before saving them",
        )
    image_module = _pillow(
        f"resizing images from {images.shape[1]}x{images.shape[2]} to {size[0]}x{size[1]}", where
    )
    planes = images if images.ndim == 4 else images[..., np.newaxis]
    result = np.empty((len(images), *size, actual), images.dtype)
    for index, image in enumerate(planes):
        for channel in range(actual):
            plane = image_module.fromarray(np.ascontiguousarray(image[..., channel]))
            resized = plane.resize((size[1], size[0]), image_module.Resampling.BILINEAR)
            result[index, ..., channel] = np.asarray(resized)
    return result if images.ndim == 4 else result[..., 0]


def read_folder(
    path: Path, *, require_labels: bool, size: tuple[int, int], channels: int, limits: DataLimits
) -> ImageRows:
    """Reads ``<path>/<class>/<image>``, classes and images in the order of their names.

    Without `require_labels` the images may also lie directly in `path`; they then have no labels.
    Photographs are turned upright by their EXIF orientation, converted to `channels` (1 grey,
    3 RGB, 4 RGBA) and resized (bilinear, antialiased). Names that start with a dot and files that
    are no images by their suffix are ignored.

    Args:
        size: (height, width) in pixels.

    Returns:
        Images as uint8 [n, height, width, channels].

    Raises:
        DataError: unreadable, no images, an empty class, images beside class folders, an image that
            cannot be decoded, or over a limit.
        MissingEngineError: Pillow is not installed.
    """
    if channels not in _MODES:
        raise DataError(
            f"{channels} channels; image files give 1, 3 or 4", where=str(path), hint="use a .npz file"
        )
    image_module = _pillow("reading image files", str(path))
    try:
        files, labels = _list_folder(path, require_labels, limits)
    except OSError as error:
        raise _unreadable(path, error) from error
    shape = (len(files), *size, channels)
    if math.prod(shape) > limits.decoded_bytes:
        raise DataError(
            f"{len(files)} images of {size[0]}x{size[1]}x{channels} are over the limit of "
            f"{limits.decoded_bytes} bytes",
            where=str(path),
            hint="use fewer or smaller images",
        )
    images = np.empty(shape, np.uint8)
    for index, file in enumerate(files):
        images[index] = _decode(image_module, file, size, channels, limits)
    return ImageRows(images, labels, tuple(str(file) for file in files))


def _list_folder(
    path: Path, require_labels: bool, limits: DataLimits
) -> tuple[list[Path], tuple[str, ...] | None]:
    loose = _image_files(path, limits.samples)
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if loose and (classes or require_labels):
        raise DataError(
            "the image lies beside the class folders, so it has no label",
            where=str(loose[0]),
            hint="move every image into a folder named after its class",
        )
    files, labels = list(loose), []
    for folder in classes:
        members = _image_files(folder, limits.samples - len(files))
        if not members:
            raise DataError(
                f"the class folder holds no {', '.join(SUFFIXES)} file",
                where=str(folder),
                hint="add images, or remove the folder",
            )
        files += members
        labels += [folder.name] * len(members)
    if not files:
        raise DataError(
            "the data set is empty: there is no class folder with images in it",
            where=str(path),
            hint=f"make one folder per class, with {', '.join(SUFFIXES)} files in it",
        )
    return files, tuple(labels) if labels else None


def _image_files(folder: Path, limit: int) -> list[Path]:
    files: list[Path] = []
    for entry in folder.iterdir():
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file():
            files.append(entry)
        if len(files) > limit:
            raise DataError("more images than the limit", where=str(folder), hint="use fewer images")
    return sorted(files)


def _decode(
    image_module: Any, file: Path, size: tuple[int, int], channels: int, limits: DataLimits
) -> np.ndarray:
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # metadata that Pillow skips; the pixels are what counts
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(file, formats=_FORMATS) as image:
                _check_image(image, file, limits)
                upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
                resized = upright.resize((size[1], size[0]), image_module.Resampling.BILINEAR)
                return np.asarray(resized).reshape(*size, channels)
    except (
        OSError, *_DAMAGED, image_module.DecompressionBombError, image_module.DecompressionBombWarning
    ) as error:  # fmt: skip
        raise DataError(
            f"cannot decode the image: {error}", where=str(file), hint="repair or remove the file"
        ) from error


def _check_image(image: Any, file: Path, limits: DataLimits) -> None:
    if math.prod(image.size) > limits.image_pixels:
        raise DataError(
            f"{image.size[0]}x{image.size[1]} pixels; the limit is {limits.image_pixels} in all",
            where=str(file),
            hint="make the image smaller",
        )
    if image.mode[0] in "IF":
        raise DataError(
            f"the image has more than 8 bits per channel (mode {image.mode})",
            where=str(file),
            hint="save it with 8 bits per channel, or use a .npz file",
        )


def _pillow(purpose: str, where: str) -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingEngineError(
            f"{purpose} needs Pillow, which is not installed",
            where=where,
            hint="install it with: pip install 'edge-tcur-runtime[image]'",
        ) from error
    return Image


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read: {error.strerror or error}",
        where=str(path),
        hint="check the path and its permissions",
    )


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"not a .npz file of plain arrays: {reason}",
        where=str(path),
        hint="write it with np.savez or np.savez_compressed, without objects",
    )
