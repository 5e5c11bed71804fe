"""First installation: a published bundle, fetched in chunks that survive a broken connection."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_tcur_runtime.atomic import disk_error, fsync_directory, write_atomic
from edge_tcur_runtime.errors import (
    DiskError,
    IntegrityError,
    OutputExistsError,
    TrustError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.bundle import FileEntry, open_bundle, verify_file
from edge_tcur_runtime.formats.chunks import BundleIndex, ChunkedFile, chunk_path, parse_index
from edge_tcur_runtime.formats.offer import BundleOffer, target_place
from edge_tcur_runtime.units import format_size
from edge_tcur_runtime.update.client import refresh, repository_id, signed_content
from edge_tcur_runtime.update.fetch import Download, FileTransport, HttpTransport, Limits, Progress, fetch
from edge_tcur_runtime.update.floor import StateFile, check_floor, check_time

_INDEX = "index.json"
_CHUNK = "chunk"
Place = HttpTransport | FileTransport


@dataclass(frozen=True)
class Installed:
    """A bundle that was fetched: its directory, base digest, and what it cost."""

    root: Path
    base_digest: str
    size: int
    requests: int
    received: int


def install_bundle(
    target: Path,
    name: str | None,
    trusted: bytes,
    states: StateFile,
    place: Place,
    *,
    limits: Limits,
    now: int,
    progress: Progress | None = None,
) -> Installed:
    """Fetches a published bundle into `target`, which appears whole or not at all.

    A download that broke off is continued by the next call (``.<target>.partial`` beside it).

    Args:
        name: of the bundle; None where the repository has one only.
        trusted: root metadata that came by another way.
        now: seconds since 1970.

    Raises:
        OutputExistsError: `target` is there already.
        UsageError: no such bundle, or several; or larger than the limit.
        TrustError, NetworkError, DiskError: see `edge_tcur_runtime.update.run`.
    """
    if target.exists():
        hint = "it is installed once: leave out --install to update its adapter"
        raise OutputExistsError("the bundle is already there", where=str(target), hint=hint)
    with states.locked():
        state = states.read().of_repository(repository_id(trusted))
        verified = refresh(place, trusted, states.folder / "metadata", limits)
        check_floor(verified.versions, state.floor)
        check_time(now, max(state.known_good, verified.issued), verified.expires)
        offer = choose_bundle(verified.catalogue.bundles, name)
        work = _work_directory(target, offer.entry.sha256)
        index = _fetch_index(offer, work, place, limits)
        if isinstance(place, HttpTransport):
            place.allowed += 2 * index.count
        _fetch_files(index, work, place, progress)
        digest = _finish(index, work, target, offer)
        states.write(state.raised(verified.versions, now))
    return Installed(target, digest, index.size, place.counters.requests, place.counters.received)


def choose_bundle(offers: tuple[BundleOffer, ...], name: str | None) -> BundleOffer:
    """The newest bundle of that name; UsageError where there is none, or several and none was named."""
    names = sorted({offer.facts.name for offer in offers})
    if name is None and len(names) == 1:
        name = names[0]
    found = [offer for offer in offers if offer.facts.name == name]
    if not found:
        listed = ", ".join(names) or "none"
        raise UsageError(f"which bundle? published: {listed}", hint="choose one with --bundle-name")
    return max(found, key=lambda offer: offer.facts.version)


def _work_directory(target: Path, version: str) -> Path:
    """The directory of an unfinished download; one of another version is emptied."""
    work = target.parent / f".{target.name}.partial"
    marker = work / ".version"
    try:
        if work.exists() and (not marker.is_file() or marker.read_text() != version):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        if not marker.is_file():
            write_atomic(marker, version.encode())
    except OSError as error:
        raise disk_error(error, work) from error
    return work


def _fetch_index(offer: BundleOffer, work: Path, place: Place, limits: Limits) -> BundleIndex:
    entry = offer.entry
    if entry.size > limits.index_bytes:
        raise UsageError(
            f"its index has {entry.size} bytes; the limit is {limits.index_bytes}", where=entry.path
        )
    part = work / f".{_INDEX}"
    path = target_place(entry.path, entry.sha256)
    fetch(Download(path, entry.size, entry.sha256, part), place)
    with signed_content("malformed"):
        index = parse_index(read_bounded(part, limits.index_bytes), entry.path)
    if index.size > limits.bundle_bytes:
        raise UsageError(
            f"the bundle has {format_size(index.size)}; the limit is {format_size(limits.bundle_bytes)}",
            where=entry.path,
            hint="nothing of it was fetched; --max-bundle allows more",
        )
    return index


def _fetch_files(index: BundleIndex, work: Path, place: Place, progress: Progress | None) -> None:
    done = 0

    def arrived(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, index.size)

    for name, file in index.files.items():
        if _is_whole(work / name, file):
            arrived(file.size)
        else:
            _fetch_file(index.chunk, file, work / name, place, arrived)


def _is_whole(path: Path, file: ChunkedFile) -> bool:
    """Whether an earlier download finished this file; one of its size that does not match is removed."""
    try:
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        verify_file(path, FileEntry(file.size, file.sha256))
    except IntegrityError:
        path.unlink(missing_ok=True)
        return False
    return True


def _fetch_file(
    chunk: int, file: ChunkedFile, path: Path, place: Place, arrived: Callable[[int], None]
) -> None:
    """Appends the chunks that are missing; the whole is verified at the end."""
    part = path.parent / f".{_CHUNK}"
    try:
        have = min(path.stat().st_size // chunk, len(file.chunks)) if path.exists() else 0
        arrived(have * chunk)
        with path.open("r+b" if path.exists() else "w+b") as out:
            out.truncate(have * chunk)
            out.seek(have * chunk)
            for number in range(have, len(file.chunks)):
                size = min(chunk, file.size - number * chunk)
                digest = file.chunks[number]
                fetch(Download(chunk_path(digest), size, digest, part), place)
                out.write(part.read_bytes())
                out.flush()
                os.fsync(out.fileno())
                part.unlink()
                arrived(size)
    except OSError as error:
        raise disk_error(error, path) from error
    _verify(path, FileEntry(file.size, file.sha256))


def _verify(path: Path, entry: FileEntry) -> None:
    try:
        verify_file(path, entry)
    except IntegrityError:
        path.unlink(missing_ok=True)  # an earlier, damaged part: the next try fetches it anew
        raise


def _finish(index: BundleIndex, work: Path, target: Path, offer: BundleOffer) -> str:
    """Checks the whole bundle, makes it durable and gives it its name; returns its base digest."""
    try:
        for path in list(work.iterdir()):
            if path.name not in index.files:
                path.unlink()
        bundle = open_bundle(work)
        if bundle.manifest.base_digest != offer.facts.base:
            raise TrustError("the bundle holds another base than the signed one", where=str(work))
        fsync_directory(work)
        os.rename(work, target)
        fsync_directory(target.parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise DiskError("it appeared meanwhile", where=str(target)) from error
        raise disk_error(error, target) from error
    return bundle.manifest.base_digest
