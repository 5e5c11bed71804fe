"""What a valid adapter file is, written a second time: the oracle of the fuzzer (`mutants.py`).

Nothing here uses the checks of the runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

DATA = Path(__file__).parents[1] / "data"
KEY = "edge_tcur"
FIELDS = (
    "format_version", "method", "coupling", "transform", "frame", "alpha", "base_digest", "task", "labels",
    "groups", "provenance",
)  # fmt: skip
CHOICES = {
    "method": ("tcurlora",),
    "coupling": ("none", "layer", "all"),
    "transform": ("dft", "dct", "identity"),
    "frame": ("raw", "orthonormal", "sketch"),
}
PARTS = {"core", "rows", "cols", "left", "right"}
Document = dict[str, Any]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Mutant:
    """A file, what was done to make it, and its content where it was forged."""

    raw: bytes
    how: str
    forged: tuple[Document, Tensors] | None = None


# --- files ---------------------------------------------------------------------------------------------


def unpack(raw: bytes) -> tuple[Document, Tensors]:
    """Document and tensors of a valid file."""
    length = int.from_bytes(raw[:8], "little")
    document = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KEY])
    document.pop("sha256")
    return document, dict(safetensors.numpy.load(raw))


def compact(document: Any) -> str:
    """The one way in which JSON is written."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def digest(document: Document, tensors: Tensors) -> str:
    """The digest of a document and its tensors, as docs/formats.md describes it."""
    state = hashlib.sha256()
    text = compact(document).encode("utf-8", "surrogatepass")
    state.update(f"{KEY}\0uint8\0{len(text)}\0".encode() + text)
    for name in sorted(tensors):
        value = tensors[name]
        shape = "x".join(map(str, value.shape))
        state.update(f"{name}\0{value.dtype.name}\0{shape}\0".encode() + value.tobytes())
    return "sha256:" + state.hexdigest()


def forge(document: Document, tensors: Tensors) -> bytes | None:
    """The file of a content, its digest right; None where safetensors cannot write it."""
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    signed = compact({**document, "sha256": digest(document, arrays)})
    try:
        return safetensors.numpy.save(arrays, {KEY: signed})
    except UnicodeEncodeError:
        return None


@cache
def seeds() -> tuple[bytes, ...]:
    """Valid files: both of version 1, and small ones of each coupling with several groups and a head."""
    generator = np.random.default_rng(0)
    found = [
        (DATA / "adapter-v1.safetensors").read_bytes(),
        (DATA / "sketch-v1" / "adapter.safetensors").read_bytes(),
    ]
    base, _ = unpack(found[0])
    for coupling, blocks in (("none", 4), ("layer", 2), ("all", 1)):
        groups, tensors = {}, {"head.weight": generator.normal(size=(2, 3)).astype(np.float32)}
        for name, n1, n2, rank in (("a", 6, 5, 2), ("é.b", 3, 9, 3)):
            groups[name] = {"parameters": [f"{name}.{i}" for i in range(4)], "n1": n1, "n2": n2}
            tensors[f"{name}.core"] = generator.normal(size=(4, rank, rank)).astype(np.float32)
            for part, size in (("rows", n1), ("cols", n2)):
                picks = [np.sort(generator.permutation(size)[:rank]) for _ in range(blocks)]
                tensors[f"{name}.{part}"] = np.array(picks, np.int32)
        document = {**base, "coupling": coupling, "labels": ["ja", "n\u00e9"], "groups": groups}
        document["provenance"] = {"command": 'x "y"\\\t', "tool": "fuzz"}
        raw = forge(document, tensors)
        assert raw is not None
        found.append(raw)
    return tuple(found)


# --- the rules, written a second time ------------------------------------------------------------------


def is_valid(document: Document, tensors: Tensors) -> bool:
    """Whether the format allows a content (docs/formats.md)."""
    return _fields_hold(document) and _groups_hold(document) and _tensors_hold(document, tensors)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**53


def _fields_hold(document: Document) -> bool:
    if tuple(document) != FIELDS or type(document["format_version"]) is not int:
        return False
    alpha, labels = document["alpha"], document["labels"]
    return (
        document["format_version"] == 1
        and all(isinstance(document[key], str) and document[key] in known for key, known in CHOICES.items())
        and type(alpha) is float
        and 0 < alpha < 1e6
        and _is_text(document["base_digest"])
        and _is_text(document["task"])
        and isinstance(labels, list)
        and all(_is_text(label) for label in labels)
        and not (document["frame"] == "sketch" and document["coupling"] != "none" and document["groups"])
    )


def _groups_hold(document: Document) -> bool:
    groups, provenance = document["groups"], document["provenance"]
    if not isinstance(groups, dict) or not isinstance(provenance, dict):
        return False
    if list(groups) != sorted(groups) or list(provenance) != sorted(provenance):
        return False
    if not all(_is_text(text) for pair in provenance.items() for text in pair):
        return False
    for name, group in groups.items():
        if not _is_text(name) or not isinstance(group, dict) or tuple(group) != ("parameters", "n1", "n2"):
            return False
        names = group["parameters"]
        if not isinstance(names, list) or not names or not all(_is_text(value) for value in names):
            return False
        if len(set(names)) != len(names) or not _is_size(group["n1"]) or not _is_size(group["n2"]):
            return False
    return True


def _tensors_hold(document: Document, tensors: Tensors) -> bool:
    rest, groups = dict(tensors), document["groups"]
    parts = ("core", "left", "right") if document["frame"] == "sketch" else ("core", "rows", "cols")
    if not tensors or not all(_name_holds(name) for name in tensors):
        return False
    for name, group in groups.items():
        found = [rest.pop(f"{name}.{part}", None) for part in parts]
        if any(value is None for value in found):
            return False
        if not _group_holds(document, group, *[value for value in found if value is not None]):
            return False
    return all(
        name.rpartition(".")[2] not in PARTS and value.dtype == np.float32 and bool(np.isfinite(value).all())
        for name, value in rest.items()
    )


def _name_holds(name: str) -> bool:
    return name.isprintable() and name not in ("", "__metadata__") and not set(name) & {"/", "\\"}


def _group_holds(
    document: Document, group: Document, core: np.ndarray, first: np.ndarray, second: np.ndarray
) -> bool:
    n3, rank = len(group["parameters"]), core.shape[-1] if core.ndim == 3 else 0
    if rank < 1 or core.dtype != np.float32 or core.shape != (n3, rank, rank):
        return False
    if not all(math.isfinite(value) for value in core.ravel().tolist()):
        return False
    if document["frame"] == "sketch":
        return all(_packed(part, n3, group[n] * rank) for part, n in ((first, "n1"), (second, "n2")))
    blocks = {"none": n3, "all": 1}.get(document["coupling"], first.shape[0] if first.ndim == 2 else 0)
    if not blocks or n3 % blocks:
        return False
    for part, size in ((first, group["n1"]), (second, group["n2"])):
        if part.dtype != np.int32 or part.shape != (blocks, rank):
            return False
        for row in part.tolist():
            if row != sorted(set(row)) or row[0] < 0 or row[-1] >= size:
                return False
    return True


def _packed(part: np.ndarray, n3: int, count: int) -> bool:
    if part.dtype != np.uint8 or part.shape != (n3, -(-count // 4)):
        return False
    for row in part.tolist():
        codes = [(byte >> shift) & 3 for byte in row for shift in (0, 2, 4, 6)]
        if 3 in codes[:count] or any(codes[count:]):
            return False
    return True


# --- verdicts -------------------------------------------------------------------------------------


def fault(origin: bytes, mutant: Mutant, read: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a verdict; None where it is right.

    Args:
        read: None where the file was refused, else its ``tensors`` and ``again``, the bytes written anew.
    """
    if mutant.forged is None:
        if read is None or mutant.raw == origin or mutant.raw in seeds():
            allowed = read is None or is_valid(*unpack(mutant.raw))
            return None if allowed else "a file that breaks the rules was accepted"
        return "a changed file was accepted"
    document, tensors = mutant.forged
    valid = is_valid(document, tensors)
    if valid != (read is not None):
        return "a valid file was refused" if valid else "a file that breaks the rules was accepted"
    if read is None:
        return None
    same = set(read["tensors"]) == set(tensors) and all(
        value.tobytes() == read["tensors"][name].tobytes() for name, value in tensors.items()
    )
    return None if same and read["again"] == mutant.raw else "what was read is not what was written"
