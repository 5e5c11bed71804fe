"""The bundle: a flat directory that holds one frozen base and the graphs that read it.

`manifest.json` lists every other file with its size and SHA-256; nothing is opened before its
digest matches. All ONNX graphs reference the same external-data file `base.bin`. The directory is
flat on purpose: ONNX's external data may then never leave the graph's own directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_tcur_runtime.errors import BadInputError, FileFormatError, IntegrityError
from edge_tcur_runtime.formats.adapter import check_version, parse_group, read_bounded
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import COUPLINGS, INDEX_PARTS, SKETCH, factor_parts
from edge_tcur_runtime.formats.memory import MemoryTables, parse_tables
from edge_tcur_runtime.formats.schema import Fields, parse_document
from edge_tcur_runtime.formats.weights import FP32, PRECISIONS, TensorPlace, parse_place
from edge_tcur_runtime.transform import TRANSFORMS

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BASE_FILE = "base.bin"
MAX_MANIFEST_BYTES = 4 * 2**20
_NO_MANIFEST = (
    "is it a bundle, the directory that 'edge-tcur export' wrote? If so, export, copy or fetch it again"
)
MAX_REFERENCE_BYTES = 16 * 2**20
HELD_OUT, RANDOM = "held-out", "random"  # what an export compared its graphs on
BASE_PTD = "base.ptd"  # the base again, for ExecuTorch's programs
ADAMW, SGD = OPTIMIZERS = ("adamw", "sgd")  # of ``optimizer.onnx``
GRAPHS = ("infer", "step", "train", "eval", "optimizer", "checkpoint")
CHECKS = "checks"  # role of the graph of single operators, for the self-check of a device
STEP_VARIANTS = ("step_recompute", "step_last")  # roles of step graphs that are there when asked for

# Fields that are absent where they say nothing: bundles without them are as they were before these fields.
_OPTIONAL = (
    "programs", "metric", "optimizer", "precision", "recomputed_blocks", "last_blocks", "verified", "memory",
    "reference",
)  # fmt: skip


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and ``sha256:<hex>`` of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class BundleGroup:
    """A group of adapted weights in slice order, with the sizes and default rank of its factors.

    `blocks` is the number of blocks of consecutive slices that share rows and columns.
    """

    parameters: tuple[str, ...]
    n1: int
    n2: int
    rank: int
    blocks: int = 1


@dataclass(frozen=True)
class ProgramSpec:
    """An ExecuTorch program; its frozen tensors lie in `base.ptd`.

    Attributes:
        file: its name.
        inputs: names of its inputs in order: the model's inputs, then ``labels`` and the frozen factors
            (training) or all factors and extras (inference).
        outputs: names of its outputs in order, gradients and parameters not included.
        limits: largest size of each dynamic axis; memory is reserved for it.
        memory: bytes that are reserved when it is loaded, the base not included.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    limits: Mapping[str, int]
    memory: int


@dataclass(frozen=True)
class LastBlocks:
    """What learns in the graph ``step_last``: a gradient goes through the last blocks of the model alone.

    Attributes:
        count: how many blocks.
        slices: group -> numbers of the slices of its core that get a gradient.
        extras: names of the extras that get one.
    """

    count: int
    slices: Mapping[str, tuple[int, ...]]
    extras: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    """What was compared with torch when the bundle was written.

    Attributes:
        targets: roles of graphs (`infer`, `step`, `train`) and names of programs that agreed; empty where
            the export was told to compare nothing.
        tolerances: quantity -> largest relative difference that was allowed.
        inputs: `HELD_OUT` where samples that the run held out were among what they were compared on, `RANDOM`
            where there was nothing else; None where the bundle does not say.
    """

    targets: tuple[str, ...]
    tolerances: Mapping[str, float]
    inputs: str | None = None


@dataclass(frozen=True)
class ReferenceSpec:
    """A few samples of the publisher on which a device's new adapter must not fall behind.

    Attributes:
        file: its name (`edge_tcur_runtime.reference`).
        samples: how many.
        measure: whose answers were scored, ``base`` or ``adapter``: a base with a new, untrained head has
            none of its own, and the adapter that came with the bundle takes its place.
        score, loss: the task's metric and the mean loss of those answers, by torch.
    """

    file: str
    samples: int
    measure: str
    score: float
    loss: float


@dataclass(frozen=True)
class InputSpec:
    """A model input: numpy dtype name and shape; a string stands for a dynamic axis."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        base_digest: canonical digest of the base's tensors (`digest_state`).
        files: file name -> size and digest, every file but the manifest.
        graphs: role (`GRAPHS`, `STEP_VARIANTS`, `CHECKS`) -> file name; others are absent.
        inputs: model input name -> dtype and shape, in graph order, factors not included.
        groups: adapted groups; the graphs take ``<group>.<part>`` of each of `parts` as inputs.
        tensors: parameter name -> place in `base.bin`, for the adapted weights.
        parts: ``core, rows, cols``, or ``core, left, right`` where sketches are fed.
        extras: trained extras (head) name -> shape; graph inputs under their own names.
        task, labels: what the outputs mean.
        preprocessing: how raw data become inputs (`edge_tcur_runtime.preprocess`).
        canary: file of fixed inputs and the expected outputs of base and adapter.
        adapter: file of the adapter that was exported with the bundle.
        base_extras: file of the base's own values of those extras that are not a new head, if any.
        versions: of the tool and the libraries that wrote the bundle.
        device: the device profile it was exported for, if any.
        programs: ``<infer or train>-<backend>`` -> ExecuTorch program; empty where none was exported.
        metric: what the output ``metric`` of the training graphs is; None where they have none.
        optimizer: which of `OPTIMIZERS` ``optimizer.onnx`` is; None where there is none, or where the bundle
            does not say (then AdamW).
        precision: of the base's large weights, out of `PRECISIONS`; `base_digest` is that of the float32
            base in each, so that one adapter fits all of them.
        recomputed_blocks: how many blocks the graph ``step_recompute`` computes again; None without it.
        last_blocks: what learns in the graph ``step_last``; None without it.
        verified: what was compared with torch; None where the bundle does not say.
        memory: what passes of the training graphs take; None where the bundle does not say.
        reference: samples on which no adapter may fall behind; None where it has none.
    """

    base_digest: str
    files: Mapping[str, FileEntry]
    graphs: Mapping[str, str]
    inputs: Mapping[str, InputSpec]
    groups: Mapping[str, BundleGroup]
    tensors: Mapping[str, TensorPlace]
    extras: Mapping[str, tuple[int, ...]]
    task: str
    labels: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    opset: int
    ir_version: int
    coupling: str = "all"
    transform: str = "dft"
    parts: tuple[str, ...] = ("core", *INDEX_PARTS)
    canary: str | None = None
    adapter: str | None = None
    base_extras: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    programs: Mapping[str, ProgramSpec] = field(default_factory=dict)
    metric: str | None = None
    optimizer: str | None = None
    precision: str = FP32
    recomputed_blocks: int | None = None
    last_blocks: LastBlocks | None = None
    verified: Verified | None = None
    memory: MemoryTables | None = None
    reference: ReferenceSpec | None = None

    def factor_names(self) -> list[str]:
        """The graph inputs that an adapter is fed to: every group's factors, and the extras."""
        return [f"{group}.{part}" for group in self.groups for part in self.parts] + list(self.extras)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and whose files were verified."""

    root: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.root / name

    def graph(self, role: str) -> Path | None:
        """Path of the graph with this role, or None where it was not exported."""
        name = self.manifest.graphs.get(role)
        return None if name is None else self.root / name


def serialize_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    document = {"format_version": FORMAT_VERSION, "kind": "edge-tcur-bundle", **asdict(manifest)}
    document["tensors"] = {name: place.document() for name, place in manifest.tensors.items()}
    for name in _OPTIONAL:
        if getattr(manifest, name) in (Manifest.__dataclass_fields__[name].default, {}):
            del document[name]
    if manifest.verified is not None and manifest.verified.inputs is None:
        del document["verified"]["inputs"]
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """A manifest from its bytes.

    Raises:
        FileFormatError: bad JSON, unknown or missing fields, a file name that leaves the directory.
        FormatVersionError: written by a newer version.
    """
    fields = Fields(parse_document(raw, where), where)
    check_version(fields, FORMAT_VERSION)
    fields.only("format_version", "kind", *Manifest.__dataclass_fields__)
    fields.choice("kind", ("edge-tcur-bundle",))
    graphs, versions = fields.child("graphs").only(*GRAPHS, *STEP_VARIANTS, CHECKS), fields.child("versions")
    manifest = Manifest(
        base_digest=fields.text("base_digest"),
        files={name: _parse_file(name, child) for name, child in fields.children("files").items()},
        graphs={role: graphs.text(role) for role in graphs.mapping_keys()},
        inputs={name: _parse_input(child) for name, child in fields.children("inputs").items()},
        groups={name: _parse_group(child) for name, child in fields.children("groups").items()},
        tensors={name: parse_place(child) for name, child in fields.children("tensors").items()},
        extras={name: fields.child("extras").sizes(name) for name in fields.mapping("extras")},
        task=fields.text("task"),
        labels=_labels(fields),
        preprocessing=fields.mapping("preprocessing"),
        opset=fields.integer("opset", low=1),
        ir_version=fields.integer("ir_version", low=1),
        coupling=fields.choice("coupling", COUPLINGS),
        transform=fields.choice("transform", TRANSFORMS),
        parts=_parts(fields),
        canary=fields.optional_text("canary"),
        adapter=fields.optional_text("adapter"),
        base_extras=fields.optional_text("base_extras"),
        versions={key: versions.text(key) for key in versions.mapping_keys()},
        device=fields.optional_text("device"),
        programs={name: _parse_program(child) for name, child in _optional_children(fields, "programs")},
        metric=fields.text("metric") if "metric" in fields.mapping_keys() else None,
        optimizer=fields.choice("optimizer", OPTIMIZERS) if "optimizer" in fields.mapping_keys() else None,
        precision=_precision(fields),
        recomputed_blocks=_recomputed_blocks(fields),
        last_blocks=_parse_last_blocks(fields),
        verified=_parse_verified(fields.child("verified")) if "verified" in fields.mapping_keys() else None,
        memory=parse_tables(fields.child("memory")) if "memory" in fields.mapping_keys() else None,
        reference=_parse_reference(fields),
    )
    _check_references(manifest, where)
    _check_variants(manifest, where)
    return manifest


def _check_references(manifest: Manifest, where: str) -> None:
    named = [*manifest.graphs.values(), manifest.canary, manifest.adapter, manifest.base_extras, BASE_FILE]
    named += [program.file for program in manifest.programs.values()]
    named += [BASE_PTD] if manifest.programs else []
    named += [] if manifest.reference is None else [manifest.reference.file]
    for name in named:
        if name is not None and name not in manifest.files:
            raise FileFormatError(f"{name!r} is used but not listed under 'files'", where=where)
    _check_places(manifest, where)
    for group, spec in manifest.groups.items():
        expected = {"none": len(spec.parameters), "all": 1}.get(manifest.coupling, spec.blocks)
        if spec.blocks != expected:
            raise FileFormatError(
                f"group {group!r}: {spec.blocks} blocks; coupling {manifest.coupling!r} has {expected}",
                where=where,
            )
        for parameter in spec.parameters:
            found = manifest.tensors.get(parameter)
            shape = (spec.n1, spec.n2)
            if found is None or found.shape != (shape[::-1] if found.transposed else shape):
                raise FileFormatError(
                    f"group {group!r}: the weight {parameter!r} is missing from 'tensors' or is not {shape}",
                    where=where,
                )


def _check_places(manifest: Manifest, where: str) -> None:
    size = manifest.files[BASE_FILE].size
    for parameter, place in manifest.tensors.items():
        if place.end() > size:
            raise FileFormatError(
                f"the weight {parameter!r} ends behind {BASE_FILE!r}, which has {size} bytes", where=where
            )
        if place.dtype not in {"float32", manifest.precision}:
            raise FileFormatError(
                f"the weight {parameter!r} is {place.dtype} in a bundle of {manifest.precision}", where=where
            )


def _parse_file(name: str, fields: Fields) -> FileEntry:
    if not name.isprintable() or "/" in name or "\\" in name or name in {"", ".", "..", MANIFEST}:
        raise FileFormatError(f"the file name {name!r} is not allowed", where=fields.where)
    fields.only("size", "sha256")
    return FileEntry(fields.integer("size"), fields.text("sha256"))


def _optional_children(fields: Fields, key: str) -> Iterable[tuple[str, Fields]]:
    return fields.children(key).items() if key in fields.mapping_keys() else ()


def _precision(fields: Fields) -> str:
    return fields.choice("precision", PRECISIONS) if "precision" in fields.mapping_keys() else FP32


def _parse_program(fields: Fields) -> ProgramSpec:
    fields.only("file", "inputs", "outputs", "limits", "memory")
    limits = fields.child("limits")
    return ProgramSpec(
        fields.text("file"),
        fields.texts("inputs"),
        fields.texts("outputs"),
        {axis: limits.integer(axis, low=1) for axis in limits.mapping_keys()},
        fields.integer("memory"),
    )


def _recomputed_blocks(fields: Fields) -> int | None:
    key = "recomputed_blocks"
    return fields.integer(key, low=1) if key in fields.mapping_keys() else None


def _parse_last_blocks(fields: Fields) -> LastBlocks | None:
    if "last_blocks" not in fields.mapping_keys():
        return None
    found = fields.child("last_blocks").only("count", "slices", "extras")
    slices = found.child("slices")
    return LastBlocks(
        found.integer("count", low=1),
        {group: slices.sizes(group) for group in slices.mapping_keys()},
        found.texts("extras"),
    )


def _check_variants(manifest: Manifest, where: str) -> None:
    """The fields of the variants are there where their graphs are, and name what the bundle has."""
    if manifest.memory is not None and set(manifest.memory.graphs) - set(manifest.graphs):
        raise FileFormatError("'memory' has tables of graphs that the bundle does not have", where=where)
    learning = manifest.last_blocks
    for role, found in (("step_recompute", manifest.recomputed_blocks), ("step_last", learning)):
        if (role in manifest.graphs) != (found is not None):
            raise FileFormatError(f"the graph {role!r} and its field must come together", where=where)
    if learning is None:
        return
    for group, slices in learning.slices.items():
        count = len(manifest.groups[group].parameters) if group in manifest.groups else 0
        if any(place >= count for place in slices) or len(set(slices)) != len(slices):
            raise FileFormatError(f"'last_blocks': no such slices in the group {group!r}", where=where)
    unknown = set(learning.extras) - set(manifest.extras)
    if unknown or set(learning.slices) != set(manifest.groups):
        raise FileFormatError("'last_blocks' does not fit the bundle's groups and extras", where=where)


def _parse_verified(fields: Fields) -> Verified:
    fields.only("targets", "tolerances", "inputs")
    tolerances = fields.child("tolerances")
    return Verified(
        fields.texts("targets"),
        {name: tolerances.number(name) for name in tolerances.mapping_keys()},
        fields.choice("inputs", (HELD_OUT, RANDOM)) if "inputs" in fields.mapping_keys() else None,
    )


def _parse_reference(fields: Fields) -> ReferenceSpec | None:
    if "reference" not in fields.mapping_keys():
        return None
    found = fields.child("reference").only("file", "samples", "measure", "score", "loss")
    return ReferenceSpec(
        found.text("file"),
        found.integer("samples", low=1),
        found.choice("measure", ("base", "adapter")),
        found.number("score"),
        found.number("loss"),
    )


def _parse_input(fields: Fields) -> InputSpec:
    fields.only("dtype", "shape")
    shape = fields.items("shape")
    if not all(isinstance(axis, (int, str)) and not isinstance(axis, bool) for axis in shape):
        raise FileFormatError("'shape' must hold sizes or axis names", where=fields.where)
    return InputSpec(fields.choice("dtype", ("float32", "int64")), tuple(shape))


def _parse_group(fields: Fields) -> BundleGroup:
    spec, rank = parse_group(fields, "rank", "blocks"), fields.integer("rank", low=1)
    blocks = fields.integer("blocks", low=1)
    if len(spec.parameters) % blocks:
        raise FileFormatError(
            f"{blocks} blocks do not divide {len(spec.parameters)} weights", where=fields.where
        )
    if rank > min(spec.n1, spec.n2):
        raise FileFormatError(
            f"the rank {rank} is above the sizes {spec.n1} and {spec.n2}", where=fields.where
        )
    return BundleGroup(spec.parameters, spec.n1, spec.n2, rank, blocks)


def _parts(fields: Fields) -> tuple[str, ...]:
    parts = fields.texts("parts")
    if parts not in (factor_parts("raw"), factor_parts(SKETCH)):
        raise FileFormatError(f"'parts' are {', '.join(parts)}", where=fields.where)
    return parts


def _labels(fields: Fields) -> tuple[str, ...]:
    labels = fields.texts("labels")
    if len(set(labels)) != len(labels):
        raise FileFormatError("'labels' must name each class once", where=fields.where)
    return labels


def open_bundle(root: Path, *, verify: bool = True) -> Bundle:
    """Opens a bundle: manifest first, then every file's kind, size and digest.

    Args:
        root: the bundle's directory.
        verify: read and digest every file (one pass over the base). Only a caller that has just
            done it may say False.

    Raises:
        BadInputError: the directory, the manifest or a file cannot be read.
        FileFormatError: the manifest is malformed.
        IntegrityError: a file is missing, a link, of another size or altered.
    """
    path = root / MANIFEST
    try:
        raw = read_bounded(path, MAX_MANIFEST_BYTES)
    except BadInputError as error:
        raise type(error)(error.message, where=error.where, hint=_NO_MANIFEST) from error
    manifest = parse_manifest(raw, str(path))
    if verify:
        for name, entry in manifest.files.items():
            verify_file(root / name, entry)
    return Bundle(root, manifest)


def verify_file(path: Path, entry: FileEntry) -> None:
    """Compares one file with its entry in the manifest.

    Raises:
        IntegrityError: missing, not a regular file (links are refused), of another size or digest.
        BadInputError: it cannot be read.
    """
    hint = "copy or download the bundle again"
    try:
        if path.is_symlink() or not path.is_file():
            raise IntegrityError("missing, or not a regular file", where=str(path), hint=hint)
        size = path.stat().st_size
        if size != entry.size:
            raise IntegrityError(f"{size} bytes; the manifest says {entry.size}", where=str(path), hint=hint)
        actual = digest_file(path)
    except OSError as error:
        raise BadInputError(f"cannot read: {error.strerror}", where=str(path)) from error
    if actual != entry.sha256:
        raise IntegrityError(
            f"altered: its digest is {actual}, the manifest says {entry.sha256}", where=str(path), hint=hint
        )
