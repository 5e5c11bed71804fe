"""Damaged and forged adapter files, and what must become of each: the fuzzer's own knowledge of the format.

Nothing here uses the checks of the runtime. There are two kinds of mutants:

*Altered*: bytes of a file are changed (bits, spans, cuts, the header's JSON), and the digest inside is left.
Oracle: a file that differs from the one it came from is refused.

*Forged*: the document and the tensors are changed and the digest is computed anew, so that it is right and
only the rules of the format can refuse the file. Oracle: `is_valid`, the rules written a second time. The
file is accepted if and only if they hold, what was read is what was written, and writing it again gives the
same bytes.

In both cases a refusal is an `EdgeError`; any other exception is a fault. A mutant is a function of a seed
and a number alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

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
MAX_HEADER = 64 * 2**10
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


# --- altered bytes -------------------------------------------------------------------------------------


def _place(rng: random.Random, raw: bytes) -> int:
    """A position; half of the time in the header, which is where the structure is."""
    end = min(len(raw), 8 + int.from_bytes(raw[:8], "little")) if rng.random() < 0.5 else len(raw)
    return rng.randrange(max(end, 1))


def flip(rng: random.Random, raw: bytes) -> bytes:
    """One to eight bits are turned."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[_place(rng, raw) % len(raw)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def write_byte(rng: random.Random, raw: bytes) -> bytes:
    """One byte becomes another, of those that mean something more often."""
    place = _place(rng, raw)
    byte = rng.choice((*b'{}[]",:\\ \t\n\r-+.eE019\0\x7f\x80\xff', rng.randrange(256)))
    return raw[:place] + bytes([byte]) + raw[place + 1 :]


def cut(rng: random.Random, raw: bytes) -> bytes:
    """The file ends early, or lacks its beginning."""
    place = _place(rng, raw)
    return raw[:place] if rng.random() < 0.8 else raw[place:]


def extend(rng: random.Random, raw: bytes) -> bytes:
    """Bytes stand behind the end."""
    return raw + rng.choice((b"\0", b" ", b"\n", raw, rng.randbytes(rng.randrange(1, 64))))


def move_span(rng: random.Random, raw: bytes) -> bytes:
    """A span is deleted, repeated, zeroed, reversed, filled anew or taken from another file."""
    start = _place(rng, raw)
    end = min(len(raw), start + rng.choice((1, 2, 4, 8, 64, 512)))
    span, other = raw[start:end], rng.choice(seeds())
    place = rng.randrange(len(other))
    new = rng.choice(
        (
            b"",
            span * 2,
            bytes(len(span)),
            span[::-1],
            rng.randbytes(len(span)),
            other[place : place + len(span)],
        )
    )
    return raw[:start] + new + raw[end:]


def splice(rng: random.Random, raw: bytes) -> bytes:
    """The beginning of one file and the end of another, at its header or anywhere."""
    other = rng.choice(seeds())
    if rng.random() < 0.5:
        mine, its = (8 + int.from_bytes(value[:8], "little") for value in (raw, other))
        return raw[:mine] + other[its:]
    return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]


def head_length(rng: random.Random, raw: bytes) -> bytes:
    """Another length of the header stands in front."""
    length = int.from_bytes(raw[:8], "little")
    new = rng.choice(
        (0, 1, length - 1, length + 1, length + 8, len(raw) - 8, len(raw), MAX_HEADER, MAX_HEADER + 1, 2**31,
         2**63 - 1, 2**63, 2**64 - 1, rng.randrange(2**16), rng.randrange(2**64))
    )  # fmt: skip
    return struct.pack("<Q", max(new, 0) % 2**64) + raw[8:]


ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.0, 0.5, -0.0, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**25, 1e300,
    "", "x", "..", "../x", "a/b", "x\0y", "x\n", "\x7f", "\u202e", "\ud800", "é", "F32", "I32", "U8", "F64",
    "none", "all", "layer", "sketch", "raw", "dct", [], {}, [0], [1, 1], [0, 0], [[]], [-1], ["a", "a"],
    ["a"], {"a": 1}, [2**62, 0],
)  # fmt: skip


def _walk(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [deeper for key, child in inner for deeper in _walk(child, (*path, key))]


def edit_json(rng: random.Random, document: Document) -> str:
    """Changes one thing in place, and says what."""
    paths = _walk(document)
    if not paths:
        document["x"] = rng.choice(ODD)
        return "set at x"
    path, parent = rng.choice(paths), cast("Any", document)
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], rng.choice(("set", "set", "set", "near", "delete", "add", "order", "double"))
    if how == "set":
        parent[key] = rng.choice(ODD)
    elif how == "near":
        parent[key] = _near(rng, parent[key])
    elif how == "delete":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "../x", "sha256", "n1", "q.core", str(key) + " "))] = rng.choice(ODD)
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif isinstance(parent, dict):
        items = list(parent.items())
        rng.shuffle(items)
        parent.clear()
        parent.update(items)
    else:
        rng.shuffle(parent)
    return f"{how} at {'/'.join(map(str, path))}"


def _near(rng: random.Random, value: Any) -> Any:
    """A value close to `value`: what a check with an error of one lets through."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 8, -value, value))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, value + 1e-9, int(value), 999999.9, 1e6, 5e-324))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value + "\u0301", value[::-1]))
    return value[::-1] if isinstance(value, list) else dict(reversed(value.items()))


def header_json(rng: random.Random, raw: bytes) -> bytes:
    """The safetensors header is edited as JSON and written back, its length right."""
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    edit_json(rng, table)
    return _with_header(compact(table).encode("utf-8", "replace"), raw[8 + length :])


def header_text(rng: random.Random, raw: bytes) -> bytes:
    """The same header written otherwise: spaces, escapes, forms of numbers, a key twice, depth, no UTF-8."""
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length]
    old, new = rng.choice(
        (
            (b":", b": "), (b",", b", "), (b"}", b" }"), (b"[", b"[\t"), (b" ", b"\n"), (b"  ", b" "),
            (b"}", b"}\r"),
            (b'"dtype"', b'"\\u0064type"'), (b"core", b"c\\u006fre"), (b"0,", b"-0,"), (b"0,", b"0.0,"),
            (b"1", b"1e0"), (b"8", b"8.0"), (b'"dtype"', b'"dtype":"F32","dtype"'),
            (b'"__metadata__":{', b'"__metadata__":{},"__metadata__":{'), (b'{"edge', b'{"x":"","edge'),
            (b"[", b"[" * rng.choice((2, 100, 990, 5000))), (b"0", b"9" * rng.choice((20, 400, 5000))),
            (b"e", b"\xff"), (b"e", b"\xc0\x80"), (b"e", b"\xed\xa0\x80"), (b'"', b'\\"'), (b"0", b"1e999"),
            (b"0", b"NaN"), (b"{", b'{"\\ud800":0,'),
        )
    )  # fmt: skip
    places = [place for place in range(len(text)) if text.startswith(old, place)]
    if places:
        place = rng.choice(places)
        text = text[:place] + new + text[place + len(old) :]
    return _with_header(text + b" " * (rng.random() < 0.5) * (-len(text) % 8), raw[8 + length :])


def reorder(rng: random.Random, raw: bytes) -> bytes:
    """The same tensors in another order, with their data or without."""
    length = int.from_bytes(raw[:8], "little")
    table, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    items, moved, end = list(table.items()), b"", 0
    rng.shuffle(items)
    if rng.random() < 0.5:
        for name, entry in items:
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                moved += data[start:stop]
                entry["data_offsets"] = [end, end := end + stop - start]
        data = moved
    text = compact(dict(items)).encode()
    return _with_header(text + b" " * (-len(text) % 8), data)


def document_text(rng: random.Random, raw: bytes) -> bytes:
    """The document inside is edited or written otherwise, its digest left as it was."""
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    text = table["__metadata__"][KEY]
    if rng.random() < 0.5:
        document = json.loads(text)
        edit_json(rng, document)
        text = compact(document)
    else:
        old, new = rng.choice(
            ((":", ": "), ("1", "1.0"), ("1.0", "1.00"), ("1.0", "1"), ('"task"', '"\\u0074ask"'),
             ("{", "{\n"),
             ("}", ',"x":' + "[" * (depth := rng.choice((50, 900, 990, 4000))) + "]" * depth + "}"),
             ("{", '{"alpha":1.0,'), ("[", "[" * 2000), ("1", "1" * 30))
        )  # fmt: skip
        text = text.replace(old, new, 1)
    table["__metadata__"][KEY] = text
    written = compact(table).encode("utf-8", "replace")
    return _with_header(written + b" " * (-len(written) % 8), raw[8 + length :])


def _with_header(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


ALTER: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flip, write_byte, cut, extend, move_span, splice, head_length, header_json, header_text, reorder,
    document_text,
)  # fmt: skip


# --- forged contents -----------------------------------------------------------------------------------

NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, 1e-45, -1.0)


def edit_tensors(rng: random.Random, tensors: Tensors) -> str:
    """Changes one tensor, and says how."""
    name = rng.choice(sorted(tensors))
    how = rng.choice(("value", "value", "swap", "dtype", "shape", "drop", "add", "rename", "exchange"))
    value = tensors[name]
    if how == "value" and value.size:
        flat = value.copy().reshape(-1)
        if value.dtype == np.float32:
            flat[rng.randrange(flat.size)] = rng.choice(NUMBERS)
        elif value.dtype == np.int32:
            place = rng.randrange(flat.size)
            near = min(int(flat[place]), 2**31 - 2) + 1, max(int(flat[place]), 1 - 2**31) - 1
            flat[place] = rng.choice((-1, 0, 2**31 - 1, -(2**31), *near))
        else:
            octets = flat.view(np.uint8)
            octets[rng.randrange(octets.size)] = rng.randrange(256)
        tensors[name] = flat.reshape(value.shape)
    elif how == "swap":
        tensors[name] = np.flip(value, rng.randrange(value.ndim)) if value.ndim else value
    elif how == "dtype":
        kinds = ("<f4", "<i4", "u1", "<f8", "<f2", "<i8", "i1", "?")
        with np.errstate(all="ignore"):
            tensors[name] = value.astype(rng.choice(kinds))
    elif how == "shape":
        tensors[name] = _reshaped(rng, value)
    elif how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[rng.choice(("more", "a.core", "q.rows", "x.left", "../x", "x\0", "ü", "core"))] = value
    elif how == "rename":
        tensors[rng.choice((name + "x", name.replace(".", "_"), name.upper(), "x"))] = tensors.pop(name)
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{how} of {name!r}"


def _reshaped(rng: random.Random, value: np.ndarray) -> np.ndarray:
    choices: list[np.ndarray] = [value.reshape(-1), value[None]]
    choices += [np.zeros((), value.dtype), np.zeros((0, 2), value.dtype)]
    if value.ndim and len(value):
        choices += [value[1:], value[:-1], np.concatenate([value, value[-1:]]), value[..., :-1]]
        choices += [np.repeat(value, 2, axis=0), value.swapaxes(0, -1)]
    return rng.choice(choices)


def _valid_change(rng: random.Random, document: Document, tensors: Tensors) -> str:
    """A change that the format allows, so that files are accepted too."""
    how = rng.choice(("alpha", "labels", "core", "task"))
    if how == "alpha":
        document["alpha"] = rng.choice((0.25, 1e-300, 999999.0, rng.random() + 0.001))
    elif how == "labels":
        document["labels"] = [rng.choice(("", "\0", "é", '"\\', "\u2028")) for _ in range(rng.randrange(4))]
    elif how == "core":
        name = rng.choice([name for name in sorted(tensors) if name.endswith(".core")] or sorted(tensors))
        if tensors[name].dtype == np.float32:
            tensors[name] = tensors[name] * np.float32(0.5)
    else:
        document["task"] = rng.choice(("", "x" * 300, "t\n"))
    return f"allowed {how}"


def _forged(rng: random.Random, raw: bytes) -> Mutant | None:
    document, tensors = unpack(raw)
    steps = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("document", "document", "tensors", "tensors", "allowed"))
        if kind == "document":
            steps.append(edit_json(rng, document))
        elif kind == "tensors" and tensors:
            steps.append(edit_tensors(rng, tensors))
        elif document.keys() == set(FIELDS) and tensors:
            steps.append(_valid_change(rng, document, tensors))
    try:
        made = forge(document, tensors)
    except (ValueError, TypeError):  # NaN is no content of the library's, nor is a dtype that it lacks
        return None
    return None if made is None else Mutant(made, f"forged: {', '.join(steps)}", (document, tensors))


def make(seed: int, number: int) -> tuple[bytes, Mutant]:
    """The file that a mutant comes from, and the mutant."""
    rng = random.Random(f"{seed}/{number}")
    raw = rng.choice(seeds())
    forged = _forged(rng, raw) if rng.random() < 0.5 else None
    if forged is not None and rng.random() < 0.8:
        return raw, forged
    origin = raw if forged is None else forged.raw
    changed, steps = origin, []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        alter = rng.choice(ALTER)
        try:
            changed = alter(rng, changed)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            continue  # what came before left no header that this one could edit
        steps.append(alter.__name__)
    return origin, Mutant(changed, f"altered: {', '.join(steps)}")


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
