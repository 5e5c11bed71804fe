"""Files of a repository: those that nothing signed refers to any more, and those that are damaged."""

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

    Empty where a newer publisher's entries are listed: what these refer to is not known.

    Raises:
        IntegrityError: a bundle's index is not the signed one: what it refers to is not known.
    """
    if change.catalogue.skipped:
        return {}
    used = {str(path.relative_to(repository.folder)) for path in _indexes(repository, change)}
    used |= {chunk_path(digest) for digest in _chunks(repository, change)}
    for offer in change.catalogue.adapters:
        used.add(target_place(offer.entry.path, offer.entry.sha256))
        used.add(f"{CARDS}/{offer.facts.name}-{offer.facts.version}.md")
    files = [path for top in (TARGETS, CARDS) for path in (repository.folder / top).rglob("*")]
    found = {str(p.relative_to(repository.folder)): p.stat().st_size for p in sorted(files) if p.is_file()}
    return {path: size for path, size in found.items() if path not in used}


def damaged(repository: Repository, change: Change) -> dict[str, str]:
    """Path -> what to run, of each file of an adapter or a bundle that is listed and is missing or damaged.

    Devices then keep what they have. Every file is read.

    Raises:
        IntegrityError: see `unreferenced`.
    """
    found = {}
    for offer in change.catalogue.adapters:
        place = target_place(offer.entry.path, offer.entry.sha256)
        if not repository.holds(place, offer.entry.sha256):
            found[place] = f"'edge-tcur publish add' of that file of {offer.facts.name}"
    for digest, name in _chunks(repository, change).items():
        if not repository.holds(chunk_path(digest), digest):
            found[chunk_path(digest)] = f"'edge-tcur publish bundle' of the bundle with --name {name}"
    return found


def clean(repository: Repository, days: float = GRACE_DAYS) -> dict[str, int]:
    """Removes what is not referenced, and was not touched for `days`; returns it.

    Nothing is removed while a bundle was published less than `days` ago.

    Raises:
        IntegrityError: see `unreferenced`. DiskError: a file cannot be removed.
    """
    end = time.time() - days * 86400
    with repository.keys.locked():
        change = repository.load()
        found = unreferenced(repository, change)
        if any(path.stat().st_mtime > end for path in _indexes(repository, change)):
            return {}
        old = {path: size for path, size in found.items() if _touched(repository, path) <= end}
        for path in old:
            repository.remove_file(path)
    return old


def _touched(repository: Repository, path: str) -> float:
    return (repository.folder / path).stat().st_mtime


def _indexes(repository: Repository, change: Change) -> dict[Path, str]:
    """The index of each bundle -> the bundle's name."""
    return {
        repository.folder / target_place(offer.entry.path, offer.entry.sha256): offer.facts.name
        for offer in change.catalogue.bundles
    }


def _chunks(repository: Repository, change: Change) -> dict[str, str]:
    """SHA-256 (hex) of each chunk -> name of the bundle that it belongs to."""
    found = dict[str, str]()
    for path, name in _indexes(repository, change).items():
        hint = "publish the bundle again ('edge-tcur publish bundle')"
        try:
            raw = read_bounded(path, _MAX_INDEX)
        except BadInputError as error:
            raise BadInputError(error.message, where=str(path), hint=hint) from error
        if digest_bytes(raw) != PREFIX + path.name.partition(".")[0]:
            raise IntegrityError("not the index that is signed", where=str(path), hint=hint)
        for file in parse_index(raw, str(path)).files.values():
            found |= dict.fromkeys(file.chunks, name)
    return found
