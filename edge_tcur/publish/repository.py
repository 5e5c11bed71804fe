"""The static directory of a TUF repository: reading it back, changing it, signing and writing it.

    metadata/    timestamp.json, and <version>.snapshot.json, <version>.targets.json, <version>.root.json
    targets/     adapters/<name>/<sha256>.<version>.safetensors, bundles/..., chunks/...
    cards/       model cards; their digests are signed

A change writes the files first and ``timestamp.json`` last, each old-or-new, so that a device that reads at
the same time sees the old state or the new one; an interrupted change is simply not there. What was
read is verified against the root before anything is signed on top of it.

Keys are rotated without a moment at which the directory cannot be verified: the lists are signed with the
old keys and the new, and the root that drops the old ones is written after them. Where an old key is lost a
root with both comes first.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from edge_tcur.publish.keys import DAYS, ROLES, Keyring, KeyStore
from edge_tcur_runtime.atomic import disk_error, fsync_directory, remove_tree, write_atomic
from edge_tcur_runtime.errors import (
    BadInputError,
    EdgeError,
    FileFormatError,
    OutputExistsError,
    TrustError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.digest import PREFIX, digest_file
from edge_tcur_runtime.formats.offer import (
    EXTRA,
    FORMAT_VERSION,
    Catalogue,
    Entry,
    parse_catalogue,
    target_place,
)

METADATA, CARDS = "metadata", "cards"
KEPT_VERSIONS = 8  # of snapshot and targets: a device may be in the middle of reading an older one
_INIT = ".init"
_RESTORE = "restore the directory from what was last published (the copy on your server)"
_MAX_BYTES = 4 * 2**20
_VERSIONED = re.compile(r"([1-9][0-9]{0,8})\.(root|snapshot|targets)\.json")


@dataclass
class Change:
    """A repository while it is being changed: the metadata, the keyring, and signers that sign once more."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]
    ring: Keyring
    leaving: dict[str, list[Signer]] = field(default_factory=dict)

    @property
    def catalogue(self) -> Catalogue:
        """What is offered."""
        return catalogue_of(self.targets.signed)


class Repository:
    """A repository in the directory `folder`, signed with the keys of `keys`."""

    def __init__(self, folder: Path, keys: KeyStore) -> None:
        self.folder, self.keys = folder, keys

    def create(
        self,
        root_keys: int,
        threshold: int,
        days: dict[str, int] | None = None,
        external: Mapping[str, list[tuple[str, Path]]] | None = None,
    ) -> Change:
        """Makes keys and an empty signed repository, both beside their places, then gives them their names.

        A call that was killed leaves nothing at these places, or only the keys: the next one finishes it.

        Args:
            external: role -> private key URIs of securesystemslib and files of the public keys (PEM);
                new key files are made for the rest: up to `root_keys` of the root, one of the others.

        Raises:
            OutputExistsError: the directory is there and not empty. BadInputError: the keys are.
            UsageError: a threshold that the number of keys cannot reach, or too many keys.
        """
        external = external or {}
        if not 1 <= threshold <= root_keys:
            raise UsageError(f"{threshold} of {root_keys} root keys is not possible", hint="1 to all of them")
        for role, given in external.items():
            if role not in ROLES or len(given) > (root_keys if role == "root" else 1):
                hint = f"of {', '.join(ROLES)}; one key each, --root-keys of the root"
                raise UsageError(f"{len(given)} signers of the role {role}", hint=hint)
        if self.folder.exists() and not _is_free(self.folder):
            raise OutputExistsError(
                "there is something already", where=str(self.folder), hint="choose another directory"
            )
        inside = self.folder / _INIT  # an empty directory may be a mount, or where the user stands
        place = inside if self.folder.is_dir() else _beside(self.folder)
        work = Repository(place, self.keys.beside(_beside(self.keys.folder)))
        if not self._begun(work):
            work.fill(root_keys, threshold, days or {}, external)
            _rename(work.keys.folder, self.keys.folder)
        if place == inside:
            _rename(place / METADATA, self.folder / METADATA)
            remove_tree(place)
        else:
            _rename(place, self.folder)
        return self.load()

    def _begun(self, work: Repository) -> bool:
        """Whether an earlier call came as far as the keys; the leftovers of any other one are removed."""
        if self.keys.folder.exists():
            if not work.keys.folder.exists() and self._owns(work.folder):
                return True
            hint = "keys are never overwritten: choose another --keys"
            raise BadInputError("the directory of keys exists", where=str(self.keys.folder), hint=hint)
        for folder in (work.folder, work.keys.folder):
            remove_tree(folder)
        return False

    def _owns(self, folder: Path) -> bool:
        """Whether a repository is there, whole, and every key of its root is one of ours."""
        try:
            change = Repository(folder, self.keys).load()
        except EdgeError:
            return False
        return set(change.root.signed.keys) == set(change.ring.keys)

    def fill(
        self,
        root_keys: int,
        threshold: int,
        days: dict[str, int],
        external: Mapping[str, list[tuple[str, Path]]],
    ) -> None:
        """Makes the keys and signs the four roles; see `create`."""
        ring = self.keys.create(DAYS | days)
        extra = {EXTRA: {"repository": secrets.token_hex(8)}}  # devices count anew for another one
        root = Root(consistent_snapshot=True, unrecognized_fields=extra)
        for role in ROLES:
            given = external.get(role, [])
            for uri, public_key in given:
                ring, signer = self.keys.enroll(ring, role, uri, public_key)
                root.add_key(signer.public_key, role)
            count = (root_keys if role == "root" else 1) - len(given)
            ring, signers = self.keys.generate(ring, role, count)
            for signer in signers:
                root.add_key(signer.public_key, role)
            if len(root.roles[role].keyids) < count + len(given):
                raise UsageError(f"the same key twice for the role {role}")
        root.roles["root"].threshold = threshold
        empty = {"format_version": FORMAT_VERSION, "bases": {}, "versions": {}}
        targets = Targets(unrecognized_fields={EXTRA: empty})
        lists = (Metadata(targets), Metadata(Snapshot()), Metadata(Timestamp()))
        change = Change(Metadata(root), *lists, ring)
        self._sign_root(change, None)
        self.publish(change)

    def load(self) -> Change:
        """The newest state, verified against its root.

        Raises:
            BadInputError: no repository there, or a file is missing.
            TrustError: it was altered, or is not signed with the root's keys.
        """
        if not (self.folder / METADATA / "timestamp.json").is_file():
            hint = "'edge-tcur publish init DIR' makes one"
            if (self.folder / METADATA).exists():
                raise BadInputError(
                    "metadata/timestamp.json is missing", where=str(self.folder), hint=_RESTORE
                )
            raise BadInputError("there is no repository", where=str(self.folder), hint=hint)
        root = cast("Metadata[Root]", self._read(f"{self.root_version()}.root.json", Root))
        timestamp = cast("Metadata[Timestamp]", self._read("timestamp.json", Timestamp))
        version = timestamp.signed.snapshot_meta.version
        snapshot = cast("Metadata[Snapshot]", self._read(f"{version}.snapshot.json", Snapshot))
        version = snapshot.signed.meta["targets.json"].version
        targets = cast("Metadata[Targets]", self._read(f"{version}.targets.json", Targets))
        loaded: list[Metadata[Any]] = [root, targets, snapshot, timestamp]
        for metadata in loaded:
            _verify(root.signed, metadata, self.folder)
        return Change(root, targets, snapshot, timestamp, self.keys.read())

    @contextmanager
    def changing(self) -> Iterator[Change]:
        """The newest state, published where the block ends well; held against other publishers."""
        with self.keys.locked():
            change = self.load()
            yield change
            self.publish(change)

    def publish(self, change: Change) -> None:
        """Signs new versions of targets, snapshot and timestamp, and writes them in this order."""
        self.write_metadata(change, "targets", change.targets)
        self.publish_snapshot(change)

    def publish_snapshot(self, change: Change) -> None:
        """The same, with the targets as they are."""
        raw = change.targets.to_bytes()
        meta = MetaFile(change.targets.signed.version, length=len(raw))
        change.snapshot.signed.meta = {"targets.json": meta}
        self.write_metadata(change, "snapshot", change.snapshot)
        self.publish_timestamp(change)

    def publish_timestamp(self, change: Change) -> None:
        """The same, with targets and snapshot as they are; removes files that nobody reads any more."""
        signed = change.timestamp.signed
        length = len(change.snapshot.to_bytes())
        signed.snapshot_meta = MetaFile(change.snapshot.signed.version, length=length)
        signed.unrecognized_fields[EXTRA] = {"issued": int(time.time())}
        self.write_metadata(change, "timestamp", change.timestamp)
        self._prune(change)

    def write_metadata(self, change: Change, role: str, metadata: Metadata[Any]) -> None:
        """Signs the next version of one role with its keys and writes it."""
        entry = change.root.signed.roles[role]
        signers = self.keys.signers(change.ring, role, list(entry.keyids), entry.threshold)
        _sign(metadata, [*signers, *change.leaving.get(role, [])], change.ring.days[role])
        name = f"{role}.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        self._write(METADATA, name, metadata.to_bytes())

    def rotate(self, change: Change, replaced: dict[str, list[Key]]) -> None:
        """Gives roles other keys by a new root, signed by the old root's keys and by its new ones.

        Args:
            replaced: role -> its new keys; thresholds stay.
        """
        root = change.root.signed
        old = self.keys.signers(
            change.ring, "root", list(root.roles["root"].keyids), root.roles["root"].threshold
        )
        lists = [role for role in replaced if role != "root"]
        change.leaving = {role: found for role in lists if (found := self._at_hand(change, role))}
        lost = len(change.leaving) < len(lists)
        if lost:
            for role in lists:  # the new keys first: they are the ones that can sign
                before, root.roles[role].keyids = root.roles[role].keyids, []
                for key in replaced[role]:
                    root.add_key(key, role)
                root.roles[role].keyids += before
            self._sign_root(change, None)
            self.publish(change)
        for role, keys in replaced.items():
            new = [key.keyid for key in keys]
            for keyid in [keyid for keyid in root.roles[role].keyids if keyid not in new]:
                root.revoke_key(keyid, role)
            for key in keys:
                root.add_key(key, role)
        if lists and not lost:
            self.publish(change)
        self._sign_root(change, old)

    def _at_hand(self, change: Change, role: str) -> list[Signer]:
        """Signers of a role's present keys; none where they are lost. A wrong passphrase is not a loss."""
        entry = change.root.signed.roles[role]
        try:
            return self.keys.signers(change.ring, role, list(entry.keyids), entry.threshold)
        except BadInputError:
            return []

    def renew_root(self, change: Change) -> None:
        """A new version of the root with the same keys, for its expiry."""
        role = change.root.signed.roles["root"]
        self._sign_root(change, self.keys.signers(change.ring, "root", list(role.keyids), role.threshold))

    def add_file(self, path: str, raw: bytes, *, custom: dict[str, Any], change: Change) -> TargetFile:
        """Writes a target's bytes under their consistent name and enters it; signed by `publish`."""
        target = TargetFile.from_data(path, raw, ["sha256"])
        target.unrecognized_fields["custom"] = custom
        self.write_file(target_place(path, target.hashes["sha256"]), raw)
        change.targets.signed.targets[path] = target
        return target

    def write_file(self, path: str, raw: bytes) -> None:
        """Writes a file of the repository old-or-new."""
        folder, _, name = path.rpartition("/")
        self._write(folder, name, raw)

    def holds(self, path: str, sha256: str) -> bool:
        """Whether a file of the repository is there and whole."""
        place = self.folder / path
        try:
            return place.is_file() and digest_file(place) == PREFIX + sha256
        except OSError:  # it cannot be read
            return False

    def remove_target(self, change: Change, path: str) -> None:
        """Takes a target out of the list; its file is removed after `publish`, by `drop_file`."""
        del change.targets.signed.targets[path]

    def drop_file(self, path: str, sha256: str) -> None:
        """Removes the file of a target that is no longer listed."""
        self.remove_file(target_place(path, sha256))

    def remove_file(self, path: str) -> None:
        """Removes a file of the repository; DiskError where it cannot be removed."""
        place = self.folder / path
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, place) from error

    def root_version(self) -> int:
        """The newest version of the root in the directory."""
        names = [path.name for path in (self.folder / METADATA).glob("*.root.json")]
        versions = [int(match.group(1)) for name in names if (match := _VERSIONED.fullmatch(name))]
        if not versions:
            raise BadInputError("there is no root", where=str(self.folder / METADATA), hint=_RESTORE)
        return max(versions)

    def root_bytes(self) -> bytes:
        """The newest root, to be shipped with bundles."""
        path = self.folder / METADATA / f"{self.root_version()}.root.json"
        return read_bounded(path, _MAX_BYTES)

    def _sign_root(self, change: Change, old: list[Signer] | None) -> None:
        role = change.root.signed.roles["root"]
        signers = self.keys.signers(change.ring, "root", list(role.keyids), role.threshold)
        _sign(change.root, [*(old or []), *signers], change.ring.days["root"])
        self._write(METADATA, f"{change.root.signed.version}.root.json", change.root.to_bytes())

    def _read(self, name: str, kind: type[Signed]) -> Metadata[Any]:
        path = self.folder / METADATA / name
        try:
            metadata = Metadata[Any].from_bytes(read_bounded(path, _MAX_BYTES))
        except BadInputError as error:
            raise BadInputError(error.message, where=str(path), hint=_RESTORE) from error
        except RepositoryError as error:
            raise TrustError(f"not metadata: {error}", where=str(path), hint=_RESTORE) from error
        if not isinstance(metadata.signed, kind):
            raise TrustError(f"metadata of another role ({metadata.signed.type})", where=str(path))
        return metadata

    def _write(self, folder: str, name: str, raw: bytes) -> None:
        place = self.folder / folder
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, place) from error
        write_atomic(place / name, raw)

    def _prune(self, change: Change) -> None:
        newest = {"snapshot": change.snapshot.signed.version, "targets": change.targets.signed.version}
        for path in (self.folder / METADATA).iterdir():
            match = _VERSIONED.fullmatch(path.name)
            if match and int(match.group(1)) <= newest.get(match.group(2), 0) - KEPT_VERSIONS:
                self.remove_file(f"{METADATA}/{path.name}")


def catalogue_of(targets: Targets) -> Catalogue:
    """The offers of targets metadata."""
    entries = [
        Entry(path, target.length, target.hashes.get("sha256", ""), target.custom)
        for path, target in targets.targets.items()
    ]
    try:
        return parse_catalogue(targets.unrecognized_fields.get(EXTRA), entries, "targets")
    except FileFormatError as error:
        raise TrustError(f"signed, and malformed: {error.message}", where=error.where) from error


def _is_free(folder: Path) -> bool:
    """Whether a directory holds nothing but what a killed `Repository.create` left."""
    return folder.is_dir() and all(path.name == _INIT for path in folder.iterdir())


def _beside(folder: Path) -> Path:
    """Where `Repository.create` builds what becomes `folder`."""
    place = folder.absolute()
    return place.with_name(f".{place.name}{_INIT}")


def _rename(work: Path, folder: Path) -> None:
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, folder)
        fsync_directory(folder.absolute().parent)
    except OSError as error:
        raise disk_error(error, folder) from error


def _verify(root: Root, metadata: Metadata[Any], folder: Path) -> None:
    role = metadata.signed.type
    try:
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise TrustError(
            f"the {role} metadata here is not signed by the root's keys: {error}",
            where=str(folder),
            hint=_RESTORE,
        ) from error


def _sign(metadata: Metadata[Any], signers: list[Signer], days: int) -> None:
    """The next version (the first one where it was never signed), valid for `days` from now."""
    signed = metadata.signed
    signed.version += 1 if metadata.signatures else 0
    signed.expires = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=days)
    metadata.signatures.clear()
    for signer in {signer.public_key.keyid: signer for signer in signers}.values():
        name = signer.public_key.keyid[:12]
        try:
            signature = metadata.sign(signer, append=True)
            signer.public_key.verify_signature(signature, metadata.signed_bytes)
        except (RepositoryError, VerificationError) as error:
            reason = error.__cause__ or error
            raise BadInputError(
                f"the key {name} cannot sign the {signed.type} metadata: {reason}",
                hint="is its token or service reachable? Nothing was published; run it again",
            ) from error
