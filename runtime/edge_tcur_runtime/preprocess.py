"""Raw samples to model inputs, as the manifest's `preprocessing` object says.

Training and the device use this one module, so both tokenise and scale alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_tcur_runtime.errors import DataError, FileFormatError, MissingEngineError
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.bundle import MANIFEST, FileEntry
from edge_tcur_runtime.formats.content import read_content
from edge_tcur_runtime.formats.schema import Fields

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_SIDE = 2**14  # pixels of an image's height or width
MAX_CHANNELS = 2**10
MAX_TOKENS = 2**17  # tokens of one sample
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Preprocessor(Protocol):
    """Turns raw samples into the model's inputs."""

    def __call__(self, samples: Sequence[str] | np.ndarray) -> dict[str, np.ndarray]:
        """The model's inputs for n samples.

        Args:
            samples: n strings, or an array of n images.

        Returns:
            Input name -> array whose first axis is n.

        Raises:
            DataError: samples of another kind, size or dtype than the model takes.
        """


@dataclass(frozen=True)
class ImagePreprocessor:
    """Scales images to float32 [n, c, *size]: ``(x * scale - mean) / std``.

    Attributes:
        input: name of the model's input.
        size: (height, width) in pixels, or (depth, height, width) of a volume.
        mean, std: one value per channel, applied after `scale`.
    """

    input: str
    size: tuple[int, ...]
    channels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, samples: Sequence[str] | np.ndarray) -> dict[str, np.ndarray]:
        """Model inputs of uint8 or floating images [n, *size] (one channel) or [n, *size, c].

        Raises:
            DataError: no such array, another size or number of channels, NaN or infinity.
        """
        if not isinstance(samples, np.ndarray) or not (
            samples.dtype == np.uint8 or samples.dtype.kind == "f"
        ):
            actual = samples.dtype if isinstance(samples, np.ndarray) else type(samples).__name__
            raise DataError(
                f"expected images as an array of uint8 or floating point, not {actual}",
                hint="this model takes images",
            )
        axes = len(self.size)
        images = samples[..., np.newaxis] if samples.ndim == axes + 1 else samples
        expected = (*self.size, self.channels)
        if images.ndim != axes + 2 or images.shape[1:] != expected:
            raise DataError(
                f"images of shape {list(samples.shape)}; expected [n, {', '.join(map(str, expected))}]"
                f"{' or without the last axis' if self.channels == 1 else ''}",
                hint=f"resize the images to {'x'.join(map(str, self.size))} with {self.channels} channels",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            pixels = np.moveaxis(images, -1, 1).astype(np.float32, order="C")
            pixels *= np.float32(self.scale)
            pixels -= np.asarray(self.mean, np.float32).reshape(-1, *[1] * axes)
            pixels /= np.asarray(self.std, np.float32).reshape(-1, *[1] * axes)
        if not np.isfinite(pixels).all():
            raise DataError("the images hold NaN, infinity or values too large", hint="repair the images")
        return {self.input: pixels}


@dataclass(frozen=True)
class TextPreprocessor:
    """Tokenises text to int64 [n, length], `length` being the smallest bucket that holds the batch.

    Attributes:
        tokenizer: truncates to the last bucket and does not pad.
        pad_id: token that fills `input_ids`; the other inputs are filled with 0.
        inputs: names out of `TEXT_INPUTS`, in the model's order.
        buckets: increasing lengths in tokens; the last is the longest sample allowed.
    """

    tokenizer: Tokenizer
    pad_id: int
    inputs: tuple[str, ...]
    buckets: tuple[int, ...]

    def __call__(self, samples: Sequence[str] | np.ndarray) -> dict[str, np.ndarray]:
        """Model inputs of n strings; what is longer than the last bucket is cut, special tokens kept.

        Raises:
            DataError: samples that are no strings or no Unicode text, or that give no token.
        """
        texts = _checked_texts(samples)
        try:
            encodings = self.tokenizer.encode_batch(texts)
        except Exception as error:  # tokenizers raises nothing more specific
            raise DataError(
                f"the tokenizer fails on the batch: {error}", hint="check the bundle's tokenizer"
            ) from error
        lengths = [len(encoding) for encoding in encodings]
        if 0 in lengths:
            raise DataError(
                f"sample {lengths.index(0)} of the batch gives no token",
                hint="remove samples without words",
            )
        longest = max(lengths, default=0)
        size = next(bucket for bucket in self.buckets if bucket >= longest)
        return {name: self._padded(name, encodings, size) for name in self.inputs}

    def _padded(self, name: str, encodings: Sequence[Encoding], size: int) -> np.ndarray:
        fill = self.pad_id if name == "input_ids" else 0
        result = np.full((len(encodings), size), fill, np.int64)
        for row, encoding in zip(result, encodings, strict=True):
            row[: len(encoding)] = _values(name, encoding)
        return result


def _values(name: str, encoding: Encoding) -> Sequence[int]:
    if name == "input_ids":
        return encoding.ids
    return encoding.attention_mask if name == "attention_mask" else encoding.type_ids


def _checked_texts(samples: Sequence[str] | np.ndarray) -> list[str]:
    if isinstance(samples, (str, bytes)):
        raise DataError("expected a list of texts, not one text", hint="put it into a list")
    texts = list(samples)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"sample {index} of the batch is {type(text).__name__}, not text",
                hint="this model takes text",
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"sample {index} of the batch is not Unicode text: {error.reason}", hint="use UTF-8"
            ) from error
    return texts


def build_preprocessor(
    spec: Mapping[str, Any], root: Path, files: Mapping[str, FileEntry] | None = None
) -> Preprocessor:
    """The preprocessor that a manifest's `preprocessing` object describes.

    Args:
        spec: ``{"kind": "image", "input", "height", "width", "channels", "scale", "mean", "std"}``, with
            ``"depth"`` for volumes, or ``{"kind": "text", "tokenizer", "max_length", "pad_id", "inputs",
            "buckets"}``.
        root: directory that holds the tokenizer's file.
        files: entries of the bundle's manifest, which that file must match; None where it is of no bundle.

    Raises:
        IntegrityError: it does not match.
        FileFormatError: unknown, missing or wrong fields, or a file that is no tokenizer.
        BadInputError: the tokenizer's file cannot be read.
        MissingEngineError: text, and `tokenizers` is not installed.
    """
    fields = Fields(spec, f"{root / MANIFEST}: preprocessing")
    if fields.choice("kind", ("image", "text")) == "image":
        return _build_image(fields)
    return _build_text(fields, root, files)


def image_size(spec: Mapping[str, Any]) -> tuple[int, ...]:
    """(height, width) of a checked image `spec`, or (depth, height, width)."""
    return tuple(int(spec[name]) for name in ("depth", "height", "width") if name in spec)


def _build_image(fields: Fields) -> ImagePreprocessor:
    fields.only("kind", "input", "depth", "height", "width", "channels", "scale", "mean", "std")
    sides = ("depth", "height", "width") if "depth" in fields.mapping_keys() else ("height", "width")
    channels = fields.integer("channels", low=1, high=MAX_CHANNELS)
    scale = fields.number("scale")
    if not math.isfinite(scale):
        raise FileFormatError(f"the field 'scale' is {scale}; expected a finite number", where=fields.where)
    std = _numbers(fields, "std", channels)
    if min(std) <= 0:
        raise FileFormatError("the field 'std' must hold numbers above 0", where=fields.where)
    return ImagePreprocessor(
        input=fields.text("input"),
        size=tuple(fields.integer(name, low=1, high=MAX_SIDE) for name in sides),
        channels=channels,
        scale=scale,
        mean=_numbers(fields, "mean", channels),
        std=std,
    )


def _numbers(fields: Fields, key: str, count: int) -> tuple[float, ...]:
    values = fields.items(key)
    plain = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if len(values) != count or not plain or not all(math.isfinite(value) for value in values):
        raise FileFormatError(
            f"the field {key!r} must hold {count} finite numbers, one per channel", where=fields.where
        )
    return tuple(float(value) for value in values)


def _build_text(fields: Fields, root: Path, files: Mapping[str, FileEntry] | None) -> TextPreprocessor:
    fields.only("kind", "tokenizer", "max_length", "pad_id", "inputs", "buckets")
    name = fields.text("tokenizer")
    if not name or name in {".", ".."} or any(mark in name for mark in "/\\\0"):
        raise FileFormatError(
            f"the field 'tokenizer' is {name!r}; expected the name of a file in the bundle",
            where=fields.where,
        )
    max_length = fields.integer("max_length", low=1, high=MAX_TOKENS)
    inputs = fields.texts("inputs")
    if "input_ids" not in inputs or len(set(inputs)) != len(inputs) or set(inputs) - set(TEXT_INPUTS):
        raise FileFormatError(
            f"the field 'inputs' is {list(inputs)}; expected 'input_ids' and others of "
            f"{', '.join(TEXT_INPUTS)}, each once",
            where=fields.where,
        )
    return TextPreprocessor(
        tokenizer=load_tokenizer(root / name, max_length, files),
        pad_id=fields.integer("pad_id"),
        inputs=inputs,
        buckets=_buckets(fields, max_length),
    )


def _buckets(fields: Fields, max_length: int) -> tuple[int, ...]:
    values = fields.items("buckets")
    plain = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    if not values or not plain or sorted(set(values)) != values or values[-1] != max_length:
        raise FileFormatError(
            f"the field 'buckets' must hold increasing lengths that end with max_length, {max_length}",
            where=fields.where,
        )
    return tuple(values)


def load_tokenizer(path: Path, max_length: int, files: Mapping[str, FileEntry] | None = None) -> Tokenizer:
    """A `tokenizers.Tokenizer` that truncates to `max_length` tokens (special ones included), unpadded.

    Raises:
        MissingEngineError: `tokenizers` is not installed.
        BadInputError: the file cannot be read.
        IntegrityError: it is not what `files` (see `build_preprocessor`) promise.
        FileFormatError: the file is no tokenizer, or `max_length` has no room beside special tokens.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingEngineError(
            "this model takes text, which needs the library tokenizers",
            where=str(path),
            hint="install it with: pip install 'edge-tcur-runtime[text]'",
        ) from error
    if files is None:
        raw = read_bounded(path, MAX_TOKENIZER_BYTES)
    else:
        raw = read_content(path.parent, files, path.name, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except ValueError as error:
        raise FileFormatError(f"not a tokenizer: {error}", where=str(path)) from error
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_length <= special:
        raise FileFormatError(
            f"max_length is {max_length}, but the tokenizer adds {special} special tokens", where=str(path)
        )
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer
