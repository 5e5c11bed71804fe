"""Files of a repository that nothing signed refers to any more: chunks of a replaced bundle, mostly."""

from __future__ import annotations

import time
from pathlib import Path

from edge_tcur.publish.repository import CARDS, Change, Repository
from edge_tcur_runtime.errors import BadInputError, IntegrityError
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.chunks import chunk_path, parse_index
from edge_tcur_runtime.formats.digest import PREFIX, digest_bytes
from edge_tcur_runtime.formats.offer import TARGETS, target_place

GRACE_DAYS = 7.0  # a first installation that was begun before may still go on
_MAX_INDEX = 16 * 2**20


def unreferenced(repository: Repository, change: Change) -> dict[str, int]:
    """Path in the repository -> bytes, of all under ``targets/`` and ``cards/`` that nothing refers to.

    Raises:
        IntegrityError: a bundle's index is not the signed one: what it refers to is not known.
    """
    indexes = _indexes(repository, change)
    used = {str(path.relative_to(repository.folder)) for path in indexes}
    for path in indexes:
        hint = "publish the bundle again ('edge-tcur publish bundle')"
        try:
            raw = read_bounded(path, _MAX_INDEX)
        except BadInputError as error:
            raise BadInputError(error.message, where=str(path), hint=hint) from error
        if digest_bytes(raw) != PREFIX + path.name.partition(".")[0]:
            raise IntegrityError("not the index that is signed", where=str(path), hint=hint)
        for file in parse_index(raw, str(path)).files.values():
            used |= {chunk_path(digest) for digest in file.chunks}
    for offer in change.catalogue.adapters:
        used.add(target_place(offer.entry.path, offer.entry.sha256))
        used.add(f"{CARDS}/{offer.facts.name}-{offer.facts.version}.md")
    used |= {f"{TARGETS}/{path}" for path in change.catalogue.skipped}
    files = [path for top in (TARGETS, CARDS) for path in (repository.folder / top).rglob("*")]
    found = {str(p.relative_to(repository.folder)): p.stat().st_size for p in sorted(files) if p.is_file()}
    return {path: size for path, size in found.items() if path not in used}


def damaged(repository: Repository, change: Change) -> list[str]:
    """Paths of the listed adapters whose files are missing or damaged; devices then keep what they have."""
    places = {
        target_place(offer.entry.path, offer.entry.sha256): offer.entry.sha256
        for offer in change.catalogue.adapters
    }
    return [place for place, sha256 in places.items() if not repository.holds(place, sha256)]


def clean(repository: Repository, days: float = GRACE_DAYS) -> dict[str, int]:
    """Removes what is not referenced, and was not touched for `days`; returns it.

    Nothing is removed while a bundle was published less than `days` ago, or where a newer
    publisher's entries are listed: what these refer to is not known.

    Raises:
        IntegrityError: see `unreferenced`. DiskError: a file cannot be removed.
    """
    end = time.time() - days * 86400
    with repository.keys.locked():
        change = repository.load()
        found = unreferenced(repository, change)
        if change.catalogue.skipped or any(p.stat().st_mtime > end for p in _indexes(repository, change)):
            return {}
        old = {path: size for path, size in found.items() if _touched(repository, path) <= end}
        for path in old:
            repository.remove_file(path)
    return old


def _touched(repository: Repository, path: str) -> float:
    return (repository.folder / path).stat().st_mtime


def _indexes(repository: Repository, change: Change) -> list[Path]:
    entries = [offer.entry for offer in change.catalogue.bundles]
    return [repository.folder / target_place(entry.path, entry.sha256) for entry in entries]
