"""What the files of a base hold: a base is computed with in float32, whatever its checkpoint keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredWeights:
    """The tensors of a checkpoint as they are stored, read one by one.

    Args:
        files: safetensors files; with none of them every weight counts as `default`.
        default: dtype of a weight that no file names; None takes the commonest of the files.
    """

    def __init__(self, files: Iterable[Path], default: torch.dtype | None = None) -> None:
        self._where: dict[str, Path] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a reader, not a dict)
                    part = file.get_slice(name)
                    if (dtype := _FLOATS.get(part.get_dtype())) is not None:
                        self._where[name], self._dtypes[name] = path, dtype
                        self._shapes[name] = tuple(part.get_shape())
        if default is None:
            counts = Counter(self._dtypes.values())
            default = counts.most_common(1)[0][0] if counts else torch.float32
        self.default = default

    def original(self, name: str, loaded: Tensor) -> Tensor:
        """The stored tensor of which `loaded` was made, bit by bit; `loaded` in the dtype of the files
        where they do not name it.

        A model may be saved with another prefix than it was loaded with: the longest name that ends with
        the other one counts, where its values are those of `loaded`.
        """
        if not loaded.is_floating_point():
            return loaded
        for own in self._alike(name, tuple(loaded.shape)):
            with safe_open(self._where[own], framework="pt") as file:
                value: Tensor = file.get_tensor(own)
            if same_bits(value.to(loaded.dtype), loaded):
                return value
        cast = loaded.to(self.default)
        return cast if same_bits(cast.to(loaded.dtype), loaded) else loaded

    def _alike(self, name: str, shape: tuple[int, ...]) -> list[str]:
        found = [
            own
            for own, size in self._shapes.items()
            if size == shape and (own == name or own.endswith(f".{name}") or name.endswith(f".{own}"))
        ]
        return sorted(found, key=lambda own: (own != name, -len(own), own))


def stored_weights(find: Callable[[str], Path | None], default: torch.dtype | None = None) -> StoredWeights:
    """The weights of a checkpoint in the Hugging Face layout.

    Args:
        find: gives the path of a file of the checkpoint by its name, or None where there is none.
        default: see `StoredWeights`.
    """
    if (whole := find(WEIGHTS)) is not None:
        return StoredWeights([whole], default)
    if (index := find(INDEX)) is None:
        return StoredWeights([], default)
    shards: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    paths = [find(name) for name in sorted(set(shards.values()))]
    return StoredWeights([path for path in paths if path is not None], default)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one dtype and hold the same bits (zeros of both signs differ)."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )
