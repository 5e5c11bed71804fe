"""ONNX Runtime's own adapter format, ``.onnx_adapter``: named tensors in one FlatBuffers file.

ONNX Runtime 1.20 and newer maps such a file and feeds its tensors to the graph inputs of the same names
(`RunOptions.add_active_adapter` in Python, `OrtLoraAdapter` in C and C++). The schema is
onnxruntime/lora/adapter_format/adapter_schema.fbs of ONNX Runtime 1.20; `onnxruntime-training` 1.19.2 has no
writer for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import flatbuffers  # type: ignore[import-untyped]
import numpy as np

FORMAT_VERSION = 1
IDENTIFIER = b"TORT"
_ALIGNMENT = 8  # bytes, of each tensor's data: the schema's force_align
# numpy name -> the schema's TensorDataType, which is ONNX's own enumeration
_KINDS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9}


def adapter_file(tensors: Mapping[str, np.ndarray], *, version: int = 1) -> bytes:
    """The bytes of an ``.onnx_adapter`` file.

    Args:
        tensors: graph input name -> float32, int32, int64, int8, uint8 or bool, little-endian.
        version: the adapter's own version number; ONNX Runtime stores it and enforces nothing.
    """
    builder = flatbuffers.Builder(sum(value.nbytes for value in tensors.values()) + 1024)
    parameters = [_add_parameter(builder, name, value) for name, value in tensors.items()]
    places = _add_offsets(builder, parameters)
    builder.StartObject(4)
    builder.PrependInt32Slot(0, FORMAT_VERSION, 0)
    builder.PrependInt32Slot(1, version, 0)
    builder.PrependInt32Slot(2, 1, 0)  # of the model; ONNX Runtime compares it with nothing
    builder.PrependUOffsetTRelativeSlot(3, places, 0)
    builder.Finish(builder.EndObject(), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _add_parameter(builder: flatbuffers.Builder, name: str, value: np.ndarray) -> int:
    """Table ``Parameter``: name, dims, data_type, raw_data."""
    kind = _KINDS[value.dtype.name]
    raw = _add_vector(builder, np.asarray(value, value.dtype.newbyteorder("<")).tobytes(), 1)
    dims = _add_vector(builder, np.array(value.shape, "<i8").tobytes(), 8)
    title = builder.CreateString(name)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, title, 0)
    builder.PrependUOffsetTRelativeSlot(1, dims, 0)
    builder.PrependInt32Slot(2, kind, 0)
    builder.PrependUOffsetTRelativeSlot(3, raw, 0)
    return int(builder.EndObject())


def _add_vector(builder: flatbuffers.Builder, content: bytes, item: int) -> int:
    """A vector of items of `item` bytes, aligned; the library's own byte vector cannot be aligned."""
    builder.StartVector(item, len(content) // item, _ALIGNMENT)
    builder.head = builder.Head() - len(content)
    builder.Bytes[builder.Head() : builder.Head() + len(content)] = content
    return int(builder.EndVector())


def _add_offsets(builder: flatbuffers.Builder, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
