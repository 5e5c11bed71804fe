"""Frozen vectors of -1, 0 and 1, two bits each: the factors of the ``sketch`` frame.

A vector is used at unit length, so no scale is stored. Four entries share a byte, the first in the
lowest bits, as the entry plus one (0, 1 or 2; the pattern 3 is not valid).
"""

from __future__ import annotations

import numpy as np

_PER_BYTE = 4
_PIECE = 2**16  # bytes that are checked at a time
_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)
_CODES = (np.arange(256, dtype=np.uint8)[:, None] >> _SHIFTS) & np.uint8(3)  # of every byte
_ENTRIES = _CODES.astype(np.int8) - np.int8(1)
_INVALID = (_CODES == 3).any(axis=1)


def packed_size(count: int) -> int:
    """Bytes that `count` entries take."""
    return -(-count // _PER_BYTE)


def pack(values: np.ndarray) -> np.ndarray:
    """uint8 [n, packed_size(m)] of int8 [n, m] entries -1, 0, 1."""
    missing = -values.shape[1] % _PER_BYTE
    codes = np.pad((values + 1).astype(np.uint8), ((0, 0), (0, missing)))
    packed: np.ndarray = np.bitwise_or.reduce(codes.reshape(len(values), -1, _PER_BYTE) << _SHIFTS, axis=-1)
    return packed


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """int8 [n, count] entries -1, 0, 1; 2 stands where the pattern is not valid (see `is_valid`)."""
    return np.take(_ENTRIES, packed, axis=0).reshape(len(packed), -1)[:, :count]


def is_valid(packed: np.ndarray, count: int) -> bool:
    """Whether `packed` is what `pack` writes for rows of `count` entries: no invalid pattern, and no stray
    bits behind."""
    used = count % _PER_BYTE
    stray = bool((packed[:, -1] >> (2 * used)).any()) if used and packed.size else False
    flat = packed.reshape(-1)
    pieces = (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))
    return not stray and not any(_INVALID[piece].any() for piece in pieces)


def unit_vectors(values: np.ndarray, axis: int) -> np.ndarray:
    """float32 entries of the vectors along `axis`, each divided by its length (an empty one stays zero)."""
    entries = values.astype(np.float32)
    lengths = np.sqrt(np.square(entries).sum(axis=axis, keepdims=True), dtype=np.float64)
    # One division a vector, rounded once: an entry is plus or minus that, the bits of dividing each.
    entries *= (1 / np.maximum(lengths, 1)).astype(np.float32)
    return entries
