"""Checkpoints of a personalisation: killed at any moment, it goes on from the last one, bit for bit.

Layout of a checkpoint file (format version 1), never pickle
    first line   ``edge-tcur-checkpoint 1 sha256:<hex> <bytes>``: digest and size of what follows
    the rest     safetensors: ``values.*``, ``first.*``, ``second.*`` f64 (trained values and the optimiser's
                 state), ``best.*`` f64 (the values to keep, where they are others), and one JSON document

The order of the data needs no place in it: it follows from the seed and the number of updates done.

Two files are written in turn, old-or-new, each with a generation number; the valid one with the higher
generation holds. A checkpoint belongs to one run (`identify`): base, start, data and settings.
`Progress` and the file's bytes are pure; `Checkpoints` reads and writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from edge_tcur_runtime.atomic import disk_error, write_atomic
from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.errors import (
    BadInputError,
    FileFormatError,
    FormatVersionError,
    IncompatibleError,
    IntegrityError,
)
from edge_tcur_runtime.formats.adapter import Adapter, read_bounded, serialize_adapter
from edge_tcur_runtime.formats.bundle import Bundle, serialize_manifest
from edge_tcur_runtime.formats.digest import digest_bytes, digest_tensors
from edge_tcur_runtime.formats.schema import Fields, parse_document
from edge_tcur_runtime.settings import PersonalizeSettings

FORMAT_VERSION = 1
FILES = ("checkpoint-0", "checkpoint-1")
FINISHED = "finished"  # the record of a run that has ended (`edge_tcur_runtime.finished`)
MAX_FILE_BYTES = 512 * 2**20  # four float64 copies of the largest adapter, and what is around them
_MAGIC = "edge-tcur-checkpoint"
_MAX_LINE = 160  # bytes of the first line
_KEY = "edge_tcur_checkpoint"
_ARRAYS = ("values", "first", "second", "best")
_NUMBERS = ("losses", "scores", "held_out_losses", "before", "after", "reference_before")
_WHOLE = ("predicted", "threads")  # numbers that may be absent, for 0
ENGINE = "engine"  # of an identity: engine and provider
_FREE = ("budget",)  # settings that may change between a run and its continuation


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all that its next step depends on.

    Attributes:
        steps: updates done.
        values: trained values by name, float64, in the frame's coordinates.
        first, second: the optimiser's state by name, float64; empty before the first update.
        best: the values to keep so far, by name, float64; empty where those are `values`.
        losses: of every update; scores, held_out_losses: on the held-out part, of every epoch that ended.
        before, after: score and mean loss on the held-out part, of the start and of what is kept, or None.
        reference_before: score and mean loss of the start on the bundle's reference set, or None.
        noise_key: of the run's randomness (`edge_tcur_runtime.privacy`), a secret; empty without privacy.
        micro_batch: samples per pass; limits: of each length in tokens, where they differ.
        engine: that ran, empty where it is not said; graph: role of the bundle's graph that it ran.
        predicted: bytes at the peak that the run was accepted under a budget with; 0 where none was planned.
        threads: CPU threads that it ran on; 0 where it is not said.
    """

    steps: int
    values: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray]
    second: Mapping[str, np.ndarray]
    best: Mapping[str, np.ndarray] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    held_out_losses: tuple[float, ...] = ()
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None
    reference_before: tuple[float, float] | None = None
    noise_key: str = ""
    micro_batch: int = 1
    graph: str = "step"
    limits: Mapping[int, int] = field(default_factory=dict)
    engine: str = ""
    predicted: int = 0
    threads: int = 0


def identify(
    bundle: Bundle, start: Adapter, dataset: Dataset, settings: PersonalizeSettings
) -> dict[str, str]:
    """What a checkpoint must agree with to go on: digests of bundle, start and data, and the settings. A run
    adds what it runs on (`ENGINE`)."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    return {
        "base": bundle.manifest.base_digest,
        "bundle": digest_bytes(serialize_manifest(bundle.manifest)),
        "start": digest_bytes(serialize_adapter(start)),
        "data": _digest_data(dataset),
        "settings": json.dumps(chosen, sort_keys=True),
    }


def _digest_data(dataset: Dataset) -> str:
    arrays = [("targets", dataset.targets)] if dataset.targets is not None else []
    texts: dict[str, object] = {"reads": dataset.reads, "labels": dataset.labels, "names": dataset.names}
    if isinstance(dataset.samples, np.ndarray):
        arrays.append(("samples", dataset.samples))
    else:
        texts["samples"] = list(dataset.samples)
    return digest_bytes(json.dumps([digest_tensors(arrays), texts]).encode())


def serialize_checkpoint(progress: Progress, identity: Mapping[str, str], generation: int) -> bytes:
    """The bytes of a checkpoint file; `generation` counts the writes."""
    tensors = {
        f"{part}.{name}": np.asarray(value, "<f8", order="C")
        for part in _ARRAYS
        for name, value in getattr(progress, part).items()
    }
    document = {
        "generation": generation,
        "identity": dict(identity),
        "steps": progress.steps,
        "noise_key": progress.noise_key,
        "micro_batch": progress.micro_batch,
        "graph": progress.graph,
        "engine": progress.engine,
        "limits": {str(length): samples for length, samples in progress.limits.items()},
        **{key: getattr(progress, key) for key in _WHOLE if getattr(progress, key)},
        # As text, so that every bit comes back and a loss that is no number is no bad JSON.
        **{key: [value.hex() for value in getattr(progress, key) or ()] for key in _NUMBERS},
    }
    content = safetensors.numpy.save(tensors, {_KEY: json.dumps(document)})
    line = f"{_MAGIC} {FORMAT_VERSION} {digest_bytes(content)} {len(content)}\n"
    return line.encode() + content


def parse_checkpoint(raw: bytes, where: str) -> tuple[Progress, dict[str, str], int]:
    """Progress, identity and generation from the bytes of a checkpoint file.

    Raises:
        FileFormatError: no checkpoint file.
        FormatVersionError: written by a newer version.
        IntegrityError: cut or altered.
    """
    content = _checked_content(raw, where)
    try:
        entries = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
        tensors = {
            name: np.frombuffer(entry["data"], {"F64": "<f8"}[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in entries
        }
        table = parse_document(content[8 : 8 + int.from_bytes(content[:8], "little")], where)
        document = table["__metadata__"][_KEY].encode()
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"not a checkpoint: {error}", where=where) from error
    fields = Fields(parse_document(document, where), where)
    names, identity = fields.child("identity"), {}
    for key in names.mapping_keys():
        identity[key] = names.text(key)
    return _parse_progress(fields, tensors), identity, fields.integer("generation", low=1)


def _parse_progress(fields: Fields, tensors: Mapping[str, np.ndarray]) -> Progress:
    fields.only("generation", "identity", *(set(Progress.__dataclass_fields__) - set(_ARRAYS)))
    arrays: dict[str, dict[str, np.ndarray]] = {part: {} for part in _ARRAYS}
    for name, value in tensors.items():
        part, _, own = name.partition(".")
        if part not in arrays:
            raise FileFormatError(f"the tensor {name!r} is not known", where=fields.where)
        arrays[part][own] = value
    return Progress(
        steps=fields.integer("steps"),
        losses=_numbers(fields, "losses"),
        scores=_numbers(fields, "scores"),
        held_out_losses=_numbers(fields, "held_out_losses"),
        before=_pair(fields, "before"),
        after=_pair(fields, "after"),
        reference_before=_pair(fields, "reference_before"),
        noise_key=fields.text("noise_key"),
        micro_batch=fields.integer("micro_batch", low=1),
        graph=fields.text("graph"),
        limits=_limits(fields),
        engine=fields.optional_text("engine") or "",
        predicted=_whole(fields, "predicted"),
        threads=_whole(fields, "threads"),
        **arrays,
    )


def _whole(fields: Fields, key: str) -> int:
    return 0 if fields.is_null(key) else fields.integer(key)


def _limits(fields: Fields) -> dict[int, int]:
    if "limits" not in fields.mapping_keys():
        return {}
    child = fields.child("limits")
    if not all(key.isascii() and key.isdigit() for key in child.mapping_keys()):
        raise FileFormatError("the field 'limits' must be keyed by lengths", where=fields.where)
    return {int(key): child.integer(key, low=1) for key in child.mapping_keys()}


def _checked_content(raw: bytes, where: str) -> bytes:
    """What follows the first line, after size and digest were compared."""
    line, _, content = raw.partition(b"\n")
    words = line[:_MAX_LINE].split(b" ")
    whole = len(line) <= _MAX_LINE and len(words) == 4 and words[0] == _MAGIC.encode()
    if not whole or not words[1].isdigit() or words[1].startswith(b"0"):
        raise FileFormatError("not a checkpoint file", where=where)
    if int(words[1]) > FORMAT_VERSION:
        raise FormatVersionError(
            f"format version {int(words[1])} is newer than {FORMAT_VERSION}",
            where=where,
            hint="update edge-tcur-runtime on this machine, or start over with --resume no",
        )
    promised = b" ".join(words[2:])
    if promised != f"{digest_bytes(content)} {len(content)}".encode():
        raise IntegrityError("the checkpoint was cut or altered", where=where)
    return content


def _numbers(fields: Fields, key: str) -> tuple[float, ...]:
    try:
        return tuple(float.fromhex(value) for value in fields.texts(key))
    except ValueError as error:
        raise FileFormatError(f"the field {key!r} must hold numbers: {error}", where=fields.where) from error


def _pair(fields: Fields, key: str) -> tuple[float, float] | None:
    """Two numbers, or None for an empty list."""
    values = _numbers(fields, key)
    if len(values) not in (0, 2):
        raise FileFormatError(f"the field {key!r} must hold two numbers or none", where=fields.where)
    return (values[0], values[1]) if values else None


@dataclass
class Checkpoints:
    """The two checkpoint files of one run in `directory` (0700; they tell about the user's data).

    Attributes:
        directory: made by `hold`.
        identity: of the run (`identify`).
        warnings: lines about damaged files, which are passed over.
    """

    directory: Path
    identity: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)
    _generation: int = 0
    _slot: int = 1
    _lock: int | None = None
    _made: list[Path] = field(default_factory=list)

    def hold(self) -> None:
        """Keeps other processes away from the directory until `release`, or until this process ends.

        Raises:
            BadInputError: another process holds it.
            DiskError: the directory cannot be made.
        """
        try:
            while not self._take():
                self.release()
        except BlockingIOError as error:
            self.release()
            raise BadInputError(
                "another process is training with these checkpoints",
                where=str(self.directory),
                hint="wait until it has finished",
            ) from error
        except OSError as error:
            raise disk_error(error, self.directory) from error

    def _take(self) -> bool:
        """Locks the directory; False where it was removed meanwhile (by `remove` of another process)."""
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self._made += missing
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._lock), self.directory.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets other processes use the directory; where nothing was saved, it is gone again."""
        for directory in self._made:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()
        self._made.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self) -> Progress | None:
        """The newest whole checkpoint, or None where there is none.

        Raises:
            IncompatibleError: it is of another run; what differs is named.
            FormatVersionError: written by a newer version.
            BadInputError: it cannot be read.
        """
        newest = self._newest()
        if newest is None:
            return None
        differing = [key for key, value in self.identity.items() if newest[1].get(key) != value]
        if differing:
            raise IncompatibleError(
                f"the checkpoint is of another run: {', '.join(differing)} differ",
                where=str(self.directory),
                hint="finish that run with its own data and settings, or start over with --resume no",
            )
        return newest[0]

    def engine(self) -> str | None:
        """What the checkpointed run of `identity`, which does not say it, ran on; None where there is no
        checkpoint of that run.

        Raises:
            FormatVersionError, BadInputError: see `load`.
        """
        newest = self._newest()
        if newest is None or any(newest[1].get(key) != value for key, value in self.identity.items()):
            return None
        return newest[1].get(ENGINE)

    def _newest(self) -> tuple[Progress, dict[str, str]] | None:
        """The newest whole checkpoint with the identity of its run."""
        newest: tuple[Progress, dict[str, str]] | None = None
        for slot, name in enumerate(FILES):
            path = self.directory / name
            try:
                progress, identity, generation = parse_checkpoint(_read(path), str(path))
            except FileNotFoundError:
                continue
            except (FileFormatError, IntegrityError) as error:
                self.warnings.append(f"{error}; this copy is not used")
                continue
            if generation > self._generation:
                self._generation, self._slot, newest = generation, slot, (progress, identity)
        return newest

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint over the older of the two.

        Raises:
            DiskError: it could not be written; the newest one before it is still whole.
        """
        raw = serialize_checkpoint(progress, self.identity, self._generation + 1)
        write_atomic(self.directory / FILES[1 - self._slot], raw, mode=0o600)
        self._generation, self._slot = self._generation + 1, 1 - self._slot

    def clear(self) -> None:
        """Removes the checkpoints: the run has ended, or another one takes their place. The record goes last:
        as long as anything is there, it says that the run has ended.

        Raises:
            DiskError: they cannot be removed.
        """
        try:
            for name in (*FILES, FINISHED):
                for path in (self.directory / name, *self.directory.glob(f".{name}.*.tmp")):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.directory) from error
        self._generation, self._slot = 0, 1

    def remove(self) -> None:
        """Removes the checkpoints and their directory, and the one above it where that is empty.

        Raises:
            BadInputError: another process trains with them.
            DiskError: they cannot be removed.
        """
        if self.directory.is_dir():
            self.hold()
            try:
                self.clear()
                for directory in (self.directory, self.directory.parent):
                    with contextlib.suppress(OSError):  # not empty: something else lies there
                        directory.rmdir()
            finally:
                self.release()


def _read(path: Path) -> bytes:
    """The bytes of a checkpoint file; FileNotFoundError where there is none."""
    try:
        return read_bounded(path, MAX_FILE_BYTES)
    except BadInputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise
