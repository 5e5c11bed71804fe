"""The run directory: what `train` writes and `eval`, `export` and `inspect` read.

``run.json``  format version, resolved configuration, labels, base digest, preprocessing, metrics
``adapter.safetensors``  the trained adapter
``tokenizer.json``  text only
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from edge_tcur.errors import RunDirectoryError
from edge_tcur.settings import TrainConfig, config_from_dict
from edge_tcur_runtime.atomic import disk_error, fsync_directory, write_atomic
from edge_tcur_runtime.errors import ConfigError, FileFormatError, FormatVersionError, OutputExistsError
from edge_tcur_runtime.formats.adapter import Adapter, read_adapter, read_bounded
from edge_tcur_runtime.formats.bundle import MANIFEST
from edge_tcur_runtime.formats.schema import Fields, parse_json

FORMAT_VERSION = 1
RUN_FILE = "run.json"
ADAPTER_FILE = "adapter.safetensors"
_OURS = (RUN_FILE, MANIFEST)  # a directory that --force may replace holds one of them
_MAX_RUN_BYTES = 16 * 2**20
_WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        root: its directory.
        config: the resolved configuration.
        labels: class names in output order.
        base_digest: digest of the base that was trained on.
        preprocessing: how data become inputs.
        metrics: accuracies (0 to 1), losses per step, counts and seconds.
    """

    root: Path
    config: TrainConfig
    labels: tuple[str, ...]
    base_digest: str
    preprocessing: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def adapter_path(self) -> Path:
        """The adapter file."""
        return self.root / ADAPTER_FILE

    def adapter(self) -> Adapter:
        """The adapter, verified."""
        return read_adapter(self.adapter_path)


def serialize_run(run: Run) -> bytes:
    """The bytes of ``run.json``."""
    document = asdict(run)
    del document["root"]
    return (json.dumps({"format_version": FORMAT_VERSION, **document}, indent=1) + "\n").encode()


def write_run(root: Path, run: Run) -> None:
    """Writes ``run.json`` old-or-new."""
    write_atomic(root / RUN_FILE, serialize_run(run))


def open_run(root: Path) -> Run:
    """Opens a run directory.

    Raises:
        RunDirectoryError: not a run directory, or of another format version.
    """
    path = root / RUN_FILE
    if not path.is_file():
        raise RunDirectoryError(
            "not a run directory (it has no run.json)",
            where=str(root),
            hint="give the directory that 'edge-tcur train --out' wrote",
        )
    try:
        fields = Fields(parse_json(read_bounded(path, _MAX_RUN_BYTES), str(path)), str(path))
        version = fields.integer("format_version")
        if version != FORMAT_VERSION:
            raise RunDirectoryError(
                f"format version {version}; this version reads {FORMAT_VERSION}",
                where=str(path),
                hint="train again with this version",
            )
        return Run(
            root,
            config_from_dict(fields.mapping("config"), str(path)),
            fields.texts("labels"),
            fields.text("base_digest"),
            fields.mapping("preprocessing"),
            fields.mapping("metrics"),
        )
    except (FileFormatError, FormatVersionError, ConfigError) as error:
        raise RunDirectoryError(
            error.message, where=error.where or str(path), hint="train again; this directory is damaged"
        ) from error


@contextmanager
def new_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    Yields a temporary directory beside `target`, renamed to `target` when the block ends well and
    removed when it does not.

    Raises:
        OutputExistsError: `target` exists and is not an empty directory (unless `force`), or holds
            the current directory.
        DiskError: it cannot be written.
    """
    _check_target(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise disk_error(error, target) from error
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno not in _WRITE_ERRNOS:  # reading something else failed
                raise
            raise disk_error(error, target) from error
        try:
            temporary.chmod(0o755)
            _replace_directory(temporary, target)
        except OSError as error:
            raise disk_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, force: bool) -> None:
    place = target.resolve()
    if place == Path.cwd() or place in Path.cwd().parents:
        raise OutputExistsError(
            "the output directory is, or holds, the current directory",
            where=str(target),
            hint="name a new directory inside it",
        )
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not empty and force and not any((target / name).is_file() for name in _OURS):
        raise OutputExistsError(
            "--force replaces a run or a bundle; this is neither",
            where=str(target),
            hint="choose another --out, or remove it yourself",
        )
    if not empty and not force:
        raise OutputExistsError(
            "the output directory is not empty",
            where=str(target),
            hint="choose another --out, or say --force to replace it",
        )


def _replace_directory(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`; an old directory is moved aside first, then removed."""
    aside = None
    if target.exists():
        aside = Path(mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / target.name
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    fsync_directory(target.parent)
    if aside is not None:
        shutil.rmtree(aside.parent, ignore_errors=True)
