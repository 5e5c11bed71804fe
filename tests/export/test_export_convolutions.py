"""Adapted convolutions: their frozen form against the method's own layers, and bundles of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.targets import find_targets
from edge_tcur.training import TrainConfig
from edge_tcur_export.convolution import FrozenConvolution, Parts, Updates
from edge_tcur_export.trace import stored_weight
from edge_tcur_runtime.formats.bundle import BASE_FILE
from edge_tcur_runtime.formats.factors import Factors

OPTIONS = (
    {"padding": 1},
    {"stride": 2},
    {"padding": 2, "dilation": 2, "bias": False},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "circular"},
)


class Fixed:
    """An update with given parts."""

    def __init__(self, *parts):
        self._parts = Parts(*parts)

    def parts(self, position):
        return self._parts


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_convolution_computes_what_the_method_does(axes, options):
    torch.manual_seed(0)
    plain = getattr(nn, f"Conv{axes}d")(3, 5, 3, **options)
    model = nn.ModuleDict({"layer": plain})
    x = torch.randn(2, 3, *[6] * axes)
    rows, cols, core = torch.tensor([0, 3]), torch.tensor([4, 7]), torch.randn(2, 2)
    frozen, updates = FrozenConvolution(plain), Updates()
    frozen.adapt(updates, "group", 0)
    updates.by_group["group"] = Fixed(frozen.rows_t(rows), core.T, frozen.columns_t(cols))
    found = frozen(x)
    factors = Factors(core.numpy()[None], rows.int().numpy()[None], cols.int().numpy()[None])
    inject(
        model, TCurConfig(rank=2, targets="layer", frame="raw", selection="norm"), factors={"layer": factors}
    )
    expected = model["layer"](x)
    assert (expected - plain(x)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


SETTINGS = {
    "gathered": {"targets": "*.stem,*.layers.*,*.point"},
    "sketched": {"targets": "*.layers.*,*.point", "frame": "sketch"},
    "coupled": {"targets": "*.layers.*", "coupling": "all", "transform": "dct", "selection": "norm"},
}


@pytest.fixture(scope="session")
def convolutions(digits_npz, tmp_path_factory, kit):
    """Bundles of the convolutional model by their settings, made when first asked for."""
    made = {}

    def call(kind):
        if kind not in made:
            usual = {"task": "image-classification", "rank": 2, "epochs": 2, "threads": 1}
            config = TrainConfig("zoo_models:convolutions", str(digits_npz), **usual, **SETTINGS[kind])
            made[kind] = kit.export(config, tmp_path_factory.mktemp(kind), ("onnx", "step"))
        return made[kind]

    return call


@pytest.fixture(params=list(SETTINGS))
def exported(request, convolutions, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return convolutions(request.param)


def test_bundles_of_adapted_convolutions(exported, kit):
    kit.check_parity(exported)
    kit.check_answers(exported)
    for rank, samples in ((1, 1), (5, 4)):
        kit.check_other_factors(exported, rank, samples)


def test_each_weight_is_stored_once_and_where_the_manifest_says(exported):
    raw = exported.bundle.path(BASE_FILE).read_bytes()
    state, manifest = exported.base().model.state_dict(), exported.bundle.manifest
    for name, place in manifest.tensors.items():
        value = state[name].flatten(1)
        assert (place.transposed, place.shape) == (False, tuple(value.shape))
        content = value.numpy().tobytes()
        assert raw[place.offset : place.offset + len(content)] == content
        assert raw.count(content) == 1
        assert raw.count(value.T.contiguous().numpy().tobytes()) == (1 if min(value.shape) == 1 else 0)
    assert stored_weight("a.weight") == ("model.a.weight_t", "model.a.weight")


@pytest.mark.parametrize("kind", ["gathered", "coupled"])
def test_a_device_personalises_convolutions(kind, convolutions, monkeypatch, kit, digits_npz, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    exported = convolutions(kind)
    own = exported.run.adapter()
    groups = find_targets(exported.base().model, exported.run.config.method()).groups
    assert {group.name for group in groups} == set(own.factors)
    kit.check_personalisation(exported, digits_npz, tmp_path / "personal.safetensors", 0.05, "adapter")
