"""Short runs of the bundles of version 1, an engine whose answers are known, and what can be asked for."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tcur_runtime.budget import Budget
from edge_tcur_runtime.coordinates import Coordinates, read_coordinates
from edge_tcur_runtime.data import Dataset, encode_labels
from edge_tcur_runtime.engines import StepResult, open_engine
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader
from edge_tcur_runtime.formats.factors import Factors, GroupSpec
from edge_tcur_runtime.frame import Frame
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import bundle_adapter
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings
from edge_tcur_runtime.tasks import find_device_task
from edge_tcur_runtime.trainer import Batch, Trainer

INSTALLED = find_onnxruntime()
ONE_LABEL = find_device_task("image-classification")
needs_training = pytest.mark.skipif(
    INSTALLED is None or not INSTALLED.training,
    reason="the installed ONNX Runtime has no training interface (onnxruntime-training-cpu has)",
)
ENGINE = ["ort-step", pytest.param("ort-training", marks=needs_training)]


def quick(**changes):
    """Settings of a short run on one thread."""
    optimizer = AdamWSettings(**changes.pop("optimizer", {}))
    return PersonalizeSettings(
        **{"epochs": 4, "threads": 1, "engine": "ort-step", "optimizer": optimizer, **changes}
    )


def make_trainer(bundle, user, settings, budget=None, start=None):
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    data = Batch(user, encode_labels(user, bundle.manifest.labels), preprocess, ONE_LABEL)
    coordinates = read_coordinates(bundle, start or bundle_adapter(bundle))
    engine = open_engine(settings.engine, bundle, threads=1)
    return Trainer(engine, coordinates, data, settings, Budget(budget))


class Quadratic:
    """An engine whose loss is half the squared distance of a core and a head from each sample's target."""

    name = "quadratic"

    def __init__(self, spoil=lambda count, result: result):
        self.sizes = []
        self._spoil = spoil

    def step(self, inputs, targets, feeds):
        self.sizes.append(len(targets))
        wanted = targets.astype(np.float64)[:, None]
        gradients, loss = {}, 0.0
        for name in ("q.core", "head"):
            apart = feeds[name].astype(np.float64).ravel()[None] - wanted
            loss += float(np.square(apart).sum(axis=1).mean()) / 2
            gradients[name] = apart.mean(axis=0).reshape(feeds[name].shape).astype(np.float32)
        result = StepResult(loss, np.eye(2, dtype=np.float32)[targets], gradients)
        return self._spoil(len(self.sizes), result)


def quadratic_trainer(engine, settings, count=7):
    """A trainer of one core and a head in the raw frame, on samples whose targets are 0 or 1."""
    header = AdapterHeader("sha256:b", {"q": GroupSpec(("q.0",), 4, 4)}, "t", ("0", "1"), frame="raw")
    indices = np.array([[0, 1]], np.int32)
    core = Factors(np.full((1, 2, 2), 3, np.float32), indices, indices)
    start = Adapter(header, {"q": core}, {"head": np.full(3, 3, np.float32)})
    samples = np.arange(count, dtype=np.float32)[:, None, None]
    labels = tuple(str(index % 2) for index in range(count))
    dataset = Dataset("image", samples, labels, "made", labels)
    data = Batch(dataset, encode_labels(dataset, ("0", "1")), lambda samples: {"x": samples}, ONE_LABEL)
    return Trainer(engine, Coordinates(start, {"q": Frame()}), data, settings, Budget())
