"""The adapter file: one `.safetensors` file of a few kilobytes, never pickle.

Layout (format version 1)
    tensors   ``<group>.core`` f32 [n3, r, r], ``<group>.rows`` i32 [b, r], ``<group>.cols`` i32 [b, r],
              or, in the ``sketch`` frame, ``<group>.left`` and ``<group>.right`` u8 (two bits an entry,
              `edge_tcur_runtime.formats.ternary`), and trained extras (a head) under their own
              parameter names, f32.
    metadata  ``edge_tcur``: one JSON document (see `AdapterHeader`). Its last field, ``sha256``, is the
              digest of the document before it and of every tensor, so that no changed byte is ever
              accepted. One key, because the library writes several in no fixed order.

The n3 slices of a group are b blocks of p = n3 / b consecutive ones, each with its own rows and columns;
``coupling`` says how far a block reaches: ``none`` (b = n3), ``layer`` (one block a layer), ``all`` (b = 1).
The core is stored in *raw* coordinates: within a block the update of slice ``l`` is
``dW[l] = sum over i, j, k of T[l, i, j, k] W[i][:, cols] @ core[j] @ W[k][rows, :]`` with the structure
constants ``T`` of the transform (`edge_tcur_runtime.transform`); for ``dft`` the sum over
``i + j + k = l (mod p)``. The frames ``raw`` and ``orthonormal`` are coordinates while training and change
nothing in the file. In the frame ``sketch`` (coupling ``none``) the update is
``dW[l] = left[l] @ core[l] @ right[l]`` between the stored vectors at unit length.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from edge_tcur_runtime.atomic import write_atomic
from edge_tcur_runtime.errors import (
    BadInputError,
    FileFormatError,
    FormatVersionError,
    IntegrityError,
)
from edge_tcur_runtime.formats.digest import digest_bytes, digest_tensors
from edge_tcur_runtime.formats.factors import (
    COUPLINGS,
    FACTOR_PARTS,
    FRAMES,
    SKETCH,
    AnyFactors,
    GroupSpec,
    SketchFactors,
    all_finite,
    check_factors,
    factor_parts,
    read_factors,
)
from edge_tcur_runtime.formats.schema import Fields, parse_document
from edge_tcur_runtime.transform import TRANSFORMS

FORMAT_VERSION = 1
METHOD = "tcurlora"
MAX_FILE_BYTES = 64 * 2**20  # a head of 50,000 classes fits; a base model does not
MAX_HEADER_BYTES = 64 * 2**10
MAX_ALPHA = 1e6
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_DTYPE_NAMES = tuple(_DTYPES)  # a list is no key of a dict, but may be looked for in a tuple
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}
_ENTRY = ("dtype", "shape", "data_offsets")
_METADATA_KEY = "__metadata__"  # of the safetensors header
_METADATA = "edge_tcur"
_DIGEST = "sha256"


@dataclass(frozen=True)
class AdapterHeader:
    """The JSON document of an adapter file.

    Attributes:
        base_digest: digest of the base's tensors (`digest_state`) that this adapter belongs to.
        groups: group name -> weights.
        task: task name, e.g. ``"text-classification"``.
        labels: class names in output order.
        coupling, transform: how far and along what the slices of a group are coupled.
        frame: ``raw`` or ``orthonormal``, the coordinates in which it was trained, or ``sketch``.
        alpha: scale of the update in those coordinates; the stored core has it in already.
        provenance: free text values: tool version, command, parent adapter; no time stamps, so
            that the same seed gives the same bytes.
    """

    base_digest: str
    groups: Mapping[str, GroupSpec]
    task: str
    labels: tuple[str, ...]
    coupling: str = "all"
    transform: str = "dft"
    frame: str = "orthonormal"
    alpha: float = 1.0
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """A verified adapter: header, factors per group, and trained extras by parameter name (f32)."""

    header: AdapterHeader
    factors: Mapping[str, AnyFactors]
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor of the file by its name in the file."""
        return self._named({group: part.stored() for group, part in self.factors.items()})

    def feeds(self) -> dict[str, np.ndarray]:
        """Every tensor by its name in the graphs; sketches come as float32 unit vectors."""
        return self._named({group: part.feeds() for group, part in self.factors.items()})

    def _named(self, parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        result = {
            f"{group}.{part}": np.asarray(value, order="C")
            for group, values in parts.items()
            for part, value in values.items()
        }
        return result | {name: np.asarray(value, "<f4", order="C") for name, value in self.extras.items()}

    @property
    def trained_numbers(self) -> int:
        """Numbers in the cores; a trained head is counted apart (`extra_numbers`)."""
        return sum(int(factors.core.size) for factors in self.factors.values())

    @property
    def extra_numbers(self) -> int:
        """Numbers in trained extras such as a head."""
        return sum(int(value.size) for value in self.extras.values())


def serialize_adapter(adapter: Adapter) -> bytes:
    """The bytes of an adapter file. Deterministic: the same adapter gives the same bytes.

    Raises:
        BadInputError: the adapter breaks a rule of the format (non-finite core, bad indices, a name
            that is not allowed), so that it could not be read.
    """
    _check_values(adapter, "adapter")
    document = _document(adapter.header)
    tensors = adapter.tensors()
    try:
        metadata = {_METADATA: _compact({**document, _DIGEST: _content_digest(document, tensors)})}
    except UnicodeEncodeError as error:
        raise BadInputError(f"the header is not Unicode text: {error.reason}", where="adapter") from error
    raw = safetensors.numpy.save(tensors, metadata)
    header_bytes = int.from_bytes(raw[:8], "little")
    if header_bytes > MAX_HEADER_BYTES or len(raw) > MAX_FILE_BYTES:
        raise BadInputError(
            f"the adapter file would be {len(raw)} bytes with a header of {header_bytes}; "
            f"the limits are {MAX_FILE_BYTES} and {MAX_HEADER_BYTES}"
        )
    parse_adapter(raw)  # what could not be read is not written
    return raw


def _document(header: AdapterHeader) -> dict[str, Any]:
    """The JSON document of a header without its digest, in the one order that is written and read."""
    return {
        "format_version": FORMAT_VERSION,
        "method": METHOD,
        "coupling": header.coupling,
        "transform": header.transform,
        "frame": header.frame,
        "alpha": float(header.alpha),
        "base_digest": header.base_digest,
        "task": header.task,
        "labels": list(header.labels),
        "groups": {name: vars(spec) for name, spec in sorted(header.groups.items())},
        "provenance": dict(sorted(header.provenance.items())),
    }


def write_adapter(path: Path, adapter: Adapter, *, private: bool = False) -> str:
    """Writes an adapter file old-or-new and returns the digest of its bytes.

    Args:
        private: a personal adapter: readable by its owner only (0600).

    Raises:
        DiskError: the file could not be written; an older file is still whole.
    """
    raw = serialize_adapter(adapter)
    write_atomic(path, raw, mode=0o600 if private else 0o644)
    return digest_bytes(raw)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        BadInputError: missing, unreadable, not a regular file.
        FileFormatError: larger than `limit`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadInputError("not a regular file", where=str(path))
            if status.st_size > limit:
                raise FileFormatError(f"{status.st_size} bytes; the limit is {limit}", where=str(path))
            # As many bytes as there were: asked for `limit`, Python would reserve them all.
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadInputError(f"cannot read: {error.strerror}", where=str(path)) from error


def read_adapter(path: Path) -> Adapter:
    """Reads and verifies an adapter file. See `parse_adapter` for the errors."""
    return parse_adapter(read_bounded(path, MAX_FILE_BYTES), str(path))


def parse_adapter(raw: bytes, where: str = "adapter") -> Adapter:
    """An adapter from the bytes of its file; every check comes before the value is used.

    One content has one file: what is accepted is, byte for byte, what `serialize_adapter` writes for it.

    Raises:
        FileFormatError: not an adapter file (size, header, schema, tensor names, dtypes, shapes), or
            written otherwise than the format says (spaces, order).
        FormatVersionError: written by a newer version.
        IntegrityError: the digest inside does not match the content.
        BadInputError: values out of range (non-finite core, indices).
    """
    table = _parse_table(raw, where)
    metadata = table.pop(_METADATA_KEY, None)
    if not isinstance(metadata, dict) or set(metadata) != {_METADATA}:
        raise FileFormatError(
            f"this safetensors file is not an edge-tcur adapter (its metadata is not {_METADATA!r})",
            where=where,
        )
    text, place = str(metadata[_METADATA]), f"{where}: {_METADATA}"
    document = parse_document(text.encode(), place)
    check_version(Fields(document, place), FORMAT_VERSION)  # a newer one may hold anything else
    tensors = _parse_tensors(raw, table, where)
    rest = {key: value for key, value in document.items() if key != _DIGEST}
    body, expected = _compact(rest), Fields(document, place).text(_DIGEST)
    actual = _text_digest(body, tensors)
    if actual != expected or text != f'{body[:-1]},"{_DIGEST}":"{expected}"}}':
        raise IntegrityError(
            f"the content was altered: its digest is {actual}, the file promises {expected}",
            where=where,
            hint="fetch or build the adapter again; this copy is not used",
        )
    header = _parse_header(rest, place)
    if body != _compact(_document(header)):
        raise FileFormatError("the fields are not written in the format's order and form", where=place)
    adapter = _assemble(header, tensors, where)
    _check_values(adapter, where, read=True)
    return adapter


def _compact(document: Mapping[str, Any]) -> str:
    try:
        return _ENCODER.encode(document)
    except RecursionError as error:
        raise FileFormatError("nested too deeply", where="adapter") from error


def _content_digest(document: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    return _text_digest(_compact(document), tensors)


def _text_digest(body: str, tensors: Mapping[str, np.ndarray]) -> str:
    named = [(_METADATA, np.frombuffer(body.encode(), dtype=np.uint8))]
    named += [(name, tensors[name]) for name in sorted(tensors)]
    return digest_tensors(named)


def _parse_table(raw: bytes, where: str) -> dict[str, Any]:
    """The safetensors header as a dict, duplicates refused (the library keeps the last of two)."""
    if len(raw) > MAX_FILE_BYTES:
        raise FileFormatError(f"{len(raw)} bytes; the limit is {MAX_FILE_BYTES}", where=where)
    if len(raw) < 8:
        raise FileFormatError(f"{len(raw)} bytes are too few for an adapter file", where=where)
    length = int.from_bytes(raw[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(raw) - 8):
        raise FileFormatError(
            f"the header claims {length} bytes; the file has {len(raw)} and the limit is {MAX_HEADER_BYTES}",
            where=where,
        )
    text, place = raw[8 : 8 + length], f"{where}: header"
    table = parse_document(text, place)
    # The digest covers what the header says, not how: other spaces or escapes would be another file.
    written = _compact({_METADATA_KEY: table[_METADATA_KEY], **table} if _METADATA_KEY in table else table)
    expected = written.encode()
    if text != expected.ljust(-(-len(expected) // 8) * 8):
        raise FileFormatError("holds spaces, escapes or an order that the format does not have", where=place)
    return table


def _parse_tensors(raw: bytes, table: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    for name, entry in table.items():
        _check_name(name, where)
        if not isinstance(entry, dict) or tuple(entry) != _ENTRY or entry["dtype"] not in _DTYPE_NAMES:
            _refuse_entry(entry, f"{where}: {name}")
    _check_order(table, where)
    try:
        entries = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
        return {
            name: np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in entries
        }
    except (safetensors.SafetensorError, ValueError) as error:  # ValueError: a shape like [2**62, 0]
        raise FileFormatError(f"not a valid safetensors file: {error}", where=where) from error


def _check_order(table: Mapping[str, Any], where: str) -> None:
    """Refuses tensors in another order than the library writes: by dtype (`_DTYPES`), then by name, one
    behind the other. Their data would be the same, their file another."""
    end, last = 0, (0, "")
    for name, entry in table.items():
        order, offsets = (_ORDER[entry["dtype"]], name), entry["data_offsets"]
        if order < last:
            raise FileFormatError("the tensors are not in the format's order", where=where)
        if not _are_offsets(offsets) or not end == offsets[0] <= offsets[1]:
            raise FileFormatError(
                "'data_offsets' must follow on those of the tensor before", where=f"{where}: {name}"
            )
        end, last = offsets[1], order


def _are_offsets(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is type(value[1]) is int


def _refuse_entry(entry: object, where: str) -> None:
    """Raises the error of a tensor's entry that is not as it must be."""
    fields = Fields(entry if isinstance(entry, dict) else {}, where)
    fields.only(*_ENTRY).choice("dtype", _DTYPES)
    raise FileFormatError(f"the fields must be {', '.join(_ENTRY)}", where=where)


def _check_name(name: str, where: str) -> None:
    """Refuses tensor names that could leave a directory or alter a terminal."""
    if not name.isprintable() or name in {"", _METADATA_KEY} or "/" in name or "\\" in name:
        raise FileFormatError(f"the tensor name {name!r} is not allowed", where=where)


def _parse_header(document: Mapping[str, Any], where: str) -> AdapterHeader:
    fields = Fields(document, where)
    fields.only(
        "format_version", "method", "coupling", "transform", "frame", "alpha", "base_digest", "task",
        "labels", "groups", "provenance",
    )  # fmt: skip
    fields.choice("method", (METHOD,))
    provenance = fields.child("provenance")
    alpha = fields.number("alpha")
    if not 0 < alpha < MAX_ALPHA:
        raise FileFormatError(
            f"the field 'alpha' is {alpha}; expected above 0, below {MAX_ALPHA}", where=where
        )
    return AdapterHeader(
        base_digest=fields.text("base_digest"),
        groups={name: parse_group(child) for name, child in fields.children("groups").items()},
        task=fields.text("task"),
        labels=fields.texts("labels"),
        coupling=fields.choice("coupling", COUPLINGS),
        transform=fields.choice("transform", TRANSFORMS),
        frame=fields.choice("frame", FRAMES),
        alpha=alpha,
        provenance={key: provenance.text(key) for key in provenance.mapping_keys()},
    )


def check_version(fields: Fields, known: int) -> None:
    """Refuses a document of a newer format version before any other field is read."""
    version = fields.integer("format_version", low=1)
    if version > known:
        raise FormatVersionError(
            f"format version {version} is newer than {known}, the newest that this version reads",
            where=fields.where,
            hint="update edge-tcur-runtime on this machine",
        )


def parse_group(fields: Fields, *more: str) -> GroupSpec:
    """A group's weights from its JSON object; `more` names further fields that it may have."""
    fields.only("parameters", "n1", "n2", *more)
    parameters = fields.texts("parameters")
    if not parameters or len(set(parameters)) != len(parameters):
        raise FileFormatError("'parameters' must name at least one weight, each once", where=fields.where)
    return GroupSpec(parameters, fields.integer("n1", low=1), fields.integer("n2", low=1))


def _assemble(header: AdapterHeader, tensors: Mapping[str, np.ndarray], where: str) -> Adapter:
    rest = dict(tensors)
    factors = {}
    for group, spec in header.groups.items():
        parts = {}
        for part in factor_parts(header.frame):
            if (value := rest.pop(f"{group}.{part}", None)) is None:
                raise FileFormatError(f"the tensor '{group}.{part}' is missing", where=where)
            parts[part] = value
        factors[group] = read_factors(parts, spec, f"{where}: {group}")
    return Adapter(header, factors, rest)


def _check_values(adapter: Adapter, where: str, *, read: bool = False) -> None:
    """Refuses values that the format does not have; `read`: the factors are those of `read_factors`, which
    has checked each on its own."""
    if set(adapter.factors) != set(adapter.header.groups) or not (adapter.factors or adapter.extras):
        raise FileFormatError("groups and factors do not name the same groups, or are empty", where=where)
    for group, spec in adapter.header.groups.items():
        if not read:
            check_factors(adapter.factors[group], spec, f"{where}: {group}")
        _check_group(adapter, group, f"{where}: {group}")
    for name, value in adapter.extras.items():
        _check_name(name, where)
        if name.rpartition(".")[2] in FACTOR_PARTS or value.dtype != np.float32:
            raise FileFormatError(
                f"the tensor {name!r} ({value.dtype}) belongs to no group of this adapter, and is no extra",
                where=where,
            )
        if not all_finite(value):
            raise BadInputError("holds NaN or infinity", where=f"{where}: {name}")


def _check_group(adapter: Adapter, group: str, where: str) -> None:
    factors, header = adapter.factors[group], adapter.header
    if isinstance(factors, SketchFactors) != (header.frame == SKETCH):
        raise FileFormatError(f"the factors are not those of the frame {header.frame!r}", where=where)
    if header.frame == SKETCH and header.coupling != "none":
        raise FileFormatError(
            f"the frame {SKETCH!r} has coupling 'none', not {header.coupling!r}", where=where
        )
    expected = {"none": len(factors.core), "all": 1}.get(header.coupling, factors.blocks)
    if factors.blocks != expected:
        raise FileFormatError(
            f"{factors.blocks} sets of rows and columns; coupling {header.coupling!r} has {expected}",
            where=where,
        )
