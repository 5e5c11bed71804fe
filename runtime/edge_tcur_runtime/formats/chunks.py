"""The index of a published bundle: every file in chunks of one size, each named by its SHA-256.

The index is the signed target; chunks lie under ``targets/chunks/`` and are verified against it, so that
a broken download goes on where it stopped, and a bundle costs the targets metadata one entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.adapter import check_version
from edge_tcur_runtime.formats.bundle import MANIFEST
from edge_tcur_runtime.formats.schema import Fields, parse_document

FORMAT_VERSION = 1
KIND = "edge-tcur-bundle-index"
CHUNK_BYTES = 4 * 2**20
MAX_CHUNK_BYTES = 64 * 2**20
MAX_FILES = 256
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ChunkedFile:
    """One file: size in bytes, ``sha256:<hex>`` of the whole, and the SHA-256 (hex) of each chunk."""

    size: int
    sha256: str
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class BundleIndex:
    """The files of a bundle, its manifest included; `chunk` bytes each chunk, the last ones shorter."""

    chunk: int
    files: Mapping[str, ChunkedFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def count(self) -> int:
        """Chunks of all files."""
        return sum(len(file.chunks) for file in self.files.values())


def chunk_path(digest: str) -> str:
    """Where a chunk lies in the repository."""
    return f"targets/chunks/{digest[:2]}/{digest}"


def serialize_index(index: BundleIndex) -> bytes:
    """The bytes of the index."""
    document = {"format_version": FORMAT_VERSION, "kind": KIND, **asdict(index)}
    return (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode()


def parse_index(raw: bytes, where: str) -> BundleIndex:
    """An index from its (verified) bytes.

    Raises:
        FileFormatError: malformed, a name that leaves the directory, counts and sizes that disagree.
        FormatVersionError: written by a newer version.
    """
    fields = Fields(parse_document(raw, where), where)
    check_version(fields, FORMAT_VERSION)
    fields.only("format_version", "kind", "chunk", "files").choice("kind", (KIND,))
    chunk = fields.integer("chunk", low=1, high=MAX_CHUNK_BYTES)
    files = {name: _parse_file(name, child, chunk) for name, child in fields.children("files").items()}
    if MANIFEST not in files or len(files) > MAX_FILES:
        raise FileFormatError(f"no {MANIFEST!r}, or more than {MAX_FILES} files", where=where)
    return BundleIndex(chunk, files)


def _parse_file(name: str, fields: Fields, chunk: int) -> ChunkedFile:
    if not name.isprintable() or "/" in name or "\\" in name or name.startswith(".") or not name:
        raise FileFormatError(f"the file name {name!r} is not allowed", where=fields.where)
    fields.only("size", "sha256", "chunks")
    size, chunks = fields.integer("size"), fields.texts("chunks")
    if len(chunks) != -(-size // chunk) or not all(_HEX.fullmatch(digest) for digest in chunks):
        raise FileFormatError("the chunks do not make up the size", where=fields.where)
    return ChunkedFile(size, fields.text("sha256"), chunks)
