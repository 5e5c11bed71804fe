"""Whether the installed ONNX Runtime reads a bundle's graphs: their opset and IR against the newest it knows.

The newest ones are asked of the library itself, by two empty graphs that are too new for any; no table of
versions can go out of date here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from edge_tcur_runtime.engines.engine import require_onnxruntime
from edge_tcur_runtime.engines.session import import_onnxruntime
from edge_tcur_runtime.errors import IncompatibleError
from edge_tcur_runtime.formats.bundle import MANIFEST, Bundle

_IR, _GRAPH, _OPSETS = 1, 7, 8  # fields of onnx.ModelProto
_DOMAIN, _VERSION = 1, 2  # of onnx.OperatorSetIdProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf
_OWN = (b"", b"ai.onnx")
_LONGEST = 4096  # bytes of one entry of the opsets
_FUTURE = 999
_NEWEST_IR = re.compile(r"max supported IR version: (\d+)")
_NEWEST_OPSET = re.compile(r"support for domain ai\.onnx is till opset (\d+)")


@dataclass(frozen=True)
class Stamp:
    """Versions of a graph, or the newest ones that a library reads; None where they are not known."""

    opset: int | None
    ir_version: int | None


def read_stamp(path: Path) -> Stamp:
    """The versions that an ONNX file says it has; the graph in it is skipped, not read."""
    opset = ir_version = None
    try:
        with path.open("rb") as file:
            while (key := _varint(file)) is not None:
                field, value = key >> 3, _value(file, key & 7, wanted=key >> 3 == _OPSETS)
                if field == _IR and isinstance(value, int):
                    ir_version = value
                if field == _OPSETS and isinstance(value, bytes):
                    opset = _own_opset(value) or opset
    except (OSError, ValueError):  # no file, or none of ONNX: what opens it says so
        return Stamp(None, None)
    return Stamp(opset, ir_version)


def _own_opset(entry: bytes) -> int | None:
    domain, version, file = b"", None, BytesIO(entry)
    while (key := _varint(file)) is not None:
        value = _value(file, key & 7, wanted=True)
        if key >> 3 == _DOMAIN and isinstance(value, bytes):
            domain = value
        if key >> 3 == _VERSION and isinstance(value, int):
            version = value
    return version if domain in _OWN else None


def _varint(file: BinaryIO) -> int | None:
    """A number of seven bits a byte; None at the end of the file."""
    result = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            if place:
                raise ValueError("cut short")
            return None
        result |= (byte[0] & 127) << (7 * place)
        if byte[0] < 128:
            return result
    raise ValueError("no varint")


def _value(file: BinaryIO, wire: int, *, wanted: bool) -> int | bytes | None:
    if wire == _VARINT:
        return _varint(file)
    size = {_FIXED64: 8, _FIXED32: 4}.get(wire) if wire != _BYTES else _varint(file)
    if size is None:
        raise ValueError("unknown wire type")
    if wanted and size <= _LONGEST:
        return file.read(size)
    file.seek(size, 1)
    return None


@functools.cache
def newest_readable() -> Stamp:
    """The newest opset and IR that the installed ONNX Runtime reads, by what it says of newer ones.

    Raises:
        MissingEngineError: it is not installed, or cannot be imported.
    """
    onnxruntime = import_onnxruntime()
    return Stamp(
        _refused(onnxruntime, _empty_graph(1, _FUTURE), _NEWEST_OPSET),
        _refused(onnxruntime, _empty_graph(_FUTURE, 1), _NEWEST_IR),
    )


def _refused(onnxruntime: Any, graph: bytes, newest: re.Pattern[str]) -> int | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  its classes share no other base
        found = newest.search(str(error))
        return None if found is None else int(found[1])
    return None


def _empty_graph(ir_version: int, opset: int) -> bytes:
    def number(value: int) -> bytes:
        return bytes([value & 127 | 128, value >> 7]) if value > 127 else bytes([value])

    def message(field: int, content: bytes) -> bytes:
        return bytes([field << 3 | _BYTES, len(content)]) + content

    stamp = bytes([_IR << 3 | _VARINT]) + number(ir_version)
    entry = bytes([_VERSION << 3 | _VARINT]) + number(opset)
    return stamp + message(_GRAPH, message(2, b"empty")) + message(_OPSETS, entry)


def require_readable(bundle: Bundle, path: Path) -> None:
    """Refuses a graph that is newer than the installed ONNX Runtime, before it is loaded.

    Args:
        path: of the graph.

    Raises:
        IncompatibleError: it is, or its manifest says so.
        MissingEngineError: ONNX Runtime is not installed.
    """
    installed = require_onnxruntime()
    problem = find_unreadable(
        bundle, (path,), newest_readable(), f"{installed.distribution} {installed.version}"
    )
    if problem is not None:
        raise problem


def find_unreadable(
    bundle: Bundle, graphs: Iterable[Path], newest: Stamp, library: str
) -> IncompatibleError | None:
    """The error of the first file that is newer than `newest`: a graph, or the manifest; None where all can
    be read, as far as is known.

    Args:
        library: whose limit `newest` is, with its version.
    """
    manifest = bundle.manifest
    stamps = [(path, read_stamp(path)) for path in graphs]
    for path, found in (*stamps, (bundle.path(MANIFEST), Stamp(manifest.opset, manifest.ir_version))):
        for what, version, limit in (
            ("opset", found.opset, newest.opset),
            ("IR version", found.ir_version, newest.ir_version),
        ):
            if version is not None and limit is not None and version > limit:
                return IncompatibleError(
                    f"the {what} of this file is {version}; {library} reads {limit} at most",
                    where=str(path),
                    hint="update ONNX Runtime on this device, or export the bundle with an older edge-tcur",
                )
    return None
