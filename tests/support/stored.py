"""Adapters to put into a store, and which of them it gives back."""

from __future__ import annotations

import numpy as np

from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.factors import Factors, GroupSpec

BASE = "sha256:" + "b" * 64
OTHER_BASE = "sha256:" + "c" * 64
CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir")  # of `os`, by which a store writes


def adapter_bytes(seed, base=BASE):
    """A valid adapter file of rank 2 over two 4 x 5 weights."""
    core = np.random.default_rng(seed).normal(size=(2, 2, 2)).astype(np.float32)
    factors = Factors(core, np.array([[0, 3]], np.int32), np.array([[1, 4]], np.int32))
    header = AdapterHeader(base, {"q": GroupSpec(("q.0", "q.1"), 4, 5)}, "text-classification", ("a", "b"))
    return serialize_adapter(Adapter(header, {"q": factors}, {"head": np.ones(3, np.float32)}))


A, B, C, UNUSED = (adapter_bytes(seed) for seed in range(4))
DA, DB, DC = (digest_bytes(raw) for raw in (A, B, C))
HEX = DA.removeprefix("sha256:")


def core_of(raw):
    """The trained numbers of an adapter file, as bytes."""
    return parse_adapter(raw).factors["q"].core.tobytes()


def loaded(store, ref="active"):
    """Which of A, B, C a reference loads."""
    core = store.load(ref).factors["q"].core.tobytes()
    return next(raw for raw in (A, B, C) if core_of(raw) == core)
