"""ExecuTorch's programs: what is in them, that ExecuTorch's own runtime computes what torch does, and the
engine ``executorch``, which trains with them as the others do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_tcur.errors import ExportError
from edge_tcur.training import TrainConfig
from edge_tcur_export import executorch
from edge_tcur_export.bundle import export_run
from edge_tcur_export.parity import TOLERANCES, Case, compare_steps, distance
from edge_tcur_export.plan import PlanRequest, plan_bundle
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.settings import ExportSettings, ProgramSettings
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.doctor import examine
from edge_tcur_runtime.engines import ENGINES, choose_engine, open_engine
from edge_tcur_runtime.engines.executorch import ExecutorchEngine, import_training, load_program
from edge_tcur_runtime.errors import (
    FileFormatError,
    IncompatibleError,
    MissingEngineError,
    PausedError,
    UsageError,
)
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import BASE_PTD, open_bundle, parse_manifest, serialize_manifest
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import bundle_adapter, personalize
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings

ROLES = ("infer-portable", "infer-xnnpack", "train-portable", "train-xnnpack")
TARGETS = ("onnx", "step", "ort-training", "executorch")
SETTINGS = PersonalizeSettings(epochs=7, batch_size=8, threads=1, engine="executorch")


@pytest.fixture(scope="session")
def block(bert_dir, texts_csv, tmp_path_factory, kit):
    """A block of MiniLM's shape, one of its six: lowering all of them takes minutes, and
    `tests/benchmarks/engines.py` compares the loss curves of the whole. Batches of up to 4.

    All tests of this file share it: its four programs are the longest export of the tests."""
    from transformers import BertConfig, BertModel

    root = shutil.copytree(bert_dir, tmp_path_factory.mktemp("minilm-shape") / "base")
    torch.manual_seed(3)
    shape = BertConfig(
        vocab_size=500, hidden_size=384, num_hidden_layers=1, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(shape).save_pretrained(root)
    config = TrainConfig(str(root), str(texts_csv), rank=4, epochs=1, batch_size=4, threads=1)
    return kit.export(config, tmp_path_factory.mktemp("block-executorch"), TARGETS)


@pytest.fixture(scope="session")
def vit(vit_dir, digits_npz, tmp_path_factory, kit):
    """Two blocks, sketches of two weights of each, and its own head."""
    settings = {"task": "image-classification", "rank": 2, "epochs": 1, "threads": 1, "batch_size": 8}
    settings |= {"selection": "gradient", "frame": "sketch", "targets": "*.q_proj,*.fc1"}
    config, root = TrainConfig(str(vit_dir), str(digits_npz), **settings), tmp_path_factory.mktemp("vit-et")
    return kit.export(config, root, ("onnx", "executorch"), ProgramSettings(("xnnpack",)))


@pytest.fixture(scope="session")
def texts(texts_csv):
    return load_dataset(texts_csv, "text")


def test_every_program_agrees_with_torch(block, vit):
    assert set(block.report.parity) == {"infer", "step", "train", *ROLES}
    assert set(vit.report.parity) == {"infer", "infer-xnnpack", "train-xnnpack"}
    for exported in (block, vit):
        for name, quantities in exported.report.parity.items():
            assert set(quantities) == ({"outputs"} if "infer" in name else set(TOLERANCES))
            assert all(0 <= error <= TOLERANCES[quantity] for quantity, error in quantities.items())
    assert (
        json.loads(json.dumps(block.report.to_dict()))["executorch"]["bytes"] == block.report.executorch.bytes
    )


@pytest.mark.parametrize("name", ["infer-xnnpack", "train-xnnpack"])
def test_the_predicted_memory_is_near_what_a_fresh_process_takes(block, name, capsys):
    """VmHWM, and what a plan says: of the bundle, and before its programs were lowered."""
    tool, root = memory_benchmark(), block.bundle.root
    measured = tool.measure(root, name, 4, 24)[-1]
    for said in (tool.predict(root, name, 4, 24), tool.before_lowering(root, name)):
        ratio = said.total / measured
        with capsys.disabled():
            print(f" {name}: predicted {ratio:.2f} of {measured / 2**20:.0f} MiB", end="")
        assert 0.9 <= ratio <= 1.1
    plan = plan_bundle(block.bundle, "redmi-13c", PlanRequest()).memory[name]
    assert plan.estimate == tool.predict(root, name, 4, 24)
    assert (plan.fits, plan.largest_batch) == (True, 4)
    assert plan_bundle(block.bundle, None, PlanRequest(budget=2**20)).memory[name].largest_batch == 0


def memory_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "memory_model.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_training_module_knows_its_parameters_after_a_pass_and_wants_inputs_in_order(block, kit):
    """Why the engine runs a first pass before it sets parameters, and copies what it is fed."""
    _, training, _ = import_training()
    program = block.bundle.manifest.programs["train-portable"]
    with quiet_torch():  # of an interface that may change
        module = training.TrainingModule(load_program(block.bundle, program))
    assert module.named_params is None
    fed = {
        **kit.inputs_of(block, 2, 6),
        "labels": np.arange(2),
        **build_feeds(block.bundle.manifest, block.run.adapter()),
    }
    arguments = [torch.from_numpy(np.array(fed[name], order="C")) for name in program.inputs]
    turned = [value.T.contiguous().T if value.dim() == 2 else value for value in arguments]
    with pytest.raises(RuntimeError, match="contiguous"):
        module.forward_backward("forward", turned)
    module.forward_backward("forward", arguments)
    assert set(module.named_parameters()) == {
        f"trained.{name}" for name in fed if name.endswith((".core", ".weight", ".bias"))
    }


def test_the_frozen_weights_lie_in_one_file(block, kit):
    root, state = block.bundle.root, block.base().model.state_dict()
    frozen = {name: value for name, value in state.items() if not name.startswith(tuple(block.base().head))}
    tensors = kit.read_ptd((root / BASE_PTD).read_bytes())
    # A scalar of one program would be the other's too, whose scalars have the same names.
    assert all(name.startswith("base.model.") for name in tensors)
    total = sum(value.nbytes for value in frozen.values())
    assert total * 0.9 < sum(value.nbytes for value in tensors.values()) <= total * 1.05
    programs = {path.name: path.read_bytes() for path in root.glob("*.pte")}
    assert set(programs) == {"infer.pte", "infer-xnnpack.pte", "train.pte", "train-xnnpack.pte"}
    for group in block.bundle.manifest.groups.values():
        for name in group.parameters:
            weight = frozen[name].numpy()
            assert np.array_equal(tensors[f"base.model.{name}_t"], weight.T)
            for turned in (weight, np.ascontiguousarray(weight.T)):
                assert not [file for file, content in programs.items() if turned.tobytes() in content]


def test_no_path_of_this_machine_is_in_a_program(block):
    secrets = (str(block.bundle.root.parent), sys.prefix, "/tmp/", "/home/", "site-packages", 'File "')
    for path in (*block.bundle.root.glob("*.pte"), *block.bundle.root.glob("*.ptd")):
        content = path.read_bytes()
        assert not [text for text in secrets if text.encode() in content], path.name


def test_the_adapter_file_holds_what_the_programs_are_fed(block, vit, kit):
    for exported in (block, vit):
        found = kit.read_ptd(exported.bundle.path("adapter.ptd").read_bytes())
        expected = build_feeds(exported.bundle.manifest, exported.run.adapter())
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def test_the_manifest_says_what_the_programs_need(block):
    manifest = block.bundle.manifest
    assert tuple(sorted(manifest.programs)) == ROLES
    extras = set(manifest.extras)
    for name, program in manifest.programs.items():
        assert program.limits == {"batch": 4, "sequence": 24}
        assert program.memory > 10_000
        assert program.file in manifest.files
        frozen = {n for n in manifest.factor_names() if not n.endswith(".core")} - extras
        fed = set(manifest.factor_names()) if name.startswith("infer") else frozen | {"labels"}
        assert set(program.inputs) == set(manifest.inputs) | fed
        assert program.outputs == (("logits",) if name.startswith("infer") else ("loss", "logits", "metric"))
    assert {"base.ptd", "adapter.ptd"} <= set(manifest.files)
    raw = serialize_manifest(manifest)
    assert parse_manifest(raw, "manifest.json") == manifest
    document = json.loads(raw)
    document["programs"]["train-portable"]["file"] = "other.pte"
    with pytest.raises(FileFormatError, match=r"other\.pte"):
        parse_manifest(json.dumps(document).encode(), "manifest.json")


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
@pytest.mark.parametrize(("samples", "length"), [(1, 2), (2, 24), (4, 7), (4, 24)])
def test_infer_takes_any_batch_and_length_below_the_limits(block, kit, backend, samples, length):
    program = block.bundle.manifest.programs[f"infer-{backend}"]
    module = load_program(block.bundle, program)
    inputs, adapter = kit.inputs_of(block, samples, length), block.run.adapter()
    fed = {**inputs, **build_feeds(block.bundle.manifest, adapter)}
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    (found,) = module.run_method("forward", arguments)
    kit.close(found.numpy(), kit.outputs_under(block, adapter, inputs))
    for name, value in fed.items():
        if name.endswith(".core"):
            fed[name] = np.zeros_like(value)
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    base = block.base()
    for name, parameter in base.head_parameters().items():
        parameter.data.copy_(torch.from_numpy(adapter.extras[name].copy()))
    kit.close(module.run_method("forward", arguments)[0].numpy(), kit.torch_outputs(base, inputs))


def test_more_samples_than_the_limit_are_refused(block, kit):
    program = block.bundle.manifest.programs["infer-portable"]
    fed = {**kit.inputs_of(block, 5, 7), **build_feeds(block.bundle.manifest, block.run.adapter())}
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    with pytest.raises(RuntimeError):
        load_program(block.bundle, program).run_method("forward", arguments)


TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from edge_tcur_runtime.engines.executorch import import_training, load_program
from edge_tcur_runtime.formats.bundle import open_bundle
torch, training, _ = import_training()
bundle = open_bundle(Path(sys.argv[1]))
canary = load_file(bundle.path("canary.safetensors"))
adapter = load_file(bundle.path("adapter.safetensors"))
fed = {name[6:]: value for name, value in canary.items() if name.startswith("input.")}
fed |= adapter | {"labels": np.arange(2)}
for name in sys.argv[2:]:
    program = bundle.manifest.programs[name]
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    module = training.TrainingModule(load_program(bundle, program))
    losses, optimizer = [], None
    for step in range(6):
        losses.append(float(module.forward_backward("forward", arguments)[0]))
        if optimizer is None:
            start = {name: value.clone() for name, value in module.named_parameters().items()}
            optimizer = training.get_sgd_optimizer(module.named_parameters(), 0.005)
            first = {name: value.clone() for name, value in module.named_gradients().items()}
        optimizer.step(module.named_gradients())
        if step == 0:
            wrong = max(float((start[name] - 0.005 * first[name] - value).abs().max())
                        for name, value in module.named_parameters().items())
    moved = [n for n, value in module.named_parameters().items() if not torch.equal(value, start[n])]
    print(json.dumps({
        "losses": losses, "wrong": wrong, "trained": sorted(start), "moved": sorted(moved),
        "start": all(np.array_equal(adapter[name[8:]], value) for name, value in start.items()),
    }))
"""


def test_executorchs_own_optimizer_moves_the_factors_alone(block):
    root = block.bundle.root
    files = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in root.iterdir()}
    command = [sys.executable, "-c", TRAIN, str(root), "train-portable", "train-xnnpack"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    manifest = block.bundle.manifest
    names = {f"{name}.core" for name in manifest.groups} | set(manifest.extras)
    for result in results:
        assert result["start"]
        assert result["trained"] == sorted(f"trained.{name}" for name in names)
        assert len(result["moved"]) > len(names) / 2  # the least of the gradients are lost in rounding
        assert result["wrong"] < 1e-7
        assert result["losses"][-1] < result["losses"][0] - 1e-3
    assert files == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in root.iterdir()}


def test_the_programs_and_the_step_graph_take_the_same_steps(block, kit):
    bundle, inputs = block.bundle, kit.inputs_of(block, 4, 9)
    feeds = build_feeds(bundle.manifest, block.run.adapter())
    targets = np.array([0, 1, 1, 0])
    expected = open_engine("ort-step", bundle, threads=1).step(inputs, targets, feeds)
    for backend in ("portable", "xnnpack"):
        program = bundle.manifest.programs[f"train-{backend}"]
        stepper = ExecutorchEngine(bundle, threads=1, program=program)
        for _ in range(2):  # the same, whatever it was fed before
            found = stepper.step(inputs, targets, feeds)
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)
            assert set(found.gradients) == set(expected.gradients)
            for name, gradient in expected.gradients.items():
                assert distance(found.gradients[name], gradient) < 1e-4
            stepper.step(inputs, 1 - targets, {name: value * 0 for name, value in feeds.items()})


def test_parity_sees_a_wrong_step(block, kit):
    """Gradients that go wrong after the first step are found by the steps alone."""
    bundle, inputs = block.bundle, kit.inputs_of(block, 3, 9)
    engine = open_engine("ort-step", bundle, threads=1)
    feeds, targets = build_feeds(bundle.manifest, block.run.adapter()), np.array([0, 1, 1])
    first = engine.step(inputs, targets, feeds)

    class Forgetful:
        def __init__(self, sign):
            self._calls, self._sign = 0, sign

        def step(self, inputs, targets, feeds):
            self._calls += 1
            result = engine.step(inputs, targets, feeds)
            sign = 1 if self._calls == 1 else self._sign
            gradients = {name: sign * value for name, value in result.gradients.items()}
            return type(result)(result.loss, result.outputs, gradients)

    case = Case({**inputs, "labels": targets, **feeds}, first.outputs, first.loss, first.gradients, 0.0)
    later = compare_steps(Forgetful(1), bundle, [case])["steps"] * 1e-6  # relative to zero
    case = Case(case.feeds, case.outputs, case.loss, case.gradients, later)
    right, wrong = (compare_steps(Forgetful(sign), bundle, [case]) for sign in (1, -1))
    assert right["steps"] < 1e-6
    assert wrong["steps"] > TOLERANCES["steps"]
    assert all(wrong[name] == right[name] for name in ("outputs", "loss", "gradients"))


def test_the_delegates_take_the_products(block, vit):
    for exported in (block, vit):
        left = exported.report.executorch.left_over
        assert set(left) == {"infer-xnnpack", "train-xnnpack"}
        for counts in left.values():
            assert not {"softmax", "_softmax", "gelu", "permute_copy", "bmm", "sub"} & set(counts)
    left = block.report.executorch.left_over
    assert all(counts["index_select"] > 0 for counts in left.values())  # XNNPACK has none
    layers = sum(len(group.parameters) for group in block.bundle.manifest.groups.values())
    assert left["infer-xnnpack"]["mm"] == 3 * layers  # the thin ones of the update alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ProgramSettings(("cuda",)), "cuda"),
        (ProgramSettings(()), "expected portable, xnnpack, vulkan"),
        (ProgramSettings(max_batch=2), "--max-batch 2"),
        (ProgramSettings(max_length=25), "--max-length 25"),
        (ProgramSettings(max_length=3), "--max-length 3"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_early(block, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        export_run(block.run, tmp_path / "out", ExportSettings(("onnx", "executorch"), programs=settings))
    assert not list(tmp_path.iterdir())


def test_without_executorch_the_target_is_refused(block, tmp_path, monkeypatch):
    monkeypatch.setattr(executorch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="not installed") as caught:
        export_run(block.run, tmp_path / "out", ExportSettings(("onnx", "executorch")))
    assert "edge-tcur[executorch]" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_failure_of_executorch_leaves_nothing(block, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel\n")

    monkeypatch.setattr(executorch.Lowering, "lower", fail)
    with pytest.raises(ExportError, match="infer-portable program: no such kernel"):
        export_run(block.run, tmp_path / "out", ExportSettings(("onnx", "executorch")))
    assert not list(tmp_path.iterdir())


def test_the_three_engines_give_one_loss_curve(block, texts):
    """Updates of 8 samples: two passes of the program, whose largest batch is 4."""
    assert block.bundle.manifest.programs["train-xnnpack"].limits["batch"] == 4
    found = {name: personalize(block.bundle, texts, replace(SETTINGS, engine=name)) for name in ENGINES}
    assert len(found) == 3
    losses = {name: np.array(result.losses[:20]) for name, result in found.items()}
    expected = losses["ort-step"]
    assert len(expected) == 20
    assert expected[-1] < expected[0] / 2  # it learns, so that the curves could part
    for name, curve in losses.items():
        assert found[name].engine == name
        assert np.abs(curve / expected - 1).max() < 1e-3, name
        assert found[name].score_after == found["ort-step"].score_after


def test_a_larger_batch_is_computed_in_parts(block, kit):
    feeds = build_feeds(block.bundle.manifest, block.run.adapter())
    inputs, targets = kit.inputs_of(block, 7, 9), np.array([0, 1, 1, 0, 1, 1, 1])
    expected, found = (
        open_engine(name, block.bundle, threads=1).step(inputs, targets, feeds)
        for name in ("ort-step", "executorch")
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.metric == pytest.approx(expected.metric)
    kit.close(found.outputs, expected.outputs)
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].dtype == np.float32
        assert np.abs(found.gradients[name] - gradient).max() <= 1e-4 * np.abs(gradient).max()


def test_a_break_changes_no_bit(block, texts, tmp_path):
    settings, updates = replace(SETTINGS, epochs=2), []
    whole = personalize(block.bundle, texts, settings)
    keep = KeepSettings(tmp_path, 1e9, gates=(lambda: "enough" if len(updates) == 2 else None,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_tcur_runtime.keeper.GATE_SECONDS", 0.0)
        with pytest.raises(PausedError):
            personalize(block.bundle, texts, settings, keep=keep, on_step=lambda *step: updates.append(step))
    result = personalize(block.bundle, texts, settings, keep=KeepSettings(tmp_path))
    assert (result.resumed_from, result.engine) == (2, "executorch")
    assert result.losses == whole.losses
    assert serialize_adapter(result.adapter) == serialize_adapter(whole.adapter)


def test_personalize_on_the_command_line(block, texts_csv, tmp_path):
    """In a process that has neither the workstation nor ExecuTorch's compiler; with a budget it measures."""
    code = (
        "import sys, warnings; warnings.simplefilter('error'); from edge_tcur_runtime.cli import main\n"
        "try: main()\n"
        "finally: assert not {'edge_tcur', 'edge_tcur_export', 'torchao'} & set(sys.modules)"
    )
    command = [
        sys.executable, "-c", code, "personalize", str(block.bundle.root), "--data", str(texts_csv),
        "--engine", "executorch", "--epochs", "3", "--threads", "1", "--budget", "4GiB", "--start", "base",
        "--store", str(tmp_path / "store"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "threadpool" not in done.stderr  # nor anything else of ExecuTorch's own
    assert "cpuinfo" not in done.stderr
    result = json.loads(done.stdout)
    result = result.get("result", result)
    assert (result["engine"], result["engine_reason"], result["provider"]) == (
        "executorch",
        "asked for",
        "cpu",
    )
    assert result["losses"][-1] < result["losses"][0]
    assert result["base_digest_before"] == result["base_digest_after"]


def test_a_budget_is_refused_before_torch_is_imported_or_measured_and_kept(block, texts_csv, tmp_path):
    """What the refusal names is accepted, and what the first steps told is the peak."""
    code = (
        "import sys; from edge_tcur_runtime.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )

    def personalized(budget):
        command = [
            sys.executable, "-c", code, "personalize", str(block.bundle.root), "--data", str(texts_csv),
            "--engine", "executorch", "--epochs", "2", "--threads", "1", "--budget", budget,
            "--start", "base", "--store", str(tmp_path / "store"), "--json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout), done.stderr.split()[-1]

    code_of, refused, imported = personalized("64MiB")
    assert (code_of, imported) == (5, "False")
    assert "cannot be met: ExecuTorch with torch" in refused["error"]["message"]
    named = re.fullmatch(r"give at least --budget (\d+MiB)", refused["error"]["hint"]).group(1)
    code_of, refused, imported = personalized("240MiB")
    assert (code_of, imported) == (5, "True")
    assert "cannot be met: the training program of ExecuTorch" in refused["error"]["message"]  # not crossed
    code_of, result, imported = personalized(named)
    assert (code_of, imported) == (0, "True")
    assert result["peak_rss_bytes"] <= result["budget_bytes"]
    assert 0.95 <= result["predicted_peak_bytes"] / result["peak_rss_bytes"] <= 1.1


def without(bundle, *programs, graphs=()):
    """The bundle as it would be without some programs and graphs."""
    manifest = bundle.manifest
    kept = {name: spec for name, spec in manifest.programs.items() if name not in programs}
    roles = {role: name for role, name in manifest.graphs.items() if role not in graphs}
    return replace(bundle, manifest=replace(manifest, programs=kept, graphs=roles))


def test_auto_takes_it_last_and_says_why(block):
    installed = find_onnxruntime()
    assert choose_engine("auto", block.bundle, installed)[0] != "executorch"
    name, reason = choose_engine("auto", without(block.bundle, graphs=("step", "train")), installed)
    assert name == "executorch"
    assert "not ort-training" in reason
    assert "not ort-step: the bundle has no step graph" in reason
    assert choose_engine("auto", block.bundle, None)[0] == "executorch"


def test_what_it_cannot_train_is_refused(block, kit, tmp_path):
    bare = without(block.bundle, "train-xnnpack", "train-portable")
    for refused in (lambda: choose_engine("executorch", bare, None), lambda: open_engine("executorch", bare)):
        with pytest.raises(IncompatibleError, match="no training program of ExecuTorch") as caught:
            refused()
        assert "--target executorch" in caught.value.hint
    with pytest.raises(IncompatibleError, match="does not run on webgpu"):
        choose_engine("executorch", block.bundle, None, provider="webgpu")
    own = bundle_adapter(block.bundle)
    smaller = Adapter(own.header, kit.random_factors(block, 2, 1), own.extras)
    with pytest.raises(
        IncompatibleError, match="rank 2; the bundle's training program is for rank 4"
    ) as caught:
        choose_engine("executorch", block.bundle, None, smaller)
    assert caught.value.exit_code == 4
    engine, feeds = (
        open_engine("executorch", block.bundle, threads=1),
        build_feeds(block.bundle.manifest, own),
    )
    targets = np.array([0, 1])
    with pytest.raises(IncompatibleError, match=r"core has rank 2; .* for rank 4"):
        engine.step(kit.inputs_of(block, 2, 9), targets, {**feeds, **smaller.feeds()})
    with pytest.raises(IncompatibleError, match="a sequence of 25 is above the 24"):
        engine.step(kit.inputs_of(block, 2, 25), targets, feeds)
    root = shutil.copytree(block.bundle.root, tmp_path / "cut")
    whole = (root / "train-xnnpack.pte").read_bytes()
    (root / "train-xnnpack.pte").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IncompatibleError, match="ExecuTorch cannot load the program"):
        open_engine("executorch", open_bundle(root, verify=False))


def test_another_adapters_rows_and_columns_are_inputs(block, kit):
    """Only the rank is fixed by the program."""
    own = bundle_adapter(block.bundle)
    other = Adapter(own.header, kit.random_factors(block, 4, 5), own.extras)
    inputs, targets, feeds = kit.inputs_of(block, 3, 6), np.array([1, 0, 1]), other.feeds()
    expected, found = (
        open_engine(name, block.bundle, threads=1).step(inputs, targets, feeds)
        for name in ("ort-step", "executorch")
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_library_that_is_missing_is_named_with_the_extra(block, monkeypatch):
    for problem in ("ExecuTorch is not installed", "ExecuTorch's Python interface needs torch"):
        monkeypatch.setattr(
            "edge_tcur_runtime.engines.engine.executorch_problem", lambda problem=problem: problem
        )
        for refused in (
            lambda: choose_engine("executorch", block.bundle, None),
            lambda: open_engine("executorch", block.bundle),
        ):
            with pytest.raises(MissingEngineError, match=problem) as caught:
                refused()
            assert "edge-tcur-runtime[executorch]" in caught.value.hint


def test_the_doctor_lists_it(block, tmp_path):
    report = examine(tmp_path, block.bundle.root)
    assert {engine.name: engine.available for engine in report.engines}["executorch"]
    assert report.bundle.engines == tuple(ENGINES)
