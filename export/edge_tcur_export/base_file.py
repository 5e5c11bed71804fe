"""`base.bin`: every frozen tensor once, referenced by all graphs as ONNX external data."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edge_tcur_export.quantized_graph import WeightTable, quantize_weights
from edge_tcur_runtime.formats.bundle import BASE_FILE

INLINE_BYTES = 256  # smaller tensors (shapes, axes, scalars) stay in the graph
_SMALL_ALIGNMENT = 64  # bytes, a cache line
_PAGE_BYTES = 4096  # large tensors start on a page, so that they can be mapped
_LARGE_BYTES = 64 * 2**10


class BaseFile:
    """Collects tensors of several graphs; equal content is stored once.

    Args:
        directory: where it is written.
        quantised: weights that are stored, and read by the graphs, in another form than float32.
        always: names of initializers that go into the file whatever their size.
        write: False counts bytes and writes nothing.

    Attributes:
        size: bytes so far.
        offsets: initializer name -> offset in bytes of its content.
    """

    def __init__(
        self,
        directory: Path,
        quantised: WeightTable | None = None,
        *,
        always: Collection[str] = (),
        write: bool = True,
    ) -> None:
        self._quantised = quantised or WeightTable(())
        self._always = frozenset(always)
        self._path = directory / BASE_FILE
        self._directory = directory
        self._known: dict[bytes, int] = {}  # digest of the content -> where it lies
        self.size = 0
        self.offsets: dict[str, int] = {}
        self._write = write
        if write:
            self._path.write_bytes(b"")

    def externalize(self, model: ir.Model, *, keep: frozenset[str] = frozenset()) -> int:
        """Moves the initializers of `model` into the file, those in `keep` and tiny ones apart; quantised
        weights go there whatever their size, because the runtime reads them there.

        Returns:
            bytes that were new: 0 where every tensor was already there.
        """
        before = self.size
        quantised = quantize_weights(model, self._quantised) if self._quantised else frozenset()
        with self._path.open("ab") if self._write else BytesIO() as file:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None or name in keep:
                    continue
                if tensor.nbytes <= INLINE_BYTES and name not in quantised | self._always:
                    continue
                raw = tensor.tobytes()
                key = hashlib.sha256(raw).digest()
                if key not in self._known:
                    alignment = _PAGE_BYTES if len(raw) >= _LARGE_BYTES else _SMALL_ALIGNMENT
                    padding = -self.size % alignment
                    if self._write:
                        file.write(b"\0" * padding + raw)
                    self._known[key] = self.size + padding
                    self.size += padding + len(raw)
                self._refer(name, value, self._known[key])
        return self.size - before

    def _refer(self, name: str, value: ir.Value, offset: int) -> None:
        """Lets an initializer be read from the file."""
        tensor = value.const_value
        assert tensor is not None
        self.offsets[name] = offset
        value.const_value = ir.ExternalTensor(
            BASE_FILE,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self._directory,
        )


def read_tensor(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of `base.bin`, mapped read-only."""
    return np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=shape)
