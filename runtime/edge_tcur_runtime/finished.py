"""The record of a run that has ended: written before its adapter is installed, gone with its checkpoints.

A process that is killed between the two leaves a run that is done and does not look so: the adapter in use
is now the new one, and the same command would train on from it. With the record the next start knows.

Layout of the file (format version 1): one JSON object with the digest of the adapter, what the run belongs
to (`edge_tcur_runtime.checkpoint.identify`), the result as it was printed, and a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_tcur_runtime.atomic import disk_error, write_atomic
from edge_tcur_runtime.checkpoint import FINISHED, identify
from edge_tcur_runtime.copies import read_if_there
from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.errors import EdgeError, IntegrityError
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES, Adapter, check_version
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.schema import Fields, parse_json
from edge_tcur_runtime.keeper import clear_checkpoints
from edge_tcur_runtime.origin import blank_adapter
from edge_tcur_runtime.output import plain
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings
from edge_tcur_runtime.store import Store

FORMAT_VERSION = 1
NOTE = "an earlier process had ended this run and was stopped before it had cleared up: nothing was trained"


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        digest: of the adapter that it made, ``sha256:<hex>``.
        identity: what it belongs to; ``start`` is the digest of the adapter that it started from.
        result: what was printed as JSON; report: what was printed for people.
    """

    digest: str
    identity: Mapping[str, str]
    result: Mapping[str, Any]
    report: str

    def is_of(self, identity: Mapping[str, str]) -> bool:
        """Whether the run of `identity` is this one, started again: from the same adapter, or from the one
        that it made, which took that one's place."""
        other = {**identity, "start": self.identity.get("start")}
        return other == self.identity and identity["start"] in (self.identity["start"], self.digest)


def identity_of(
    bundle: Bundle, start: Adapter | None, dataset: Dataset, settings: PersonalizeSettings
) -> dict[str, str]:
    """What a run belongs to, whatever engine it ran on; `start` as in `personalize`."""
    return identify(bundle, start or blank_adapter(bundle), dataset, settings)


def record_finished(keep: KeepSettings, finished: Finished) -> None:
    """Writes the record, before the adapter is installed; `clear_checkpoints` removes it.

    Raises:
        DiskError: it could not be written.
    """
    if keep.directory is None:
        return
    try:
        keep.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, keep.directory) from error
    write_atomic(keep.directory / FINISHED, serialize_finished(finished), mode=0o600)


def recall_finished(
    keep: KeepSettings,
    identity: Mapping[str, str],
    store: Path,
    *,
    in_use: bool,
    accept_unjudged: bool = False,
) -> Finished | None:
    """The run of `identity`, where an earlier process ended it and was stopped before it had cleared up.

    Checkpoints of a run whose adapter has been put away are removed, whatever run is started now. They stay
    where the adapter did not arrive: the run goes on from them and ends once more.

    Args:
        store: directory of the store that the adapter goes to.
        in_use: whether it must be in use there, and not only installed; one that was `withheld` must be with
            `accept_unjudged` alone.

    Raises:
        BadInputError, DiskError: see `clear_checkpoints`.
    """
    if keep.directory is None or keep.resume == "no":
        return None
    found = _read(keep.directory / FINISHED)
    if found is None:
        return None
    in_use = in_use and (accept_unjudged or found.result.get("withheld") is None)
    if not _put_away(found.digest, store, in_use=in_use):
        return None
    clear_checkpoints(keep)
    return found if found.is_of(identity) else None


def _put_away(digest: str, store: Path, *, in_use: bool) -> bool:
    try:
        opened = Store.open(store, create=False)
        opened.load(digest)
        return opened.active_digest() == digest or not in_use
    except EdgeError:  # no store yet, no such adapter, or its file is damaged
        return False


def serialize_finished(finished: Finished) -> bytes:
    """The bytes of a record."""
    document = {"format_version": FORMAT_VERSION, **asdict(finished)}
    document = {**document, "result": plain(document["result"])}
    return json.dumps({**document, "sha256": _checksum(document)}).encode()


def parse_finished(raw: bytes, where: str) -> Finished:
    """A record from its bytes.

    Raises:
        IntegrityError, FileFormatError: the checksum does not match, or it is no record.
        FormatVersionError: written by a newer version.
    """
    fields = Fields(document := parse_json(raw, where), where)
    check_version(fields, FORMAT_VERSION)
    fields.only("format_version", "sha256", *Finished.__dataclass_fields__)
    if _checksum({key: value for key, value in document.items() if key != "sha256"}) != fields.text("sha256"):
        raise IntegrityError("the checksum does not match", where=where)
    names = fields.child("identity")
    identity = {name: names.text(name) for name in names.mapping_keys()}
    return Finished(fields.text("digest"), identity, fields.mapping("result"), fields.text("report"))


def _checksum(document: Mapping[str, object]) -> str:
    return digest_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def _read(path: Path) -> Finished | None:
    """The record at `path`; None where there is none, or none that this version can use: the run then goes
    on from its checkpoint."""
    try:
        raw = read_if_there(path, MAX_FILE_BYTES)
        return None if raw is None else parse_finished(raw, str(path))
    except EdgeError:
        return None
