"""The bundle of version 1 with a reference set."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edge_tcur_runtime.formats.bundle import (
    MANIFEST,
    FileEntry,
    ReferenceSpec,
    open_bundle,
    serialize_manifest,
)
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.personalize import bundle_adapter
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.reference import reference_tensors

V1 = Path(__file__).parents[1] / "data" / "bundle-v1"
FILE = "reference.safetensors"


def with_reference(root, tensors, **spec):
    """The committed bundle with a reference set."""
    shutil.copytree(V1, root)
    (root / FILE).write_bytes(save(tensors))
    manifest = open_bundle(V1).manifest
    entry = FileEntry((root / FILE).stat().st_size, digest_file(root / FILE))
    reference = ReferenceSpec(**{"file": FILE, "samples": 32, "measure": "base", **spec})
    manifest = replace(manifest, files={**manifest.files, FILE: entry}, reference=reference)
    (root / MANIFEST).write_bytes(serialize_manifest(manifest))
    return open_bundle(root)


def tensors_of(bundle, user, own_answers):
    """32 pictures and their labels: the user's, or what the bundle's own adapter answers (the user's differ
    from them in every picture)."""
    part = user.select(np.arange(32))
    inputs = build_preprocessor(bundle.manifest.preprocessing, bundle.root)(part.samples)
    model = Model(bundle, threads=1)
    model.attach(bundle_adapter(bundle))
    answers = model.outputs(inputs).argmax(axis=1)
    targets = np.array([bundle.manifest.labels.index(label) for label in part.labels])
    assert not (answers == targets).any()
    return reference_tensors(inputs, answers if own_answers else targets)
