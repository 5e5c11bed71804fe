"""Two small adapter files, and files that are made of them by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import safetensors.numpy

from edge_tcur_runtime.formats import adapter as module
from edge_tcur_runtime.formats.adapter import (
    Adapter,
    AdapterHeader,
    serialize_adapter,
)
from edge_tcur_runtime.formats.factors import Factors, GroupSpec, SketchFactors

BASE = "sha256:" + "b" * 64
KEY = "edge_tcur"


def small_adapter(**header):
    """One group of two 4 x 5 weights in rank 2, and a head."""
    core = np.arange(8, dtype=np.float32).reshape(2, 2, 2) / 8
    factors = Factors(core, np.array([[0, 3]], np.int32), np.array([[1, 4]], np.int32))
    fields = {"task": "image-classification", "labels": ("ja", "né"), "provenance": {"tool": "test"}}
    document = AdapterHeader(BASE, {"q": GroupSpec(("q.0", "q.1"), 4, 5)}, **{**fields, **header})
    return Adapter(document, {"q": factors}, {"head": np.array([0.5, -1.0], np.float32)})


def small_sketch(**header):
    """The same weights in the frame `sketch`, coupling none."""
    generator = np.random.default_rng(0)
    own = small_adapter(coupling="none", transform="identity", frame="sketch", **header)
    left, right = (generator.integers(-1, 2, shape, np.int8) for shape in ((2, 4, 2), (2, 2, 5)))
    return replace(own, factors={"q": SketchFactors.pack(own.factors["q"].core, left, right)})


SMALL = serialize_adapter(small_adapter())
SKETCH = serialize_adapter(small_sketch())


def unpack(raw):
    """(document, tensors) of an adapter file, nothing checked."""
    length = int.from_bytes(raw[:8], "little")
    document = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KEY])
    return document, dict(safetensors.numpy.load(raw))


def forge(edit=None, tensors=None, *, sign=True, raw=SMALL):
    """A file with an edited document and other tensors, whose digest is right: only rules refuse it."""
    document, arrays = unpack(raw)
    arrays |= tensors or {}
    arrays = {name: np.asarray(value, order="C") for name, value in arrays.items() if value is not None}
    document.pop("sha256")
    if edit is not None:
        edit(document)
    if sign:
        document["sha256"] = module._content_digest(document, arrays)
    return safetensors.numpy.save(arrays, {KEY: module._compact(document)})


def with_header(text, data=b""):
    """A safetensors file with this header, given as text or bytes."""
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def with_metadata(text):
    """A file whose one metadata value is `text`."""
    return safetensors.numpy.save(unpack(SMALL)[1], {KEY: text})


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*values):
    return np.array(values, np.int32)


def u8(*rows):
    return np.array(rows, np.uint8)


def edited(key, value):
    return lambda document: document.update({key: value})


def removed(key):
    return lambda document: document.pop(key)
