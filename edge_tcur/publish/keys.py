"""The publisher's keys: ed25519 in files with a passphrase, or whatever securesystemslib can sign with.

The directory of keys is never served. ``keyring.json`` says where each private key is; which keys a
role has stands in the signed root alone. A URI ``encrypted:<file>`` is a PKCS #8 PEM file (0600) in that
directory, or in another one where the root's keys are kept offline; every other URI goes to
securesystemslib (a hardware token, a cloud KMS, ``file2:`` ...).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signer, SSlibKey

from edge_tcur_runtime.atomic import disk_error, exclusive_lock, fsync_directory, write_atomic
from edge_tcur_runtime.errors import BadInputError, EdgeError, IntegrityError, UsageError
from edge_tcur_runtime.formats.adapter import check_version, read_bounded
from edge_tcur_runtime.formats.schema import Fields, parse_document

FORMAT_VERSION = 1
KEYRING = "keyring.json"
ROLES = ("root", "targets", "snapshot", "timestamp")
DAYS = {"root": 365, "targets": 180, "snapshot": 30, "timestamp": 14}  # until a signature expires
_MAX_BYTES = 2**20
_KEYID_DIGITS = 16
_PROBE = b"edge-tcur: is this the key?"
_ENCRYPTED = "encrypted:"

Secret = Callable[[str], str]  # a PIN, say, by the name that the signer gives it
Passphrase = Callable[[str], bytes]  # of the role "root", or of "online" for the other three


@dataclass(frozen=True)
class KeyEntry:
    """A private key: its name for people, where it is, and its public part as securesystemslib writes it."""

    name: str
    uri: str
    public: dict[str, Any]


@dataclass(frozen=True)
class Keyring:
    """The content of ``keyring.json``: keyid -> key, and the days until each role's signature expires."""

    keys: dict[str, KeyEntry]
    days: dict[str, int]


class KeyStore:
    """The directory of keys.

    Args:
        folder: the directory; made by `create`.
        passphrase: asked when a file is opened, once for the root's keys and once for the others.
        offline: a second place to look for key files, e.g. a mounted stick with the root's keys.
        secret: asked for what a signer of securesystemslib needs, e.g. the PIN of a token.
    """

    def __init__(
        self,
        folder: Path,
        passphrase: Passphrase,
        offline: Path | None = None,
        secret: Secret | None = None,
    ) -> None:
        self.folder, self._passphrase, self._offline, self._secret = folder, passphrase, offline, secret

    def create(self, days: dict[str, int]) -> Keyring:
        """Makes the directory (0700) with an empty keyring.

        Raises:
            DiskError: it cannot be made.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True)
            fsync_directory(self.folder.parent)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        ring = Keyring({}, dict(days))
        self.write(ring)
        return ring

    def beside(self, folder: Path) -> KeyStore:
        """The same in another directory."""
        return KeyStore(folder, self._passphrase, self._offline, self._secret)

    def read(self) -> Keyring:
        """The keyring.

        Raises:
            BadInputError: missing or unreadable.
            FileFormatError, FormatVersionError: not one, or of a newer version.
        """
        path = self.folder / KEYRING
        if not path.is_file():
            hint = "'edge-tcur publish init' makes it; name it with --keys"
            raise BadInputError("there is no keyring", where=str(path), hint=hint)
        fields = Fields(parse_document(read_bounded(path, _MAX_BYTES), str(path)), str(path))
        check_version(fields, FORMAT_VERSION)
        fields.only("format_version", "keys", "days")
        days = fields.child("days").only(*ROLES)
        keys = {
            keyid: KeyEntry(child.text("name"), child.text("uri"), child.mapping("public"))
            for keyid, child in fields.children("keys").items()
        }
        return Keyring(keys, {role: days.integer(role, low=1) for role in ROLES})

    def write(self, ring: Keyring) -> None:
        """Writes the keyring old-or-new (0600)."""
        document = {"format_version": FORMAT_VERSION, **asdict(ring)}
        write_atomic(self.folder / KEYRING, (json.dumps(document, indent=1) + "\n").encode(), mode=0o600)

    def generate(self, ring: Keyring, role: str, count: int = 1) -> tuple[Keyring, list[Signer]]:
        """New ed25519 keys of a role, written with the passphrase; the keyring with them, their signers."""
        signers: list[Signer] = []
        keys = dict(ring.keys)
        for _ in range(count):
            private = Ed25519PrivateKey.generate()
            signer = CryptoSigner(private, _short(SSlibKey.from_crypto(private.public_key())))
            name = _free_name(role, keys)
            phrase = self._passphrase("root" if role == "root" else "online")
            pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(phrase))
            write_atomic(self.folder / f"{name}.pem", pem, mode=0o600)
            public = signer.public_key
            keys[public.keyid] = KeyEntry(name, f"{_ENCRYPTED}{name}.pem", public.to_dict())
            signers.append(signer)
        ring = replace(ring, keys=keys)
        self.write(ring)
        return ring, signers

    def enroll(self, ring: Keyring, role: str, uri: str, public_pem: Path) -> tuple[Keyring, Signer]:
        """Takes a key that lives elsewhere into the keyring.

        Args:
            uri: a private key URI of securesystemslib.
            public_pem: its public key, PEM.

        Raises:
            BadInputError: the public key cannot be read, or the URI gives no signer that fits it.
        """
        if uri.startswith("gnupg:"):
            hint = "use a key file (file2:) or a token; or 'publish rotate' without --signer makes a key"
            raise BadInputError("GnuPG keys cannot be used: devices verify no OpenPGP", where=uri, hint=hint)
        try:
            public = _short(SSlibKey.from_crypto(load_pem_public_key(read_bounded(public_pem, _MAX_BYTES))))
            signer = Signer.from_priv_key_uri(uri, public, self._secret)
            public.verify_signature(signer.sign(_PROBE), _PROBE)
        except BadInputError:
            raise
        except Exception as error:
            hint = f"schemes: {', '.join(sorted(SIGNER_FOR_URI_SCHEME))}; --public-key must be its public key"
            raise BadInputError(
                f"cannot sign with {uri}: {error}", where=str(public_pem), hint=hint
            ) from error
        entry = KeyEntry(_free_name(role, ring.keys), uri, public.to_dict())
        ring = replace(ring, keys={**ring.keys, public.keyid: entry})
        self.write(ring)
        return ring, signer

    def signers(self, ring: Keyring, role: str, keyids: list[str], needed: int) -> list[Signer]:
        """Signers for at least `needed` of a role's keys.

        Raises:
            BadInputError: fewer of its keys are here.
            IntegrityError: wrong passphrase, or a file that is no key.
        """
        found: list[Signer] = []
        missing = []
        for keyid in keyids:
            entry = ring.keys.get(keyid)
            try:
                signer = None if entry is None else self._open(role, keyid, entry)
            except BadInputError as error:  # a token that is not plugged in: the others may do
                missing.append(str(error))
                continue
            if signer is None:
                missing.append(keyid[:12] if entry is None else entry.name)
            else:
                found.append(signer)
            if len(found) == needed:
                return found
        raise BadInputError(
            f"{needed} keys of the role {role} are needed; missing: {', '.join(missing)}",
            where=str(self.folder),
            hint="mount the medium with the offline keys and name it with --root-keys-at",
        )

    def _open(self, role: str, keyid: str, entry: KeyEntry) -> Signer | None:
        public = Key.from_dict(keyid, dict(entry.public))
        if not entry.uri.startswith(_ENCRYPTED):
            try:
                return Signer.from_priv_key_uri(entry.uri, public, self._secret)
            except EdgeError:
                raise
            except Exception as error:
                raise BadInputError(f"{entry.name} cannot sign: {error}", where=entry.uri) from error
        name = entry.uri.removeprefix(_ENCRYPTED)
        places = [folder / name for folder in (self.folder, self._offline) if folder is not None]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            return None
        phrase = self._passphrase("root" if role == "root" else "online")
        try:
            private = load_pem_private_key(read_bounded(path, _MAX_BYTES), phrase)
            assert isinstance(public, SSlibKey)
            return CryptoSigner(private, public)
        except (ValueError, TypeError, AssertionError) as error:
            raise IntegrityError(
                "the key cannot be opened",
                where=str(path),
                hint="the passphrase is wrong, or the file damaged (a key that is lost: move its file away)",
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held while a publisher changes the repository.

        Raises:
            BadInputError: another publisher holds it, or there is no directory of keys.
            DiskError: it cannot be locked.
        """
        if not self.folder.is_dir():
            self.read()  # says what is missing
        with exclusive_lock(self.folder / "lock", "another publisher is at work"):
            yield


def check_passphrase(phrase: bytes) -> bytes:
    """The passphrase; UsageError for one of fewer than 8 bytes."""
    if len(phrase) < 8:
        raise UsageError(
            "the passphrase has fewer than 8 bytes", hint="a key is only as safe as its passphrase"
        )
    return phrase


def _short(key: SSlibKey) -> SSlibKey:
    """The key under the first 16 digits of its id: it stands in the metadata up to three times.

    To TUF a key id is a name (TAP 12); which key it names is what the root signs.
    """
    return SSlibKey(key.keyid[:_KEYID_DIGITS], key.keytype, key.scheme, key.keyval)


def _free_name(role: str, keys: dict[str, KeyEntry]) -> str:
    taken = {entry.name for entry in keys.values()}
    return next(name for number in range(1, 10_000) if (name := f"{role}-{number}") not in taken)
