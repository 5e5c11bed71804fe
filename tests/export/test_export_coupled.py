"""Bundles of coupled weights: the paper's preset, and coupling by layer along a DCT with modules trained in
full; and of weights alone with trained biases, those of adapted layers among them. What is in them, that they
answer as torch does, and that a device can personalise them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

SAVED = {f"module.{name}.{part}" for name in ("classifier", "vit.layernorm") for part in ("weight", "bias")}
BIASES = {
    f"module.vit.layers.{layer}.{name}.bias" for layer in range(2) for name in ("attention.q_proj", "mlp.fc2")
}
EXTRAS = {"paper": set(), "saved": SAVED, "biases": BIASES}
# Weights, blocks and rank of each group.
GROUPS = {
    "paper": {"16x16": (4, 1, 2), "16x32": (2, 1, 2)},
    "saved": {"16x16": (4, 2, 2), "32x16": (2, 2, 3)},
    "biases": {"attention.q_proj": (2, 2, 2), "mlp.fc1": (2, 2, 2)},
}


@pytest.fixture(scope="session")
def saved(export_vit):
    settings = {
        "grouping": "shape", "coupling": "layer", "transform": "dct", "selection": "leverage",
        "targets": "*.q_proj,*.v_proj,*.fc1", "rank_pattern": "*.fc1=3",
        "modules_to_save": "module.classifier,module.vit.layernorm",
    }  # fmt: skip
    return export_vit("saved", settings)


@pytest.fixture(scope="session")
def biases(export_vit):
    settings = {"targets": "q_proj,fc1", "selection": "norm", "modules_to_save": "q_proj.bias,*.fc2.bias"}
    return export_vit("biases", settings)


@pytest.fixture(params=["paper", "saved", "biases"])
def kind(request):
    return request.param


@pytest.fixture
def exported(kind, request):
    return request.getfixturevalue(kind)


def test_every_graph_agrees_with_torch(exported, kit):
    kit.check_parity(exported)


def test_the_manifest_says_what_is_fed(exported, kind, kit):
    kit.check_manifest(exported, GROUPS[kind], EXTRAS[kind])


def test_nothing_fed_is_the_base_and_the_adapter_fed_is_the_adapter(exported, kit):
    kit.check_answers(exported)


@pytest.mark.parametrize(("rank", "samples"), [(1, 1), (5, 4), (16, 2)])
def test_other_factors_than_the_runs_may_be_fed(exported, kit, rank, samples):
    kit.check_other_factors(exported, rank, samples)


@pytest.mark.parametrize("kind", ["saved", "biases"])
def test_the_bases_own_values_of_what_is_trained_in_full(kind, request):
    saved, names = request.getfixturevalue(kind), EXTRAS[kind]
    manifest = saved.bundle.manifest
    stored = load_file(saved.bundle.path(manifest.base_extras))
    assert set(stored) == names
    state, adapter = saved.base().model.state_dict(), saved.run.adapter()
    for name, value in stored.items():
        np.testing.assert_array_equal(value, state[name].numpy())
        assert not np.array_equal(value, adapter.extras[name])  # it was trained
    defaults = {tensor.name for tensor in saved.graph("infer").graph.initializer}
    assert defaults >= names
    assert {f"{name}.grad" for name in names} <= {value.name for value in saved.graph("step").graph.output}


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_device_personalises_with_the_step_graph(exported, kind, start, kit, digits_npz, tmp_path):
    rate = 1.0 if kind == "paper" else 0.05  # raw coordinates
    kit.check_personalisation(exported, digits_npz, tmp_path / "personal.safetensors", rate, start)
