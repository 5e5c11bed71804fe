"""Bundles: shipping the trusted root with one, and publishing one in chunks for first installation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge_tcur.publish.repository import Repository
from edge_tcur_runtime.atomic import write_atomic
from edge_tcur_runtime.errors import BadInputError
from edge_tcur_runtime.formats.bundle import (
    MANIFEST,
    Bundle,
    FileEntry,
    open_bundle,
    serialize_manifest,
)
from edge_tcur_runtime.formats.chunks import (
    CHUNK_BYTES,
    BundleIndex,
    ChunkedFile,
    chunk_path,
    serialize_index,
)
from edge_tcur_runtime.formats.digest import digest_bytes, digest_file
from edge_tcur_runtime.formats.offer import (
    EXTRA,
    BundleFacts,
    BundleOffer,
    bundle_path,
    check_offer_name,
    serialize_bundle_facts,
)
from edge_tcur_runtime.update.run import ROOT_FILE

Progress = Callable[[int, int], None]


def trust(bundle: Path, repository: Repository) -> str:
    """Writes the repository's root into a bundle and its manifest; returns the root's digest.

    The manifest is written last: a bundle that was interrupted is as it was before.

    Raises:
        IntegrityError: the bundle is damaged. DiskError: it cannot be written.
    """
    opened = open_bundle(bundle)
    raw = repository.root_bytes()
    manifest = _with_root(opened, raw)
    if (bundle / ROOT_FILE).exists() and opened.manifest.files.get(ROOT_FILE) == manifest[1]:
        return manifest[1].sha256
    write_atomic(bundle / ROOT_FILE, raw)
    write_atomic(bundle / MANIFEST, manifest[0])
    return manifest[1].sha256


def add_bundle(
    repository: Repository,
    bundle: Path,
    name: str,
    *,
    chunk: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> tuple[BundleOffer, BundleIndex]:
    """Publishes a bundle, with the trusted root in it, in chunks; older versions of it are taken out.

    Raises:
        UsageError: a name that is not allowed. IntegrityError: the bundle is damaged.
    """
    check_offer_name(name)
    opened = open_bundle(bundle)
    manifest, root = _with_root(opened, repository.root_bytes())
    own = {MANIFEST: manifest, ROOT_FILE: repository.root_bytes()}
    if digest_bytes(own[ROOT_FILE]) != root.sha256:
        raise BadInputError("the root changed meanwhile; run it again", where=str(repository.folder))
    names = sorted({*opened.manifest.files, *own})
    with repository.changing() as change:
        key = f"bundle:{name}"
        versions = change.targets.signed.unrecognized_fields[EXTRA]["versions"]
        version = versions.get(key, 0) + 1
        files, done = {}, 0
        total = sum(entry.size for entry in opened.manifest.files.values())
        for file in names:
            files[file] = _write_chunks(repository, own.get(file), bundle / file, chunk)
            done += files[file].size
            if progress is not None:
                progress(min(done, total), total)
        index = BundleIndex(chunk, files)
        facts = BundleFacts(name, version, opened.manifest.base_digest)
        for offer in change.catalogue.bundles:
            if offer.facts.name == name:
                repository.remove_target(change, offer.entry.path)
        path, raw = bundle_path(name, version), serialize_index(index)
        repository.add_file(path, raw, custom=serialize_bundle_facts(facts), change=change)
        versions[key] = version
    found = next(offer for offer in change.catalogue.bundles if offer.facts == facts)
    return found, index


def _with_root(bundle: Bundle, root: bytes) -> tuple[bytes, FileEntry]:
    """The bytes of the manifest that lists the root, and the root's entry."""
    entry = FileEntry(len(root), digest_bytes(root))
    files = {**bundle.manifest.files, ROOT_FILE: entry}
    return serialize_manifest(replace(bundle.manifest, files=files)), entry


def _write_chunks(repository: Repository, own: bytes | None, path: Path, chunk: int) -> ChunkedFile:
    """Writes the chunks of a file (or of `own` in its place); a chunk that is there is not written again."""
    digests, size = [], 0
    if own is not None:
        pieces = (own[start : start + chunk] for start in range(0, len(own), chunk))
        written = tuple(_write_chunk(repository, piece) for piece in pieces)
        return ChunkedFile(len(own), digest_bytes(own), written)
    with path.open("rb") as file:
        while piece := file.read(chunk):
            digests.append(_write_chunk(repository, piece))
            size += len(piece)
    return ChunkedFile(size, digest_file(path), tuple(digests))


def _write_chunk(repository: Repository, piece: bytes) -> str:
    digest = hashlib.sha256(piece).hexdigest()
    path = chunk_path(digest)
    if not repository.holds(path, digest):  # also one that was damaged: this is how it is repaired
        repository.write_file(path, piece)
    return digest
