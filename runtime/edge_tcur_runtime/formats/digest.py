"""Digests: of files, and of a base model's tensors independent of how they are laid out in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "sha256:"
_CHUNK = 1 << 20  # bytes read at a time


def digest_bytes(content: bytes) -> str:
    """``sha256:<hex>`` of `content`."""
    return PREFIX + hashlib.sha256(content).hexdigest()


def digest_file(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes, read in chunks of 1 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return PREFIX + state.hexdigest()


def tensor_header(name: str, array: np.ndarray) -> bytes:
    """The bytes that stand before a tensor's data in a digest: name, dtype and shape."""
    shape = "x".join(str(size) for size in array.shape)
    return f"{name}\0{_dtype_name(array.dtype)}\0{shape}\0".encode()


@lru_cache(maxsize=32)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # numpy puts it together anew each time, which took a third of a small digest


def digest_tensors(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Canonical digest of named tensors.

    SHA-256 over, per tensor in the order given, ``name NUL dtype NUL d0xd1... NUL`` and the
    little-endian C-order bytes. Sort the names first (see `digest_state`) for a digest that does
    not depend on the order of definition.
    """
    state = hashlib.sha256()
    for name, array in tensors:
        state.update(tensor_header(name, array))
        content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        state.update(content.reshape(-1).view(np.uint8).data)  # no copy of a large tensor
    return PREFIX + state.hexdigest()


def digest_state(tensors: Mapping[str, np.ndarray]) -> str:
    """Digest of a base: `digest_tensors` over the names in sorted order."""
    return digest_tensors((name, tensors[name]) for name in sorted(tensors))
