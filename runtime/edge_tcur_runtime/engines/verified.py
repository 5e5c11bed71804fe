"""What a session was opened from is what was verified: a file may be swapped between the check and the use.

`edge_tcur_runtime.formats.bundle.open_bundle` digests every file of a bundle; a library opens them by name
some time later. What is parsed here is read once (`edge_tcur_runtime.formats.content`). So is a graph, whose
bytes are handed over where the library takes bytes. What it opens itself (the base, and graphs in an ONNX
Runtime that finds no external data for bytes) is digested again after it was loaded. The base stays mapped:
whoever may write the file can still change it later, which `personalize` finds at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_tcur_runtime.engines.engine import require_onnxruntime
from edge_tcur_runtime.formats.bundle import BASE_FILE, FileEntry, verify_file
from edge_tcur_runtime.formats.content import read_content

_FOLDER = "session.model_external_initializers_file_folder_path"
# 1.19.2 does not know the entry, and looks for the base in the working directory.
_KNOWN_SINCE = (1, 22)
Files = Mapping[str, FileEntry]


def graph_source(path: Path, files: Files, options: Any) -> str | bytes:
    """What an ``InferenceSession`` is opened from: the verified bytes of a graph, or its path where the
    installed ONNX Runtime cannot take bytes; then `require_unchanged` must name the graph too.

    Args:
        files: the entries of the bundle's manifest.
        options: of the session; told where the base is.

    Raises:
        IntegrityError: the bytes are not those of the manifest.
        BadInputError: the file cannot be read.
    """
    if not takes_bytes(require_onnxruntime().version):
        return str(path)
    raw = read_content(path.parent, files, path.name)
    options.add_session_config_entry(_FOLDER, str(path.parent))
    return raw


def takes_bytes(version: str) -> bool:
    """Whether this version of ONNX Runtime finds external data for a graph that it was handed as bytes."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= _KNOWN_SINCE


def require_unchanged(root: Path, files: Files, *names: str) -> None:
    """Digests files of a bundle again, after a library opened them; one pass over the base.

    Raises:
        IntegrityError: one of them is no longer what the manifest says.
        BadInputError: it cannot be read.
    """
    for name in names:
        verify_file(root / name, files[name])


def require_session_unchanged(path: Path, files: Files, source: str | bytes) -> None:
    """`require_unchanged` of what a session read by name: the base, and the graph that came as a path."""
    read_by_name = (BASE_FILE,) if isinstance(source, bytes) else (path.name, BASE_FILE)
    require_unchanged(path.parent, files, *(name for name in read_by_name if name in files))
