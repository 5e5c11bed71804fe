"""Bundles with the step graph's variants: recompute, and gradients through the last blocks alone. They agree
with torch, ONNX Runtime's optimiser leaves them as they are, and a device trains with them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import nn

from edge_tcur.errors import ExportError
from edge_tcur_export.last_blocks import adapted_blocks, split_blocks
from edge_tcur_export.settings import ExportSettings
from edge_tcur_export.step_graphs import StepGraphs
from edge_tcur_runtime import fitting
from edge_tcur_runtime import personalize as module
from edge_tcur_runtime.budget import Memory
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import ConfigError, IncompatibleError, UsageError
from edge_tcur_runtime.formats.adapter import serialize_adapter
from edge_tcur_runtime.formats.bundle import LastBlocks
from edge_tcur_runtime.personalize import bundle_adapter, personalize
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings

SAVED = "module.vit.layers.0.layernorm_before"
# A group of the first block, and a module trained in full in it, get no gradient at all. In `paper` each
# slice has a part in the update of every weight that is coupled to it: all of them learn.
SKETCHED = {"frame": "sketch", "grouping": "weight", "targets": "*.v_proj,*.fc1", "modules_to_save": SAVED}


@pytest.fixture(scope="session")
def sketched(export_vit):
    return export_vit("sketched", SKETCHED, recompute=True, last_blocks=1)


@pytest.fixture(params=["words", "paper", "sketched"])
def exported(request):
    return request.getfixturevalue(request.param)


def test_every_graph_agrees_with_torch(exported, kit):
    kit.check_parity(exported)
    others = {"train"} & set(exported.bundle.manifest.graphs)
    assert set(exported.report.parity) - others == {"infer", "step", "step_recompute", "step_last"}


def step(exported, kit, graph, seed=3):
    """One step of random factors."""
    factors, extras = kit.random_factors(exported, 2, seed), kit.random_extras(exported, seed)
    feeds = {f"{name}.{part}": array for name, own in factors.items() for part, array in own.feeds().items()}
    engine = open_engine("ort-step", exported.bundle, threads=1, graph=graph)
    return engine.step(kit.inputs_of(exported, 4, 6), np.arange(4) % 2, {**feeds, **extras})


def test_recompute_changes_no_number(exported, kit):
    plain, again = (step(exported, kit, graph) for graph in ("step", "step_recompute"))
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)
    np.testing.assert_allclose(again.outputs, plain.outputs, rtol=0, atol=1e-6 * np.abs(plain.outputs).max())
    assert set(again.gradients) == set(plain.gradients)
    for name, value in plain.gradients.items():
        assert value.any(), name
        np.testing.assert_allclose(again.gradients[name], value, rtol=0, atol=1e-6 * np.abs(value).max())


def optimised(path, target):
    """Operators that are left by ONNX Runtime's optimiser with all it has."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(target, load_external_data=False).graph.node]


def test_the_optimiser_keeps_what_is_computed_again(exported, tmp_path):
    """Attention of the first of two blocks is there twice; the second block's is not."""
    plain, again = (
        optimised(exported.bundle.graph(role), tmp_path / role) for role in ("step", "step_recompute")
    )
    assert (plain.count("Softmax"), again.count("Softmax")) == (2, 3)
    assert exported.bundle.manifest.recomputed_blocks == 1


def test_the_variants_add_kilobytes(exported):
    manifest = exported.bundle.manifest
    for role in ("step_recompute", "step_last"):
        assert manifest.files[manifest.graphs[role]].size < 2**20
    state = exported.base().model.state_dict()
    assert exported.report.base_bytes < sum(value.nbytes for value in state.values()) + 64 * len(state)


def test_the_last_blocks_alone_get_a_gradient(exported, kit):
    learning = exported.bundle.manifest.last_blocks
    plain, last = (step(exported, kit, graph) for graph in ("step", "step_last"))
    assert last.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, group in exported.bundle.manifest.groups.items():
        for place in range(len(group.parameters)):
            gradient = last.gradients[f"{name}.core"][place]
            assert gradient.any() == (place in learning.slices[name]), (name, place)
            assert plain.gradients[f"{name}.core"][place].any()
            if group.blocks > 1 and place in learning.slices[name]:  # nothing between it and the loss is cut
                expected = plain.gradients[f"{name}.core"][place]
                np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for name in exported.bundle.manifest.extras:
        assert last.gradients[name].any() == (name in learning.extras), name


def test_what_learns_is_in_the_manifest(words, paper, sketched):
    assert words.bundle.manifest.last_blocks == LastBlocks(
        1, dict.fromkeys(words.bundle.manifest.groups, (1,)), ("head.weight", "head.bias")
    )
    learning = paper.bundle.manifest.last_blocks
    assert learning.slices == {
        name: tuple(range(len(group.parameters))) for name, group in paper.bundle.manifest.groups.items()
    }
    learning = sketched.bundle.manifest.last_blocks
    still = {name for name, slices in learning.slices.items() if not slices}
    assert len(still) == 2
    assert len(learning.slices) == 4
    assert learning.extras == ()
    assert set(sketched.bundle.manifest.extras) == {f"{SAVED}.weight", f"{SAVED}.bias"}


# --- on the device ----------------------------------------------------------------------------------


def settings(**changes):
    optimizer = AdamWSettings(learning_rate=0.05, weight_decay=0.1)
    return PersonalizeSettings(epochs=2, threads=1, holdout=0.2, optimizer=optimizer, **changes)


@pytest.fixture
def user(digits_npz):
    return load_dataset(digits_npz, "image", image_size=(8, 8), channels=1)


@pytest.mark.parametrize("kind", ["paper", "sketched"])
def test_a_device_trains_the_last_blocks_and_leaves_every_other_bit(kind, request, user):
    bundle = request.getfixturevalue(kind).bundle
    own, learning = bundle_adapter(bundle), bundle.manifest.last_blocks
    result = personalize(bundle, user, settings(last_blocks=True), start=own)
    assert (result.engine, result.graph) == ("ort-step", "step_last")
    for group, part in own.factors.items():
        moved = result.adapter.factors[group].core
        for place, before in enumerate(part.core):
            if place in learning.slices[group]:
                assert (moved[place] != before).all()
            else:  # weight decay moves it where nothing holds it
                np.testing.assert_array_equal(moved[place], before)
    for name, before in own.extras.items():
        assert np.array_equal(result.adapter.extras[name], before) == (name not in learning.extras)


def test_recompute_is_taken_where_it_is_asked_for_and_trains_the_same_adapter(sketched, user):
    own = bundle_adapter(sketched.bundle)
    results = {
        choice: personalize(sketched.bundle, user, settings(recompute=choice, engine="ort-step"), start=own)
        for choice in ("off", "on", "auto")
    }
    graphs = {choice: result.graph for choice, result in results.items()}
    assert graphs == {"off": "step", "on": "step_recompute", "auto": "step"}  # there is no budget
    np.testing.assert_allclose(results["on"].losses, results["off"].losses, rtol=1e-5)
    assert serialize_adapter(results["auto"].adapter) == serialize_adapter(results["off"].adapter)


@pytest.mark.parametrize(("room", "graph", "opened"), [(1.9, "step_recompute", 1), (2.1, "step", 2)])
def test_auto_takes_the_plain_step_where_it_surely_fits(sketched, user, monkeypatch, room, graph, opened):
    """In a bundle without tables. With one block computed again, a sample of the plain step takes at most
    twice as much."""
    mib, roles = 2**20, []
    peaks = iter([100, 110] * 2)
    real = open_engine

    def noted(*arguments, **options):
        roles.append(options["graph"])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "open_engine", noted)
    monkeypatch.setattr(
        module.Trainer, "_measure", lambda *_: Memory(peak := next(peaks) * mib, peak, peak, 0)
    )
    monkeypatch.setattr(module.Budget, "check", lambda *_: Memory(1, 1, 1, 0))
    monkeypatch.setattr(module.Budget, "require", lambda *_: None)
    monkeypatch.setattr(fitting, "_require_room", lambda *_: None)  # this process is larger than what is told
    limit = round((110 + room * 10) * mib)
    bundle = replace(sketched.bundle, manifest=replace(sketched.bundle.manifest, memory=None))
    result = personalize(bundle, user, settings(budget=limit, engine="ort-step"))
    assert (result.graph, len(roles)) == (graph, opened)
    assert roles[0] == "step_recompute"
    assert roles[-1] == graph


def test_the_graph_that_recomputes_runs_in_the_order_of_the_file(sketched):
    """ONNX Runtime's own order walks back from the last gradient and puts the others off; of the other graphs
    it is right, where quantised weights stand first in the file."""
    orders = [
        open_engine("ort-step", sketched.bundle, threads=1, graph=graph)
        ._session.get_session_options()
        .execution_order
        for graph in ("step", "step_recompute")
    ]
    order = onnxruntime.ExecutionOrder
    assert orders == [order.DEFAULT, order.PRIORITY_BASED]


def test_what_the_bundle_or_the_engine_does_not_have_is_refused(vit, user):
    for choice, option in (({"recompute": "on"}, "--recompute"), ({"last_blocks": True}, "--last-blocks")):
        with pytest.raises(IncompatibleError, match="the bundle has no step_") as caught:
            personalize(vit.bundle, user, settings(**choice))
        assert option in caught.value.hint
        with pytest.raises(ConfigError, match="ort-training has no such graph"):
            personalize(vit.bundle, user, settings(engine="ort-training", **choice))
    with pytest.raises(ConfigError, match="nothing to recompute"):
        settings(recompute="on", last_blocks=True)
    with pytest.raises(ConfigError, match="expected auto, on, off"):
        settings(recompute="maybe")


# --- what is refused before any work ---------------------------------------------------------------


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UsageError, match="--recompute is for the step graph"):
        ExportSettings(("onnx",), recompute=True)
    with pytest.raises(UsageError, match="--last-blocks is for the step graph"):
        ExportSettings(("onnx", "ort-training"), last_blocks=1)
    with pytest.raises(UsageError, match="--last-blocks -1"):
        ExportSettings(last_blocks=-1)


def test_a_base_without_numbered_blocks_is_refused(vit):
    with pytest.raises(ExportError, match="the model has 2"):
        split_blocks(["layers.0", "layers.1"], 2)
    flat = SimpleNamespace(model=nn.Linear(2, 2), preprocessing={}, inputs={})
    with pytest.raises(ExportError, match=r"--recompute needs two numbered blocks .* the model has 0"):
        StepGraphs(flat, (), None, ExportSettings(recompute=True), None)
    with pytest.raises(ExportError, match=r"--last-blocks 1 needs more than 1 numbered blocks"):
        StepGraphs(flat, (), None, ExportSettings(last_blocks=1), None)


class Crossed(nn.Module):
    """Runs its second block first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])

    def forward(self, x):
        return self.layers[2](self.layers[0](self.layers[1](x)))


def test_blocks_are_in_the_order_in_which_they_run():
    import torch

    groups = (SimpleNamespace(modules=tuple(f"layers.{i}.0" for i in range(3))),)
    assert adapted_blocks(Crossed(), groups, {"x": torch.ones(1, 2)}) == ["layers.1", "layers.0", "layers.2"]
    assert split_blocks(["a", "b", "c"], 2) == (["a"], ["b", "c"])


def test_a_manifest_whose_graphs_and_fields_do_not_fit_is_refused(sketched):
    from edge_tcur_runtime.errors import FileFormatError
    from edge_tcur_runtime.formats.bundle import parse_manifest, serialize_manifest

    manifest = sketched.bundle.manifest
    assert parse_manifest(serialize_manifest(manifest), "m") == manifest
    learning = manifest.last_blocks
    first = next(iter(learning.slices))
    for changes, message in (
        ({"recomputed_blocks": None}, "'step_recompute' and its field must come together"),
        ({"last_blocks": None}, "'step_last' and its field must come together"),
        ({"last_blocks": replace(learning, slices={**learning.slices, first: (9,)})}, "no such slices"),
        ({"last_blocks": replace(learning, slices={**learning.slices, first: (0, 0)})}, "no such slices"),
        ({"last_blocks": replace(learning, slices={first: (0,)})}, "does not fit"),
        ({"last_blocks": replace(learning, extras=("nobody",))}, "does not fit"),
    ):
        with pytest.raises(FileFormatError, match=message):
            parse_manifest(serialize_manifest(replace(manifest, **changes)), "m")
