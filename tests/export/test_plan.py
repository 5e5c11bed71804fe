"""The plan of an export: what it says is what an export then writes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx.parser
import pytest

from edge_tcur.cli.plan import describe
from edge_tcur_devices import list_profiles, load_profile
from edge_tcur_export import operator_checks
from edge_tcur_export import plan as plans
from edge_tcur_export.bundle import export_run
from edge_tcur_export.kernels import kernel_instead, modules_of_weights
from edge_tcur_export.memory_model import MemoryEstimate, input_shapes
from edge_tcur_export.operator_checks import CHECKS
from edge_tcur_export.operators import NO_GRADIENT, replacement
from edge_tcur_export.plan import PlanRequest, measure, plan_bundle, plan_run
from edge_tcur_export.program_memory import GRAPHS, expected_program
from edge_tcur_export.providers import PROVIDERS, Unsupported, find_provider, find_unsupported
from edge_tcur_export.settings import ExportSettings, ProgramSettings
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.formats.bundle import open_bundle

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 4, "width": 4, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.between = nn.Softplus()
        self.out = nn.Linear(16, 3)

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)
        for block in self.blocks:
            x = self.between(block(x))
        return self.out(x)
"""


def test_the_files_are_those_that_an_export_writes(vit):
    """Sizes to the byte, from the bundle that the same run gave; nothing is left behind."""
    manifest = vit.bundle.manifest
    before = sorted(vit.bundle.root.parent.rglob("*"))
    plan = plan_run(vit.run, ExportSettings(device="raspberry-pi-5-8gb"), PlanRequest(batch=4))
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    assert plan.files == {name: size for name, size in sizes.items() if name != CHECKS}
    assert sorted(vit.bundle.root.parent.rglob("*")) == before
    assert plan.groups == {
        name: {
            "count": len(group.parameters), "n1": group.n1, "n2": group.n2, "rank": group.rank,
            "trained_numbers": vit.run.adapter().factors[name].core.size,
        }
        for name, group in manifest.groups.items()
    }  # fmt: skip
    assert (plan.no_gradient, plan.impossible, plan.open_files) == ((), {}, (CHECKS,))
    assert set(plan.memory) == {"infer", "step", "train"}
    assert all(entry.fits for entry in plan.memory.values())
    assert (plan.device, plan.budget) == ("raspberry-pi-5-8gb", 6 * 2**30)
    assert plan.notes == ("raspberry-pi-5-8gb has no package of the engine ort-training",)
    again = plan_bundle(vit.bundle, "raspberry-pi-5-8gb", PlanRequest(batch=4))
    assert (again.files, again.groups, again.memory) == (sizes, plan.groups, plan.memory)
    content = json.loads(json.dumps(plan.to_dict()))
    assert content["memory"]["step"]["estimate"]["total"] == plan.memory["step"].estimate.total


def test_a_plan_and_an_export_agree_on_the_operators_checks(train_module, tmp_path, monkeypatch):
    """Without ONNX Runtime neither has them."""
    monkeypatch.setattr(operator_checks, "find_onnxruntime", lambda: None)
    settings, run = ExportSettings(("onnx",), verify=False), train_module(MODEL, "plan_models", "Net")
    plan = plan_run(run, settings, PlanRequest())
    export_run(run, tmp_path / "bundle", settings)
    written = set(open_bundle(tmp_path / "bundle").manifest.files)
    assert {*plan.files, *plan.open_files} == written
    assert CHECKS not in written


def test_a_target_that_the_device_has_no_engine_for(vit):
    request = PlanRequest(required=("ort-training",))
    plan = plan_bundle(vit.bundle, "jetson-nano", request)
    assert plan.impossible == {"ort-training": "jetson-nano has no package of the engine ort-training"}
    assert plan_bundle(vit.bundle, "pixel-8", request).impossible == {}


def test_executorchs_programs_have_a_predicted_peak_before_they_are_lowered(vit):
    """Without the step graph among the targets; the largest batch is what --max-batch may be."""
    settings = ExportSettings(("onnx", "executorch"), "pixel-8", programs=ProgramSettings(max_batch=64))
    names = {"infer-portable", "infer-xnnpack", "train-portable", "train-xnnpack"}
    plan = plan_run(vit.run, settings, PlanRequest(budget=240 * 2**20))
    assert set(plan.memory) == {"infer", *names}
    assert "step.onnx" not in plan.files
    manifest = vit.bundle.manifest
    ranks = {name: group.rank for name, group in manifest.groups.items()}
    for name in names:
        kind, found = name.partition("-")[0], plan.memory[name]
        model = vit.graph(GRAPHS[kind])
        shapes = input_shapes(model, manifest.inputs, 64, 0, ranks)
        assert found.estimate == expected_program(model, shapes, name, found.estimate.base)
        assert found.fits is True
        assert 64 < found.largest_batch < 4096
    train, infer = (plan.memory[f"{kind}-xnnpack"].estimate.activations for kind in ("train", "infer"))
    assert train > infer > 0
    assert any("for at most 64 samples at once" in note for note in plan.notes)
    assert "train-xnnpack" in describe(plan)


def test_a_budget_that_is_too_small(vit):
    free = plan_bundle(vit.bundle, None, PlanRequest(batch=4096)).memory["step"]
    assert (free.fits, free.largest_batch) == (None, None)
    one = plan_bundle(vit.bundle, None, PlanRequest(batch=1)).memory["step"].estimate.total
    tight = plan_bundle(vit.bundle, None, PlanRequest(batch=4096, budget=(one + free.estimate.total) // 2))
    found = tight.memory["step"]
    assert found.fits is False
    assert 1024 < found.largest_batch < 3072
    budget = tight.budget
    at_largest = plan_bundle(vit.bundle, None, PlanRequest(batch=found.largest_batch))
    assert at_largest.memory["step"].estimate.total <= budget
    nothing = plan_bundle(vit.bundle, None, PlanRequest(batch=8, budget=2**20)).memory["step"]
    assert (nothing.fits, nothing.largest_batch) == (False, 0)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("budget", [5, 104, 1000, 10**6])
def test_the_largest_batch(batch, budget):
    """Of an estimate of 100 + batch bytes."""
    found = measure(lambda samples: MemoryEstimate(100, 0, 0, samples), batch, budget)
    assert found.fits == (100 + batch <= budget)
    assert found.largest_batch == min(max(0, budget - 100), 4096)


def test_operators_without_a_gradient_are_named_with_a_replacement(train_module, monkeypatch):
    run = train_module(MODEL, "plan_models", "Net")
    monkeypatch.setattr(plans, "require_executorch", _missing)
    plan = plan_run(run, ExportSettings(("onnx", "ort-training", "executorch")), PlanRequest())
    assert [(node.operator, node.module) for node in plan.no_gradient] == [("Softplus", "module.between")] * 2
    assert set(plan.impossible) == {"ort-training", "executorch"}
    assert "edge-tcur[executorch]" in plan.impossible["executorch"]
    assert "train.onnx" not in plan.files
    assert "infer.onnx" in plan.files
    assert "train.pte" in plan.open_files
    assert "log(1 + exp(x))" in plan.to_dict()["no_gradient"][0]["instead"]
    assert all("--target step" in replacement(operator) for operator in NO_GRADIENT)


def _missing():
    from edge_tcur.errors import ExportError

    raise ExportError("ExecuTorch is not installed", hint="pip install 'edge-tcur[executorch]'")


def test_kernels_of_a_provider():
    model = onnx.parser.parse_model(
        HEADER
        + """g (float[b, 4] x, int64[n] i, bool[b, 4] c, float[4, 4] w) => (float[b, 4] y, float[b, 4] z) {
            a = MatMul(x, w)
            d = LogSoftmax(a)
            e = Where(c, d, a)
            j = Add(i, i)
            f = Gather(w, j)
            y = Sum(e, e)
            z = com.microsoft.FusedMatMul(y, w)
        }"""
    )
    for place, node in enumerate(model.graph.node):
        node.name = f"n{place}"
    kinds = {"a": 1, "d": 1, "e": 1, "j": 7, "f": 1}
    for name, kind in kinds.items():
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, None))
    found = find_unsupported(model, PROVIDERS["webgpu"], {"d": "head"})
    assert [(n.operator, n.node, n.module, n.integer) for n in found] == [
        ("LogSoftmax", "n1", "head", False),
        ("Add", "n3", None, True),
        ("Sum", "n5", None, False),
        ("com.microsoft.FusedMatMul", "n6", None, False),
    ]
    assert [n.operator for n in find_unsupported(model, PROVIDERS["cpu"])] == ["com.microsoft.FusedMatMul"]
    assert {n.operator for n in find_unsupported(model, PROVIDERS["xnnpack"])} >= {"Where", "Gather"}


@pytest.mark.parametrize(
    ("operator", "provider", "integer", "expected"),
    [
        ("LogSoftmax", "webgpu", False, ["the CPU provider, where it runs by itself; or --provider", "cuda"]),
        ("Add", "webgpu", True, ["sizes and indices are a few bytes"]),
        ("Softplus", "nnapi", False, ["or log(1 + exp(x)), in the model"]),
        ("com.microsoft.FusedMatMul", "webgpu", False, ["the domain com.microsoft that the CPU provider"]),
        ("Nonesuch", "cpu", False, ["other operators in the model"]),
    ],
)
def test_what_to_use_instead_of_a_kernel(operator, provider, integer, expected):
    found = kernel_instead(Unsupported(operator, "n", None, integer), provider)
    assert all(text in found for text in expected)
    named = found.partition("--provider ")[2].partition(",")[0].split(" or ")
    assert all(operator in PROVIDERS[name].operators for name in named if name)
    assert provider not in named


def test_the_modules_of_a_bundles_nodes_are_those_of_their_weights(vit):
    """A graph on disk has no others; JSON and text say what to use, and where no module is known."""
    plan = plan_bundle(vit.bundle, None, PlanRequest(provider="xnnpack"))
    nodes = plan.no_kernel["xnnpack"]["infer"]
    modules = {name for name, _ in vit.base().model.named_modules()}
    known = {node.module for node in nodes if node.module is not None}
    assert known
    assert known <= modules
    content = json.loads(json.dumps(plan.to_dict()))["no_kernel"]["xnnpack"]["infer"]
    assert [entry["module"] for entry in content] == [node.module for node in nodes]
    assert all(entry["instead"] for entry in content)
    text = describe(plan)
    first = next(node for node in nodes if not node.integer)
    assert f"{first.node} ({first.module or 'module not known'})" in text
    assert f"      use {kernel_instead(first, 'xnnpack')}" in text
    assert "module not known" in text


def test_a_quantised_weight_names_its_module():
    model = onnx.parser.parse_model(
        HEADER + "g (float[b, 4] x) => (float[b, 4] y) { w = DequantizeLinear(v, s) y = MatMul(x, w) }"
    )
    for name, place in (("model.a.b.weight_t.values", 0), ("model.a.b.weight_t.scales", 1)):
        model.graph.node[0].input[place] = name
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), name))
    assert modules_of_weights(model) == {"w": "a.b"}


def test_tables_say_where_they_come_from():
    for provider in PROVIDERS.values():
        assert provider.source
        assert {"Conv", "MatMul"} <= provider.operators
    with pytest.raises(UsageError, match="'tpu'") as caught:
        find_provider("tpu")
    assert "webgpu" in caught.value.hint
    with pytest.raises(UsageError):
        PlanRequest(provider="rocm")


def test_what_cannot_be_planned_is_refused(vit):
    with pytest.raises(UsageError, match="batch of 0"):
        PlanRequest(batch=0)
    with pytest.raises(UsageError, match="no device profile"):
        plan_bundle(vit.bundle, "pixel-800", PlanRequest())


def test_there_is_a_table_for_each_provider_that_a_profile_lists():
    assert {name for device in list_profiles() for name in device.providers} <= set(PROVIDERS)


def test_the_providers_of_a_device_are_looked_up(vit, monkeypatch):
    monkeypatch.delitem(PROVIDERS, "tensorrt")
    plan = plan_bundle(vit.bundle, "jetson-orin-nano-8gb", PlanRequest())
    listed = load_profile("jetson-orin-nano-8gb").providers
    assert set(plan.no_kernel) == set(listed) & set(PROVIDERS)
    assert [name for name in listed if name not in PROVIDERS] == plan.notes[0].rsplit(" for ")[1].split(", ")
    asked = plan_bundle(vit.bundle, "jetson-orin-nano-8gb", replace(PlanRequest(), provider="webgpu"))
    assert set(asked.no_kernel) == {"webgpu"}
    assert "does not list the provider webgpu" in asked.notes[0]
