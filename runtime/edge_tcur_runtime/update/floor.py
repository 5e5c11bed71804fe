"""What a device remembers of its updates beside python-tuf's cache: floor, known-good time, own choices.

python-tuf remembers versions in its metadata directory only: once that is wiped, older metadata that is
still signed would be accepted, and a clock at 1970 accepts metadata that expired. So the store keeps
one small document, in two copies (``update/state-0.json``, ``state-1.json``; see `edge_tcur_runtime.copies`):

    floor       the versions of the four roles that were last acted upon, and which keys signed them;
                raised only when an update ended well
    known_good  seconds since 1970, never decreasing: a time that has certainly passed

The floor of timestamp, snapshot and targets falls when the root has given one of these roles other keys:
that is how a publisher recovers after a stolen key signed enormous versions (TUF 5.3.11). The root's never
falls.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from edge_tcur_runtime.atomic import disk_error, exclusive_lock, fsync_directory
from edge_tcur_runtime.copies import NAMES, Copies
from edge_tcur_runtime.errors import IntegrityError, TrustError
from edge_tcur_runtime.formats.adapter import check_version
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.schema import Fields, parse_document
from edge_tcur_runtime.update.policy import Committed

FORMAT_VERSION = 1
MAX_STATE_BYTES = 2**18
MAX_REMEMBERED = 256  # digests in each of the two lists; the oldest are forgotten
MAX_ATTEMPTS = 3  # a health check that never came to its end (a crash, a lost battery)
ROLES = ("timestamp", "snapshot", "targets")
_CLOCK_STEP = 3600  # seconds: a smaller gain of known-good time alone is not written


@dataclass(frozen=True)
class Versions:
    """Versions of the four roles of one refresh, and a digest of the keys that each of `ROLES` has."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateState:
    """What an update remembers.

    Attributes:
        device_id: 32 random hex digits; places the device in rollouts and is never sent.
        floor: see the module.
        known_good: seconds since 1970.
        committed: what the last update put in use.
        published: digests that came by update, oldest first.
        rejected: digest -> why it is not tried again.
        trying: what is being installed now, left over where a process was killed.
        trying_as: digest that will be in use then; another one where it is combined with a personal adapter.
        attempts: how often `trying` was begun and did not come to an end.
        combined: digests of combinations with a personal adapter that updates made.
        repository: the id that the trusted root gives its repository; "" where it gives none.
    """

    device_id: str
    floor: Versions = field(default_factory=Versions)
    known_good: int = 0
    committed: Committed | None = None
    published: tuple[str, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    trying: Committed | None = None
    trying_as: str | None = None
    attempts: int = 0
    combined: tuple[str, ...] = ()
    repository: str = ""

    def begin(self, offer: Committed, in_use: str) -> UpdateState:
        """Notes what is about to be tried, and the digest that will be in use then."""
        again = self.trying == offer and self.trying_as == in_use
        published = (*(digest for digest in self.published if digest != offer.digest), offer.digest)
        return replace(
            self,
            trying=offer,
            trying_as=in_use,
            attempts=self.attempts + 1 if again else 1,
            published=published[-MAX_REMEMBERED:],
        )

    def commit(self) -> UpdateState:
        """What was tried is in use."""
        return replace(self, committed=self.trying, trying=None, trying_as=None, attempts=0)

    def reject(self, reason: str) -> UpdateState:
        """What was tried does not work here."""
        assert self.trying is not None
        rejected = {**self.rejected, self.trying.digest: reason}
        kept = dict(list(rejected.items())[-MAX_REMEMBERED:])
        return replace(self, rejected=kept, trying=None, trying_as=None, attempts=0)

    def abandon(self) -> UpdateState:
        """What was tried could not be, for a reason that is not its own (a full disk, a missing engine)."""
        return replace(self, trying=None, trying_as=None, attempts=0)

    def recover(self, active: str | None, previous: str | None = None) -> UpdateState:
        """The state after a process was killed: a finished update is committed, one that was begun too
        often is rejected, any other is begun again by the next decision.

        Args:
            active: digest in use.
            previous: digest that was in use before; what was tried is found here where the user went
                back from it before it was noted.
        """
        if self.trying is None:
            return self
        if self.trying_as in (active, previous):
            return self.commit()
        if self.attempts >= MAX_ATTEMPTS:
            return self.reject(f"its health check did not come to an end {self.attempts} times")
        return self

    def of_repository(self, repository: str) -> UpdateState:
        """The state with the floor of this repository: another one counts its versions from 1."""
        return (
            self if repository == self.repository else replace(self, repository=repository, floor=Versions())
        )

    def raised(self, versions: Versions, now: int) -> UpdateState:
        """The state after an update that ended well.

        `now` is the clock's, and below every expiry that the update saw. The signed date of the timestamp
        is not remembered: a thief of its key could move it far ahead.
        """
        time = max(now, self.known_good)
        if versions == self.floor and time - self.known_good < _CLOCK_STEP:
            return self
        return replace(self, floor=versions, known_good=time)


def check_floor(versions: Versions, floor: Versions) -> None:
    """Refuses metadata older than what this device acted upon.

    Raises:
        TrustError: names the role and both versions.
    """
    if versions.root < floor.root:
        raise _too_old("root", versions.root, floor.root)
    if any(floor.keys.get(role) not in (None, versions.keys.get(role)) for role in ROLES):
        return  # keys were replaced by a root that is signed by the ones before: versions start anew
    for role in ROLES:
        found, least = getattr(versions, role), getattr(floor, role)
        if found < least:
            raise _too_old(role, found, least)


def check_time(now: int, known_good: int, expires: Mapping[str, int]) -> None:
    """Refuses metadata that expired before a time that has certainly passed, whatever the clock says.

    Args:
        now, known_good: seconds since 1970; the clock's, and the state's.
        expires: role -> when it expires.

    Raises:
        TrustError: names the role.
    """
    for role, end in expires.items():
        if max(now, known_good) >= end:
            late = " (this device's clock is behind)" if now < known_good else ""
            raise TrustError(
                f"the repository's {role} metadata has expired{late}",
                hint="the publisher must sign anew ('edge-tcur publish refresh'); if the clock here is "
                "wrong, set it",
            )


def _too_old(role: str, found: int, least: int) -> TrustError:
    return TrustError(
        f"the server offers {role} metadata of version {found}; this device already acted upon {least}",
        hint="an old copy, or an attack: nothing was changed; use the publisher's current server",
    )


def new_state() -> UpdateState:
    """The state of a device that never updated."""
    return UpdateState(secrets.token_hex(16))


def serialize_update_state(state: UpdateState, generation: int) -> bytes:
    """The bytes of a copy; `generation` counts the writes."""
    fields = {"format_version": FORMAT_VERSION, "generation": generation, **asdict(state)}
    document = json.loads(json.dumps(fields))
    return json.dumps({**document, "sha256": _checksum(document)}, indent=1, sort_keys=True).encode()


def parse_update_state(raw: bytes, where: str) -> tuple[UpdateState, int]:
    """A state and its generation from the bytes of a copy.

    Raises:
        IntegrityError, FileFormatError: altered, or no state file.
        FormatVersionError: written by a newer version.
    """
    fields = Fields(document := parse_document(raw, where), where)
    check_version(fields, FORMAT_VERSION)
    if _checksum({key: value for key, value in document.items() if key != "sha256"}) != fields.text("sha256"):
        raise IntegrityError("the checksum does not match", where=where)
    fields.only("format_version", "generation", "sha256", *UpdateState.__dataclass_fields__)
    floor, rejected = fields.child("floor"), fields.child("rejected")
    keys = floor.child("keys")
    state = UpdateState(
        fields.text("device_id"),
        Versions(
            **{role: floor.integer(role) for role in ("root", *ROLES)},
            keys={role: keys.text(role) for role in keys.mapping_keys()},
        ),
        fields.integer("known_good"),
        _parse_committed(fields, "committed"),
        fields.texts("published"),
        {digest: rejected.text(digest) for digest in rejected.mapping_keys()},
        _parse_committed(fields, "trying"),
        fields.optional_text("trying_as"),
        fields.integer("attempts"),
        () if fields.is_null("combined") else fields.texts("combined"),
        "" if fields.is_null("repository") else fields.text("repository"),
    )
    return state, fields.integer("generation", low=1)


class StateFile:
    """The two copies of the state in ``update/``, and the lock that one update holds from start to end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._copies = Copies(folder, parse_update_state, MAX_STATE_BYTES, "what updates remember")
        self.warnings: tuple[str, ...] = ()  # about a damaged copy, of the last `read`
        self.missing = True  # whether the last `read` found no state

    def read(self) -> UpdateState:
        """The state; a new one where there is none. Of a damaged copy `warnings` tells.

        Raises:
            IntegrityError: no copy is whole. It is never silently begun anew: that would forget the floor.
        """
        current = self._copies.read(new_state(), changing=True)
        self.warnings, self.missing = current.warnings, current.generation == 0
        if self.missing and current.warnings:
            names = " and ".join(NAMES)
            hint = f"remove {names} to start over: the protection against old metadata then starts anew"
            raise IntegrityError(current.warnings[0], where=str(self.folder), hint=hint)
        return current.value

    def write(self, state: UpdateState) -> None:
        """Writes the state old-or-new, readable by its owner only, in the place of the older copy."""
        current = self._copies.read(state, changing=True)
        self._copies.write(current, partial(serialize_update_state, state))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the update lock.

        Raises:
            BadInputError: another update is running.
            DiskError: the directory cannot be made or written.
        """
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                fsync_directory(self.folder.parent)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        with exclusive_lock(self.folder / "lock", "another update of this store is running"):
            yield


def _parse_committed(fields: Fields, key: str) -> Committed | None:
    if fields.is_null(key):
        return None
    child = fields.child(key)
    return Committed(child.text("digest"), child.text("name"), child.integer("version", low=1))


def _checksum(document: Mapping[str, object]) -> str:
    return digest_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
