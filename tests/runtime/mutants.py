"""Damaged and forged adapter files. What must become of each: `oracle.py`.

There are two kinds of mutants:

*Altered*: bytes of a file are changed (bits, spans, cuts, the header's JSON), and the digest inside is left.
Oracle: a file that differs from the one it came from is refused.

*Forged*: the document and the tensors are changed and the digest is computed anew, so that it is right and
only the rules of the format can refuse the file. Oracle: `oracle.is_valid`, the rules written a second time.
The file is accepted if and only if they hold, what was read is what was written, and writing it again gives
the same bytes.

In both cases a refusal is an `EdgeError`; any other exception is a fault. A mutant is a function of a seed
and a number alone.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import numpy as np
from oracle import FIELDS, KEY, Document, Mutant, Tensors, compact, forge, seeds, unpack

MAX_HEADER = 64 * 2**10

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


def _odd(rng: random.Random) -> Any:
    """One of `ODD`, of its own: an edit of the next mutant may go into it."""
    return deepcopy(rng.choice(ODD))


def _walk(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [deeper for key, child in inner for deeper in _walk(child, (*path, key))]


def edit_json(rng: random.Random, document: Document) -> str:
    """Changes one thing in place, and says what."""
    paths = _walk(document)
    if not paths:
        document["x"] = _odd(rng)
        return "set at x"
    path, parent = rng.choice(paths), cast("Any", document)
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], rng.choice(("set", "set", "set", "near", "delete", "add", "order", "double"))
    if how == "set":
        parent[key] = _odd(rng)
    elif how == "near":
        parent[key] = _near(rng, parent[key])
    elif how == "delete":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "../x", "sha256", "n1", "q.core", str(key) + " "))] = _odd(rng)
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, deepcopy(parent[key]))
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
