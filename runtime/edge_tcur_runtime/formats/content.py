"""Small files of a bundle: read once, and what was read is what the manifest promises.

`edge_tcur_runtime.formats.bundle.open_bundle` verified them some time before; they may have been swapped
since.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_tcur_runtime.errors import FileFormatError, IntegrityError
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.bundle import MANIFEST, FileEntry
from edge_tcur_runtime.formats.digest import digest_bytes

_HINT = "copy or download the bundle again"


def read_content(root: Path, files: Mapping[str, FileEntry], name: str, limit: int | None = None) -> bytes:
    """The bytes of the file `name` of the bundle at `root`.

    Args:
        files: the entries of its manifest.
        limit: the most bytes that it may have; None takes what the manifest says.

    Raises:
        FileFormatError: not listed in the manifest, or larger than the limit.
        IntegrityError: missing, a link, of another size, or not what the manifest promises.
        BadInputError: it cannot be read.
    """
    if name not in files:
        where = str(root / MANIFEST)
        raise FileFormatError(f"{name!r} is used but not listed under 'files'", where=where)
    path, entry = root / name, files[name]
    if limit is not None and entry.size > limit:
        raise FileFormatError(f"{entry.size} bytes; the limit is {limit}", where=str(path))
    if path.is_symlink() or not path.is_file():
        raise IntegrityError("missing, or not a regular file", where=str(path), hint=_HINT)
    size = path.stat().st_size
    if size != entry.size:
        raise IntegrityError(f"{size} bytes; the manifest says {entry.size}", where=str(path), hint=_HINT)
    raw = read_bounded(path, entry.size)
    actual = digest_bytes(raw)
    if actual != entry.sha256:
        raise IntegrityError(
            f"altered: its digest is {actual}, the manifest says {entry.sha256}",
            where=str(path),
            hint=_HINT,
        )
    return raw
