"""Options that the commands of `edge-tcur publish` share: the repository, the keys and their passphrase."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_tcur_runtime.cli.framework import DIRECTORY, EXISTING_DIRECTORY, EXISTING_FILE, add_options
from edge_tcur_runtime.errors import MissingEngineError, UsageError

if TYPE_CHECKING:
    from edge_tcur.publish.repository import Repository

R = TypeVar("R")
ENVIRONMENT = {"online": "EDGE_TCUR_PASSPHRASE", "root": "EDGE_TCUR_ROOT_PASSPHRASE"}
PIN = "EDGE_TCUR_PIN"
_MAX_PASSPHRASE = 4096


repo_option = click.option(
    "--repo", type=DIRECTORY, required=True, metavar="DIR", help="The directory that is served."
)


def key_options(command: Callable[..., R]) -> Callable[..., R]:
    """Adds the place of the keys and of their passphrases; the command receives `keys`, a dict."""
    names = ("keys_folder", "root_keys_at", "passphrase_file", "root_passphrase_file")

    @add_options(
        click.option("--keys", "keys_folder", type=DIRECTORY, metavar="DIR",
                     help="The directory of keys, never served.  [default: <repo>.keys beside it]"),
        click.option("--root-keys-at", type=EXISTING_DIRECTORY, metavar="DIR",
                     help="Where the root's key files are, if not there: an offline medium."),
        click.option("--passphrase-file", type=EXISTING_FILE, metavar="FILE",
                     help=f"Its first line opens the keys.  [else ${ENVIRONMENT['online']}, else asked]"),
        click.option("--root-passphrase-file", type=EXISTING_FILE, metavar="FILE",
                     help=f"For the root's keys.  [else ${ENVIRONMENT['root']}, else as the others]"),
    )  # fmt: skip
    @functools.wraps(command)
    def with_keys(*arguments: Any, **options: Any) -> R:
        _require_libraries()
        keys = {name: options.pop(name) for name in names}
        return command(*arguments, keys=keys, **options)

    return with_keys


def open_repository(repo: Path, keys: dict[str, Any], *, new: bool = False) -> Repository:
    """The repository with its keys; nothing is asked before a key is opened."""
    from edge_tcur.publish.keys import KeyStore
    from edge_tcur.publish.repository import Repository

    folder = keys["keys_folder"] or default_keys(repo)
    _check_apart(repo, folder)
    store = KeyStore(folder, _Passphrases(keys, new), keys["root_keys_at"], _ask_secret)
    return Repository(repo, store)


def _require_libraries() -> None:
    missing = [name for name in ("tuf", "cryptography") if find_spec(name) is None]
    if missing:
        hint = "pip install 'edge-tcur[publish]'"
        raise MissingEngineError(f"publishing needs {missing[0]}, which is not installed", hint=hint)


def default_keys(repo: Path) -> Path:
    """``<repo>.keys`` beside the repository."""
    place = repo.resolve()
    return place.with_name(f"{place.name}.keys")


def _check_apart(repo: Path, folder: Path) -> None:
    served, hidden = repo.resolve(), folder.resolve()
    if hidden == served or served in hidden.parents:
        raise UsageError("the keys would be served", where=str(folder), hint="keep them outside --repo")


def _ask_secret(name: str) -> str:
    """The PIN of a token: from the environment, or a prompt on a terminal."""
    if PIN in os.environ:
        return os.environ[PIN]
    if not sys.stdin.isatty():
        raise UsageError(f"the signer asks for its {name}", hint=f"give it with {PIN}")
    return str(click.prompt(f"The signer's {name}", hide_input=True, err=True))


class _Passphrases:
    """Finds each passphrase once: its file, the environment, or a prompt on a terminal."""

    def __init__(self, keys: dict[str, Any], new: bool) -> None:
        self._files = {"online": keys["passphrase_file"], "root": keys["root_passphrase_file"]}
        self._new = new
        self._known: dict[str, bytes] = {}

    def __call__(self, role: str) -> bytes:
        from edge_tcur.publish.keys import check_passphrase

        if role not in self._known:
            self._known[role] = check_passphrase(self._find(role))
        return self._known[role]

    def _find(self, role: str) -> bytes:
        for kind in dict.fromkeys((role, "online")):
            path = self._files[kind]
            if path is not None:
                with Path(path).open("rb") as file:
                    return file.readline(_MAX_PASSPHRASE).rstrip(b"\r\n")
            if ENVIRONMENT[kind] in os.environ:
                return os.environ[ENVIRONMENT[kind]].encode()
        if not sys.stdin.isatty():
            hint = f"give it with --passphrase-file or {ENVIRONMENT['online']}"
            raise UsageError("the keys need a passphrase and there is no terminal to ask on", hint=hint)
        label = "root's" if role == "root" else "publisher's"
        text = click.prompt(
            f"Passphrase of the {label} keys", hide_input=True, confirmation_prompt=self._new, err=True
        )
        return str(text).encode()
