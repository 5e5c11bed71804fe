"""Reads device profiles: those shipped in `profiles/`, and a user's own file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import tomllib

from edge_tcur_runtime.errors import ConfigError, UsageError
from edge_tcur_runtime.formats.adapter import read_bounded
from edge_tcur_runtime.formats.device import KINDS, DeviceProfile
from edge_tcur_runtime.formats.schema import nearest

PROFILES = Path(__file__).parent / "profiles"
MAX_PROFILE_BYTES = 64 * 2**10
_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def load_profile(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile of a shipped device, or the one in the user's own file.

    Args:
        name_or_path: a shipped name such as ``pixel-8``, or the path of a TOML file; a string is a
            path when it ends in ``.toml`` or contains a directory separator.

    Raises:
        UsageError: no shipped profile has this name.
        BadInputError: the file cannot be read.
        ConfigError: the file is not TOML; `where` gives the line.
        FileFormatError: a field is unknown, missing or not valid.
    """
    if isinstance(name_or_path, str) and not _is_path(name_or_path):
        return _read(_shipped(name_or_path))
    return _read(Path(name_or_path))


def list_profiles() -> list[DeviceProfile]:
    """All shipped profiles, by kind (`edge_tcur_runtime.formats.device.KINDS`) and name."""
    profiles = [_read(path) for path in PROFILES.glob("*.toml")]
    return sorted(profiles, key=lambda profile: (KINDS.index(profile.kind), profile.name))


def _is_path(text: str) -> bool:
    return text.endswith(".toml") or "/" in text or os.sep in text


def _shipped(name: str) -> Path:
    names = sorted(path.stem for path in PROFILES.glob("*.toml"))
    if name not in names:
        guess = nearest(name, names)
        known = f"did you mean {guess!r}?" if guess else f"shipped profiles: {', '.join(names)}."
        raise UsageError(
            f"there is no device profile named {name!r}",
            hint=f"{known} Your own profile is given by its path, ending in .toml",
        )
    return PROFILES / f"{name}.toml"


def _read(path: Path) -> DeviceProfile:
    return DeviceProfile.from_document(_parse_toml(read_bounded(path, MAX_PROFILE_BYTES), path), str(path))


def _parse_toml(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError("not UTF-8 text", where=f"{path}:{line}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = _LINE.search(message)
        line = int(found.group(1)) if found and found.group(1) else text.count("\n") + 1
        raise ConfigError(f"not valid TOML: {_LINE.sub('', message)}", where=f"{path}:{line}") from error
    except RecursionError as error:
        raise ConfigError("not valid TOML: nested too deeply", where=str(path)) from error
