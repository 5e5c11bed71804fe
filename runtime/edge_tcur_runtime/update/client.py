"""The verified view of a repository: python-tuf's client over our transport, and what it leaves open.

python-tuf does the protocol (roots in turn, then timestamp, snapshot, targets; signatures, thresholds,
versions, lengths, expiry) and keeps its cache in ``update/metadata``. The root that the bundle was shipped
with is given at every start, so a cache that was damaged or wiped heals by itself; that the healed
cache is not older than what was acted upon is the floor's part (`update.floor`).

A metadata file is read as JSON, of bounded size, before its signature can be checked (TUF signs what the
JSON says, not its bytes). Adapters and bundles are not parsed before their digest matches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.ngclient import Updater, UpdaterConfig

from edge_tcur_runtime.atomic import disk_error
from edge_tcur_runtime.errors import EdgeError, FileFormatError, NetworkError, TrustError
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.offer import EXTRA, Catalogue, Entry, parse_catalogue
from edge_tcur_runtime.update.fetch import Limits, Transport, TufFetcher
from edge_tcur_runtime.update.floor import ROLES, Versions

_BASE = "repository:/metadata/"
_TELL = "nothing was changed; tell the publisher"
_SIGNED = {"root": Root, "timestamp": Timestamp, "snapshot": Snapshot, "targets": Targets}


@dataclass(frozen=True)
class Verified:
    """What a refresh found, all of it signed.

    Attributes:
        catalogue: the offers.
        versions: of the four roles, and their keys.
        expires: role -> seconds since 1970.
        issued: when the publisher signed the timestamp, seconds since 1970; 0 where it does not say.
    """

    catalogue: Catalogue
    versions: Versions
    expires: Mapping[str, int]
    issued: int


def refresh(transport: Transport, root: bytes, metadata: Path, limits: Limits) -> Verified:
    """Brings the metadata cache up to date and returns what it says.

    Args:
        root: bytes of the trusted root metadata that came with the bundle.
        metadata: directory of the cache; held by one process at a time.

    Raises:
        TrustError: a signature, version, length, digest or date is not as it must be.
        NetworkError: the server failed, or was too slow.
        DiskError: the cache cannot be written.
    """
    config = UpdaterConfig(
        # python-tuf counts the roots in its cache too: a device would stop at the 32nd of its life
        max_root_rotations=limits.root_rotations + _cached_roots(metadata),
        max_delegations=0,  # adapters stand in the targets role itself
        root_max_length=limits.root_bytes,
        timestamp_max_length=limits.timestamp_bytes,
        snapshot_max_length=limits.snapshot_bytes,
        targets_max_length=limits.targets_bytes,
    )
    try:
        metadata.mkdir(mode=0o700, parents=True, exist_ok=True)
        _drop_leftovers(metadata)
        fetcher = TufFetcher(transport)
        updater = Updater(str(metadata), _BASE, fetcher=fetcher, config=config, bootstrap=root)
        updater.refresh()
    except (RepositoryError, DownloadError) as error:
        raise _user_error(error) from error
    except OSError as error:
        raise disk_error(error, metadata) from error
    return read_verified(metadata, limits)


def repository_id(root: bytes) -> str:
    """The id that the publisher's trusted root gives its repository; "" where it gives none.

    Raises:
        TrustError: not root metadata.
    """
    try:
        signed = Metadata[Root].from_bytes(root).signed
    except RepositoryError as error:
        raise _user_error(error) from error
    extra = signed.unrecognized_fields.get(EXTRA)
    found = extra.get("repository") if isinstance(extra, dict) else None
    return found if isinstance(found, str) else ""


@contextmanager
def signed_content(what: str) -> Iterator[None]:
    """Inside, what is not as its format says is the publisher's fault: TrustError, not FileFormatError.

    Args:
        what: what the signed content is instead, in words.
    """
    try:
        yield
    except FileFormatError as error:
        raise TrustError(f"signed, and {what}: {error.message}", where=error.where, hint=_TELL) from error


def read_verified(metadata: Path, limits: Limits) -> Verified:
    """What a cache says that `refresh` has just verified; the caller holds the update lock."""
    loaded = {role: _load(metadata, role, limits) for role in _SIGNED}
    root, timestamp = cast("Root", loaded["root"]), cast("Timestamp", loaded["timestamp"])
    targets = cast("Targets", loaded["targets"])
    entries = [
        Entry(path, target.length, target.hashes.get("sha256", ""), target.custom)
        for path, target in targets.targets.items()
    ]
    with signed_content("malformed"):
        catalogue = parse_catalogue(targets.unrecognized_fields.get(EXTRA), entries, "targets.json")
    versions = Versions(
        **{role: loaded[role].version for role in ("root", *ROLES)},
        keys={role: _keys_of(root, role) for role in ROLES},
    )
    expires = {role: int(signed.expires.timestamp()) for role, signed in loaded.items()}
    issued = timestamp.unrecognized_fields.get(EXTRA, {})
    seconds = issued.get("issued", 0) if isinstance(issued, dict) else 0
    known = seconds if type(seconds) is int and 0 <= seconds < expires["timestamp"] else 0
    return Verified(catalogue, versions, expires, known)


def _load(metadata: Path, role: str, limits: Limits) -> Signed:
    raw = read_bounded(metadata / f"{role}.json", getattr(limits, f"{role}_bytes"))
    try:
        return cast("Signed", Metadata[Any].from_bytes(raw).signed)
    except RepositoryError as error:
        raise _user_error(error) from error


def _keys_of(root: Root, role: str) -> str:
    """16 hex digits over the keys and the threshold of a role."""
    entry = root.roles[role]
    text = json.dumps([sorted(entry.keyids), entry.threshold])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cached_roots(metadata: Path) -> int:
    return sum(1 for _ in (metadata / "root_history").glob("*.root.json"))


def _drop_leftovers(metadata: Path) -> None:
    """Removes temporary files that python-tuf leaves where it was killed."""
    for path in metadata.iterdir():
        if path.name.startswith("tmp") and path.is_file():
            path.unlink(missing_ok=True)


def _user_error(error: Exception) -> EdgeError:
    """The user-facing form of python-tuf's errors."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    kept = "nothing was changed; the adapter in use stays"
    if isinstance(error, ExpiredMetadataError):
        hint = "the publisher must sign anew ('edge-tcur publish refresh'), or this device's clock is ahead"
        return TrustError(f"the repository's metadata has expired: {text}", hint=hint)
    if isinstance(error, DownloadLengthMismatchError):
        return TrustError(f"the server sends more than is allowed: {text}", hint=kept)
    if isinstance(error, DownloadHTTPError):
        hint = "check --url: it is the directory that 'edge-tcur publish init' made"
        return NetworkError(f"the server has no usable repository: {text}", hint=hint)
    if isinstance(error, DownloadError):
        return NetworkError(f"cannot fetch the metadata: {text}", hint="run it again later")
    if isinstance(error, DeserializationError):
        hint = f"check --url, and that the server answers 404 for what is not there; {kept}"
        return TrustError(f"what the server sends is no metadata: {text}", hint=hint)
    if isinstance(error, UnsignedMetadataError):
        return TrustError(f"not signed by the trusted keys: {text}", hint=kept)
    return TrustError(f"the repository's metadata is not to be trusted: {text}", hint=kept)
