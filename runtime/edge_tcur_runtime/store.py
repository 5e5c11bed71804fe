"""The device's store of adapters: by content digest, with one in use and one to go back to.

Layout
    adapters/<64 hex>.safetensors   adapter files (0600), named by the SHA-256 of their bytes
    state-0.json, state-1.json      two copies of the state, written in turn: generation, checksum;
                                    the valid copy with the higher generation holds
    lock                            held (flock) by the process that changes the store

Every write is old-or-new (`edge_tcur_runtime.atomic`); an adapter is verified before it is used.
`edge_tcur_runtime.state` is pure; `Store` reads and writes. Readers take no lock and work on a read-only
directory.

Activated with ``pending=True`` an adapter is on trial: in use, but taken out again unless it is confirmed
(`edge_tcur_runtime.trial` checks it). Digests are ``sha256:<64 hex>``;
None stands for the base without an adapter.
"""

from __future__ import annotations

import builtins
import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edge_tcur_runtime.atomic import exclusive_lock, make_directory, remove_file, write_atomic
from edge_tcur_runtime.copies import NAMES, Copies, Current, read_if_there
from edge_tcur_runtime.errors import (
    BadInputError,
    BaseMismatchError,
    EdgeError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES, Adapter, parse_adapter, read_bounded
from edge_tcur_runtime.formats.digest import PREFIX, digest_bytes
from edge_tcur_runtime.formats.schema import nearest
from edge_tcur_runtime.state import State, check_name, parse_state, serialize_state

__all__ = ["State", "Store", "StoredAdapter", "check_name", "parse_state", "serialize_state"]

STATE_FILES = NAMES
ADAPTERS = "adapters"
MAX_STATE_BYTES = 2**20
WAIT_SECONDS = 5.0  # for another process that changes the store: each change is short
_FILE = re.compile(r"([0-9a-f]{64})\.safetensors")
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # the temporary names of `write_atomic`
_HEX = re.compile(r"[0-9a-f]{6,64}")  # what may stand for a digest


@dataclass(frozen=True)
class StoredAdapter:
    """One line of `Store.list`."""

    digest: str
    name: str | None
    active: bool  # in use now
    previous: bool  # what `rollback` would put in use
    pending: bool  # on trial
    size: int = 0  # bytes of the file
    base_digest: str | None = None  # this and the next two are unknown where the file is damaged
    task: str | None = None
    trained_numbers: int = 0  # in the cores and the trained extras
    problem: str | None = None  # why the file cannot be used; None where it can


class Store:
    """The store of adapters in the directory `root`; made by `Store.open`.

    Methods that change it raise BadInputError while another process changes it, and DiskError when
    they cannot write: the store is then old or new.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._copies = Copies(root, parse_state, MAX_STATE_BYTES, "the store's state")

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Store:
        """Opens a store, with `create` making its directories (0700) where they are missing.

        Raises:
            BadInputError: no store there, or it cannot be read.
            FormatVersionError: its state was written by a newer version.
            DiskError: the directories cannot be made.
        """
        if create:
            make_directory(path / ADAPTERS)
        elif not path.is_dir():
            hint = "'edge-tcur-device adapters install FILE' makes one"
            raise BadInputError("there is no store of adapters", where=str(path), hint=hint)
        store = cls(path)
        store._read()
        return store

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines about damaged copies of the state; the store works all the same."""
        return self._read().warnings

    @property
    def may_be_behind(self) -> bool:
        """Whether a copy of the state is damaged, gone or not written yet: the state may be an old one."""
        return self._read().valid < len(NAMES)

    @property
    def state(self) -> State:
        """The state on disk now."""
        return self._read().value

    def active_digest(self) -> str | None:
        """Digest of the adapter in use (on trial or active); None is the base."""
        return self.state.in_use

    def install(
        self, raw: bytes, *, name: str | None = None, expected_base: str | None = None, where: str = "adapter"
    ) -> str:
        """Verifies the bytes of an adapter file, keeps them and returns their digest.

        Installing twice changes nothing; a `name` that was given before moves to this adapter.

        Raises:
            BaseMismatchError: made for another base than `expected_base`.
            UsageError: the name is not allowed.
            EdgeError: what `parse_adapter` raises; `where` names the bytes in it.
        """
        _check_base(parse_adapter(raw, where), expected_base, where)
        digest = digest_bytes(raw)
        with self._changing() as current:
            state = current.value.install(digest, name)
            write_atomic(self._path(digest), raw, mode=0o600)  # again too: the old file may be damaged
            self._write(current, state)
        return digest

    def install_file(self, path: Path, *, name: str | None = None, expected_base: str | None = None) -> str:
        """`install` for a file of at most 64 MiB."""
        raw = read_bounded(path, MAX_FILE_BYTES)
        return self.install(raw, name=name, expected_base=expected_base, where=str(path))

    def activate(
        self,
        ref: str | None,
        *,
        pending: bool = False,
        expected_base: str | None = None,
        name: str | None = None,
        seen: State | None = None,
    ) -> str | None:
        """Verifies an installed adapter, puts it in use (on trial where `pending`), returns its digest.

        `ref`: digest, prefix of at least 6 hex digits, name, ``"previous"``; ``"base"`` or None.
        `name` is given to it in the same write. `seen`: the state that this was decided by.

        Raises:
            UsageError: no such adapter, or the prefix is ambiguous.
            BadInputError: another adapter is in use than in `seen`.
            BaseMismatchError: made for another base than `expected_base`.
            IntegrityError: the file is missing or damaged.
        """
        with self._changing() as current:
            digest = self._resolve("base" if ref is None else ref, current.value)
            if seen is not None and current.value.in_use not in (seen.in_use, digest):
                raise BadInputError(
                    f"another adapter was put in use meanwhile: {current.value.in_use or 'the base'}",
                    where=str(self.root),
                    hint="nothing was put in use; run the same command again: it compares with that one",
                )
            if digest is not None:
                _check_base(self._load(digest), expected_base, digest)
            state = current.value if digest is None else current.value.install(digest, name)
            self._write(current, state.activate(digest, pending=pending))
        return digest

    def confirm(self, digest: str | None = None) -> None:
        """Ends the trial (of `digest`, where it is given): the pending adapter is the active one."""
        self._change(lambda state: state.confirm() if digest in (None, state.pending) else state)

    def withdraw(self, digest: str, before: State) -> None:
        """Ends a trial badly, see `State.withdraw`."""
        self._change(lambda state: state.withdraw(digest, before))

    def settle(self, seen: State, digest: str | None) -> bool:
        """`State.settle`, where what is in use is still that of `seen`; False and no change where not."""
        with self._changing() as current:
            state = current.value
            if replace(state, names={}) != replace(seen, names={}):
                return False
            self._write(current, state.settle(digest))
        return True

    def recover(self) -> bool:
        """Takes an adapter that was never confirmed out of use; True where there was one."""
        if self.state.pending is None:
            return False
        self._change(State.recover)
        return True

    def rollback(self) -> str | None:
        """Goes back (see `State.rollback`) and returns the digest now in use; None is the base.

        Raises:
            UsageError: there is nothing to go back to.
            IntegrityError: what it would go back to is missing or damaged; nothing was changed.
        """
        with self._changing() as current:
            state = current.value.rollback()
            if state.in_use is not None:
                self._load(state.in_use)
            self._write(current, state)
        return state.in_use

    def remove(self, ref: str) -> str:
        """Deletes an adapter and returns its digest; UsageError where it is in use or unknown."""
        with self._changing() as current:
            digest = self._resolve(ref, current.value)
            if digest is None:
                raise UsageError("the base is not an adapter and cannot be removed")
            self._write(current, current.value.remove(digest))
            remove_file(self._path(digest))
        return digest

    def list(self) -> builtins.list[StoredAdapter]:
        """Every adapter in the store, the one in use first; a damaged file says so in `problem`."""
        state = self.state
        found = [self._describe(digest, state) for digest in self._digests()]
        return sorted(found, key=lambda line: (not line.active, line.name or "~", line.digest))

    def digests(self) -> frozenset[str]:
        """Digests of every adapter in the store; nothing is read but their names."""
        return frozenset(self._digests())

    def load(self, ref: str = "active") -> Adapter:
        """Reads and verifies an adapter: `ref` as in `activate`, or ``"active"`` or ``"pending"``.

        Raises:
            UsageError: no such adapter, or `ref` stands for the base (see `active_digest`).
            IntegrityError: the file is missing, or is not what its digest promises.
        """
        digest = self.resolve(ref)
        if digest is None:
            raise UsageError(f"{ref!r} is the base, which has no adapter file")
        return self._load(digest)

    def verified(self, digest: str) -> Adapter:
        """The adapter of a whole digest; IntegrityError where its file is missing or damaged."""
        return self._load(digest)

    def resolve(self, ref: str) -> str | None:
        """The digest that `ref` stands for (None is the base); UsageError where unknown or ambiguous."""
        return self._resolve(ref, self.state)

    def gc(self) -> tuple[str, ...]:
        """Deletes leftovers of interrupted writes, and adapters that are neither active, previous, on
        trial nor named; where no state is known (all copies lost) adapters are kept. Returns the
        deleted files' paths relative to the store.
        """
        with self._changing() as current:
            files = _files(self.root) + _files(self.root / ADAPTERS)
            doomed = [path for path in files if _LEFTOVER.fullmatch(path.name)]
            if current.generation > 0:
                unused = set(self._digests()) - current.value.referenced
                doomed += [self._path(digest) for digest in sorted(unused)]
            for path in doomed:
                remove_file(path)
        return tuple(str(path.relative_to(self.root)) for path in doomed)

    def _path(self, digest: str) -> Path:
        return self.root / ADAPTERS / f"{digest.removeprefix(PREFIX)}.safetensors"

    def _digests(self) -> builtins.list[str]:
        matches = (_FILE.fullmatch(path.name) for path in _files(self.root / ADAPTERS))
        return [PREFIX + match.group(1) for match in matches if match]

    def _resolve(self, ref: str, state: State) -> str | None:
        words = {"base": None, "active": state.in_use, "previous": state.fallback, **state.names}
        if state.pending is not None:
            words["pending"] = state.pending
        if ref in words:
            return words[ref]
        digits = ref.removeprefix(PREFIX).lower()
        found = [digest for digest in self._digests() if digest.startswith(PREFIX + digits)]
        if not _HEX.fullmatch(digits) or not found:
            guess = nearest(ref, words)
            hint = f"did you mean {guess!r}?" if guess else "see 'edge-tcur-device adapters list'"
            raise UsageError(f"no adapter {ref!r} in the store", where=str(self.root), hint=hint)
        if len(found) > 1:
            raise UsageError(f"{ref!r} stands for {len(found)} adapters: {', '.join(found)}")
        return found[0]

    def _load(self, digest: str) -> Adapter:
        path = self._path(digest)
        hint = "install it again, or 'edge-tcur-device adapters activate base'"
        raw = read_if_there(path, MAX_FILE_BYTES)
        if raw is None:
            raise IntegrityError("the adapter's file is missing", where=str(path), hint=hint)
        if (actual := digest_bytes(raw)) != digest:
            raise IntegrityError(f"the file was altered: its digest is {actual}", where=str(path), hint=hint)
        return parse_adapter(raw, str(path))

    def _describe(self, digest: str, state: State) -> StoredAdapter:
        name = next((name for name, named in state.names.items() if named == digest), None)
        active, previous = digest == state.in_use, digest == state.fallback
        line = StoredAdapter(digest, name, active, previous, pending=digest == state.pending)
        with contextlib.suppress(OSError):
            line = replace(line, size=self._path(digest).stat().st_size)
        try:
            adapter = self._load(digest)
        except EdgeError as error:
            return replace(line, problem=error.message)
        header, numbers = adapter.header, adapter.trained_numbers + adapter.extra_numbers
        return replace(line, base_digest=header.base_digest, task=header.task, trained_numbers=numbers)

    def _read(self, *, changing: bool = False) -> Current[State]:
        """The valid copy of the state with the highest generation. Where it is to be changed, a copy that
        the disk cannot read just now is an error: the change would be made to an older state.
        """
        current = self._copies.read(State(), changing=changing)
        if not current.warnings or current.generation > 0:
            return current
        lost = f"{self.root}: the store's state is lost: the base is used without an adapter"
        return replace(current, warnings=(*current.warnings, lost))

    def _write(self, current: Current[State], state: State) -> None:
        """Writes a changed state, or the same one to replace a damaged copy."""
        if state != current.value or current.generation == 0 or current.warnings:
            self._copies.write(current, partial(serialize_state, state))

    def _change(self, transition: Callable[[State], State]) -> State:
        with self._changing() as current:
            state = transition(current.value)
            self._write(current, state)
        return state

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Current[State]]:
        """The state, while no other process (or thread) may change the store."""
        busy = "another process is changing this store"
        with exclusive_lock(self.root / "lock", busy, seconds=WAIT_SECONDS):
            yield self._read(changing=True)


def _check_base(adapter: Adapter, expected: str | None, where: str) -> None:
    actual = adapter.header.base_digest
    if expected is not None and actual != expected:
        message = f"the adapter belongs to the base {actual}; the base here is {expected}"
        hint = "use the bundle of that base, or an adapter trained on this one"
        raise BaseMismatchError(message, where=where, hint=hint)


def _files(folder: Path) -> list[Path]:
    """The entries of a directory by name; none where it is missing."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadInputError(f"cannot read: {error.strerror}", where=str(folder)) from error
