"""Bounds of what the readers accept, so that a hostile or wrong file cannot fill the memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataLimits:
    """Upper bounds, each of them inclusive."""

    line_bytes: int = 2**20  # bytes of one line, or of one CSV record with line breaks in it (1 MiB)
    samples: int = 1_000_000  # rows or images of one data set
    decoded_bytes: int = 2**31  # bytes of a whole data set, uncompressed (2 GiB)
    image_pixels: int = 2**26  # width x height of one image file (64 megapixels)


DEFAULT_LIMITS = DataLimits()
