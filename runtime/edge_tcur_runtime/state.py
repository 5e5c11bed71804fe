"""Which adapters of a store are in use, as a value: transitions, and the file that holds it. Pure.

Digests are ``sha256:<64 hex>``; None stands for the base without an adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from edge_tcur_runtime.errors import FileFormatError, IntegrityError, UsageError
from edge_tcur_runtime.formats.adapter import check_version
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.schema import Fields, parse_json

FORMAT_VERSION = 1
MAX_NAMES = 1024  # of `MAX_NAME` characters: a full table of names stays far below what a state file may have
RESERVED = ("base", "active", "previous", "pending")
MAX_NAME = 64  # characters
_MAX_FAILED = 16  # digests that are remembered
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{6,64}")  # what may stand for a digest
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")


@dataclass(frozen=True)
class State:
    """Which adapters are in use. Pure: a transition returns the next state and touches no disk."""

    active: str | None = None  # digest of the confirmed adapter
    previous: str | None = None  # digest to which `rollback` returns
    pending: str | None = None  # digest of the adapter on trial; None where none is
    names: Mapping[str, str] = field(default_factory=dict)  # name -> digest, at most one name each
    failed: tuple[str, ...] = ()  # were active and did not work; emptied when anybody chooses another one

    @property
    def in_use(self) -> str | None:
        """Digest of the adapter to load now: the one on trial, else the confirmed one."""
        return self.pending or self.active

    @property
    def fallback(self) -> str | None:
        """Digest that `rollback` would put in use."""
        return self.active if self.pending else self.previous

    @property
    def referenced(self) -> frozenset[str]:
        """Digests that are active, previous, on trial or named."""
        digests = (self.active, self.previous, self.pending, *self.names.values())
        return frozenset(digest for digest in digests if digest is not None)

    def install(self, digest: str, name: str | None = None) -> State:
        """Gives an adapter its name, taking it from another one; UsageError for a bad or 1025th name."""
        if name is None:
            return self
        check_name(name)
        names = {known: named for known, named in self.names.items() if named != digest} | {name: digest}
        if len(names) > MAX_NAMES:
            raise UsageError(f"the store already holds {MAX_NAMES} names", hint="remove some adapters first")
        return replace(self, names=names)

    def activate(self, digest: str | None, *, pending: bool = False) -> State:
        """Puts an adapter in use, on trial where `pending`; None is the base, which needs no trial."""
        if digest == self.active:
            return replace(self, pending=None, failed=())
        if pending and digest is not None:
            return replace(self, pending=digest)
        return replace(self, active=digest, previous=self.active, pending=None, failed=())

    def confirm(self) -> State:
        """Makes the adapter on trial the active one; without a trial nothing changes."""
        return self if self.pending is None else self.activate(self.pending)

    def recover(self) -> State:
        """Ends an unconfirmed trial: what was active before it is in use again."""
        return replace(self, pending=None)

    def withdraw(self, digest: str, before: State) -> State:
        """Ends the trial of `digest`; the names that it took since `before` go back to who had them."""
        names = {
            name: before.names.get(name) if named == digest else named for name, named in self.names.items()
        }
        kept = {name: named for name, named in names.items() if named is not None}
        return replace(self, pending=None if self.pending == digest else self.pending, names=kept)

    def settle(self, digest: str | None) -> State:
        """Puts in use what works of trial, active, previous and base; what stood before it is forgotten, but
        for an active one that failed: nobody took it out of use, and an update may bring it again."""
        if digest == self.in_use:
            return self.confirm()
        if digest == self.active or self.active is None:
            return self.recover()
        failed = (*(one for one in self.failed if one != self.active), self.active)[-_MAX_FAILED:]
        return replace(self, active=digest, previous=None, pending=None, failed=failed)

    def rollback(self) -> State:
        """Ends the trial, or exchanges active and previous; UsageError: nothing to go back to."""
        if self.pending is not None:
            return self.recover()
        if self.active == self.previous:
            hint = "'edge-tcur-device adapters activate base' uses the base without an adapter"
            raise UsageError("there is no previous adapter to go back to", hint=hint)
        return replace(self, active=self.previous, previous=self.active, failed=())

    def remove(self, digest: str) -> State:
        """Forgets an adapter (rollback then goes to the base); UsageError: it is active or on trial."""
        if digest in (self.active, self.pending):
            hint = "activate another one first ('edge-tcur-device adapters activate base')"
            raise UsageError(f"the adapter {digest} is active and cannot be removed", hint=hint)
        names = {name: named for name, named in self.names.items() if named != digest}
        previous = None if self.previous == digest else self.previous
        failed = tuple(one for one in self.failed if one != digest)
        return replace(self, previous=previous, names=names, failed=failed)


def check_name(name: str) -> None:
    """Raises UsageError for a name that is reserved, could be read as a digest, or is no plain word."""
    if name in RESERVED or _HEX.fullmatch(name.lower()) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of an adapter",
            hint="use at most 64 letters, digits, '.', '_' or '-', starting with a letter or digit; "
            f"not one of {', '.join(RESERVED)}, and not six or more hexadecimal digits alone",
        )


def serialize_state(state: State, generation: int) -> bytes:
    """The bytes of a state file; `generation` counts the writes."""
    document = {"format_version": FORMAT_VERSION, "generation": generation, **asdict(state)}
    if not state.failed:  # a store where nothing failed is read by versions that do not know the field
        del document["failed"]
    return json.dumps({**document, "sha256": _checksum(document)}, indent=1, sort_keys=True).encode()


def parse_state(raw: bytes, where: str) -> tuple[State, int]:
    """A state and its generation from the bytes of a state file.

    Raises:
        IntegrityError, FileFormatError: the checksum does not match, or it is no state file.
        FormatVersionError: whole, but written by a newer version.
    """
    fields = Fields(document := parse_json(raw, where), where)
    promised = fields.text("sha256")
    if _checksum({key: value for key, value in document.items() if key != "sha256"}) != promised:
        raise IntegrityError("the checksum does not match", where=where)
    check_version(fields, FORMAT_VERSION)
    fields.only("format_version", "generation", "sha256", *State.__dataclass_fields__)
    active, previous, pending = (fields.optional_text(key) for key in ("active", "previous", "pending"))
    names = fields.child("names")
    named = {name: names.text(name) for name in names.mapping_keys()}
    failed = fields.texts("failed") if "failed" in fields.mapping_keys() else ()
    state = State(active, previous, pending, named, failed)
    if not all(_DIGEST.fullmatch(digest) for digest in (*state.referenced, *failed)):
        raise FileFormatError("holds something that is no digest", where=where)
    return state, fields.integer("generation", low=1)


def _checksum(document: Mapping[str, object]) -> str:
    return digest_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
