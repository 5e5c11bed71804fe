"""`edge-tcur` as a user runs it: results, JSON, exit codes, and help that imports nothing heavy."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
import pytest

from edge_tcur import __version__
from edge_tcur.cli import COMMANDS, edge_tcur
from edge_tcur.cli.progress import stage_bar
from edge_tcur_export import bundle as bundles
from edge_tcur_export.executorch import ProgramReport
from edge_tcur_export.held_out import HeldOut
from edge_tcur_export.quantization import QuantizationReport
from edge_tcur_export.settings import ExportSettings, ProgramSettings
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.errors import ExitCode
from edge_tcur_runtime.formats.adapter import read_adapter, write_adapter
from edge_tcur_runtime.formats.bundle import (
    BundleGroup,
    FileEntry,
    Manifest,
    ProgramSpec,
    TensorPlace,
    serialize_manifest,
)
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.output import Mode, Sink

GROUP_KEYS = {
    "name", "slices", "n1", "n2", "rank", "trained_numbers", "core_norm", "blocks", "rows", "cols",
    "parameters",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def train_arguments(vit_dir, digits_npz, out, *more):
    return (
        "train", "--base", vit_dir, "--data", digits_npz, "--task", "image-classification", "--rank", "2",
        "--epochs", "2", "--threads", "1", "--out", out, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(vit_dir, digits_npz, tmp_path_factory):
    """A run that the tests read and do not change."""
    root = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as caught:
        run(edge_tcur, list(map(str, train_arguments(vit_dir, digits_npz, root, "--quiet"))))
    assert caught.value.code == 0
    return root


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from edge_tcur.cli import edge_tcur; from edge_tcur_runtime.cli.framework import run\n"
        "try: run(edge_tcur, ['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    )
    out = python(code)
    assert out.splitlines()[-1] == "[]"
    for name, (_, _, short) in COMMANDS.items():
        assert name in out
        assert short.split()[0] in out
    assert out.count("  edge-tcur ") >= 3  # the examples


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "quickstart"])
def test_help_of_a_command_imports_no_torch(command):
    code = (
        "import sys; from edge_tcur.cli import edge_tcur; from edge_tcur_runtime.cli.framework import run\n"
        f"try: run(edge_tcur, [{command!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'rich', 'transformers', 'onnx') if m in sys.modules])"
    )
    started = time.perf_counter()
    out = python(code)
    assert time.perf_counter() - started < 5  # 0.2 s here; the bound only catches a heavy import
    assert out.splitlines()[-1] == "[]"
    for part in ("Examples:", "--json", "--quiet", "--debug"):
        assert part in out


def test_every_command_is_there():
    for module, attribute, _ in COMMANDS.values():
        if attribute != "quickstart":
            command = getattr(__import__(module, fromlist=[attribute]), attribute)
            assert isinstance(command, click.Command)


def test_python_m_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "edge_tcur", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"edge-tcur, version {__version__}"


def test_train_shows_every_setting(cli):
    code, out, _ = cli("train", "--help")
    assert code == 0
    text = " ".join(out.split())
    for option in ("--text-column", "--learning-rate", "--eval-fraction", "--max-length", "--config"):
        assert option in text
    for choices in (
        "[raw|orthonormal|sketch]",
        "[none|layer|all]",
        "[auto|dft|dct|identity]",
        "[norm|squared-norm|inverse-norm|leverage|gradient|update|random]",
    ):
        assert choices in text
    assert "[default: 20]" in text


def test_train_as_json(cli, vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    code, payload, err = cli(*train_arguments(vit_dir, digits_npz, out, "--json"))
    assert (code, err) == (0, "")
    assert set(payload) == {
        "metric", "score", "scores",
        "schema_version", "run", "adapter", "base_digest", "task", "labels", "rank", "groups", "accuracy",
        "trained_numbers", "head_numbers", "adapter_bytes", "samples", "held_out_samples", "seconds",
        "step_seconds", "steps", "losses", "accuracies", "skipped", "notes", "config",
    }  # fmt: skip
    assert payload["adapter_bytes"] == (out / "adapter.safetensors").stat().st_size
    assert payload["trained_numbers"] == sum(group["trained_numbers"] for group in payload["groups"]) == 48
    assert set(payload["groups"][0]) == GROUP_KEYS
    assert payload["skipped"]["module.classifier"] == "not inside a numbered layer"
    assert payload["config"]["rank"] == payload["rank"] == 2


def test_train_for_people(cli, vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    code, text, err = cli(*train_arguments(vit_dir, digits_npz, out, "--targets", "*.q_proj"))
    assert (code, err) == (0, "")
    assert "trained numbers    8" in text
    assert "of 12 held-out samples" in text
    assert "matched by no target pattern" in text
    assert "more (all of them with --json)" in text
    assert text.count("LayerNorm, not a linear layer") == 1  # one line a reason, not one a module
    assert f"next: edge-tcur export {out} --out bundle/" in text
    assert cli(*train_arguments(vit_dir, digits_npz, tmp_path / "two", "--quiet")) == (0, "", "")


def test_the_command_line_is_before_the_file_and_the_file_before_defaults(cli, vit_dir, digits_npz, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(
        f'base = "{vit_dir}"\ndata = "{digits_npz}"\ntask = "image-classification"\n'
        "rank = 3\nepochs = 1\nthreads = 1\nbatch_size = 16\n"
    )
    # --batch-size at its default value was still said by the user
    arguments = ("--config", config, "--rank", 2, "--batch-size", 16, "--out", tmp_path / "run", "--json")
    code, payload, _ = cli("train", *arguments)
    assert code == 0
    resolved = payload["config"]
    assert (resolved["rank"], resolved["epochs"], resolved["batch_size"]) == (2, 1, 16)
    assert (resolved["learning_rate"], resolved["seed"]) == (0.02, 0)


def test_train_refuses(cli, vit_dir, digits_npz, tmp_path):
    usual = train_arguments(vit_dir, digits_npz, tmp_path / "run")

    def code_of(*more, arguments=usual):
        code, out, err = cli(*arguments, *more, "--json")
        assert out["error"]["exit_code"] == code
        assert err.startswith("error: ")
        return code, out["error"]

    assert code_of("--rank", "two")[0] == ExitCode.USAGE
    for option in ("--coupling", "--transform", "--selection", "--frame"):
        assert code_of(option, "other")[0] == ExitCode.USAGE
    code, error = code_of("--grouping", "shap")  # patterns are allowed too, so not one of some choices
    assert (code, error["code"], error["where"]) == (3, "bad-config", "grouping")
    assert error["hint"] == "did you mean 'shape'?"
    code, error = code_of("--transform", "dct")
    assert (code, error["code"], error["where"]) == (3, "bad-config", "transform")
    assert code_of(arguments=("train", "--data", digits_npz, "--out", tmp_path / "run"))[0] == ExitCode.USAGE
    code, error = code_of("--rank", "99")
    assert (code, error["code"], error["where"]) == (3, "bad-config", "rank")
    assert code_of("--learning-rate", "-1")[0] == ExitCode.BAD_INPUT
    assert code_of("--data", tmp_path / "none.npz")[1]["code"] == "bad-data"
    assert code_of("--base", "./none")[1]["code"] == "bad-base"
    assert code_of("--base", "none-such")[0] == ExitCode.NETWORK
    assert code_of("--config", tmp_path / "none.toml")[1]["code"] == "bad-config"
    config = tmp_path / "train.toml"
    config.write_text("epoch = 3\n")
    code, error = code_of("--config", config)
    assert (code, error["where"], error["hint"]) == (3, str(config), "did you mean 'epochs'?")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert code_of("--out", full)[1]["code"] == "output-exists"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "train.toml"]


def test_eval(cli, trained, digits_npz, tmp_path):
    code, payload, err = cli("eval", trained, "--data", digits_npz, "--json")
    assert (code, err) == (0, "")
    assert set(payload) == {
        "metric", "adapter_score", "base_score",
        "schema_version", "run", "adapter", "data", "adapter_accuracy", "base_accuracy", "samples",
    }  # fmt: skip
    assert payload["samples"] == 60
    copy = tmp_path / "other.safetensors"
    shutil.copy(trained / "adapter.safetensors", copy)
    code, text, _ = cli("eval", trained, "--data", digits_npz, "--adapter", copy)
    assert code == 0
    assert f"{payload['adapter_accuracy']:.1%}" in text
    assert "on 60 samples" in text
    assert cli("eval", tmp_path, "--data", digits_npz)[0] == 3
    assert cli("eval", trained, "--data", tmp_path / "none.npz")[0] == 3
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x7f")
    assert cli("eval", trained, "--data", digits_npz, "--adapter", copy)[0] == 6
    assert cli("eval", trained, "--data", digits_npz, "--adapter", tmp_path / "none")[0] == 3


def test_inspect_an_adapter_and_a_run(cli, trained):
    path = trained / "adapter.safetensors"
    code, payload, err = cli("inspect", path, "--json")
    assert (code, err, payload["kind"]) == (0, "", "adapter")
    assert payload["bytes"] == path.stat().st_size
    assert payload["digest"] == digest_file(path)
    assert payload["labels"] == ["0", "1", "2"]
    assert set(payload["groups"][0]) == GROUP_KEYS
    assert all(group["core_norm"] > 0 for group in payload["groups"])
    for group in payload["groups"]:  # uncoupled: rows and columns of their own for each of the two layers
        assert group["blocks"] == group["slices"] == 2
        for name, size in (("rows", group["n1"]), ("cols", group["n2"])):
            assert [len(indices) for indices in group[name]] == [2, 2]
            assert all(0 <= low < high < size for low, high in group[name])
    assert payload["provenance"]["selection"] == "gradient"
    code, whole, _ = cli("inspect", trained, "--json")
    assert (code, whole["kind"]) == (0, "run")
    assert {key: value for key, value in payload.items() if key != "schema_version"} == whole["adapter"]
    assert whole["config"]["rank"] == 2
    assert isinstance(whole["metrics"]["accuracy"], float)
    code, text, _ = cli("inspect", trained)
    assert code == 0
    for part in ("attention.q_proj", payload["base_digest"], payload["digest"], "labels", "0, 1, 2"):
        assert part in text


def test_train_along_other_axes(cli, vit_dir, digits_npz, tmp_path):
    """Every setting of the method from the command line, and a file that holds sketches."""
    out = tmp_path / "sketch"
    more = ("--frame", "sketch", "--layers-to-transform", "1", "--rank-pattern", "*.fc1=3", "--alpha", "0.5")
    more += ("--modules-to-save", "module.classifier", "--gradient-batches", "2")
    code, payload, err = cli(*train_arguments(vit_dir, digits_npz, out, *more, "--json"))
    assert (code, err) == (0, "")
    assert {group["name"]: (group["slices"], group["rank"]) for group in payload["groups"]} == {
        **{f"attention.{leaf}_proj": (1, 2) for leaf in "qkvo"},
        "mlp.fc1": (1, 3),
        "mlp.fc2": (1, 2),
    }
    assert not any({"rows", "cols"} & set(group) for group in payload["groups"])
    assert payload["trained_numbers"] == 5 * 4 + 9
    assert payload["head_numbers"] == 3 * 16 + 3
    assert payload["skipped"]["module.classifier"] == "trained in full (modules_to_save)"
    assert payload["skipped"]["module.vit.layers.0.mlp.fc1"] == "not among the layers to transform"
    code, shown, _ = cli("inspect", out, "--json")
    assert (code, shown["adapter"]["frame"], shown["adapter"]["coupling"]) == (0, "sketch", "none")
    assert shown["adapter"]["extras"] == {"module.classifier.weight": [3, 16], "module.classifier.bias": [3]}
    code, text, _ = cli("inspect", out)
    assert code == 0
    assert "t-product (identity), coupling none, frame sketch" in text
    assert text.count("sketch") >= 2 * 6
    code, scores, _ = cli("eval", out, "--data", digits_npz, "--json")
    assert (code, scores["samples"]) == (0, 60)
    code, payload, _ = cli(
        *train_arguments(vit_dir, digits_npz, tmp_path / "run", "--coupling", "all", "--json")
    )
    assert (code, payload["groups"][0]["blocks"]) == (0, 1)
    other = tmp_path / "run" / "adapter.safetensors"
    code, payload, _ = cli("eval", out, "--data", digits_npz, "--adapter", other, "--json")
    assert (code, payload["error"]["code"]) == (4, "incompatible")


def test_inspect_escapes_what_a_terminal_would_obey(cli, tmp_path):
    own = read_adapter(Path(__file__).parents[1] / "data" / "adapter-v1.safetensors")
    header = replace(own.header, task="im\x1b[2J", provenance={"tool": "x\x1b[31m\ndigest  sha256:0"})
    write_adapter(tmp_path / "hostile.safetensors", replace(own, header=header))
    code, text, _ = cli("inspect", tmp_path / "hostile.safetensors")
    assert code == 0
    assert "\x1b" not in text
    assert r"im\x1b[2J" in text
    assert len([line for line in text.splitlines() if line.startswith("digest")]) == 1
    assert cli("inspect", tmp_path / "hostile.safetensors", "--json")[1]["task"] == header.task


def test_inspect_refuses(cli, trained, tmp_path):
    assert cli("inspect", tmp_path)[0] == 3
    assert cli("inspect", tmp_path / "none")[0] == 3
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"not an adapter")
    assert cli("inspect", noise)[0] == 3
    noise.write_bytes((trained / "adapter.safetensors").read_bytes()[:-1] + b"\x7f")
    assert cli("inspect", noise)[0] == 6


@pytest.fixture
def bundle(tmp_path):
    """A bundle of two files, whose content nobody reads here."""
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "base.bin").write_bytes(b"\0" * 80)
    (root / "infer.onnx").write_bytes(b"graph")
    files = {path.name: FileEntry(path.stat().st_size, digest_file(path)) for path in sorted(root.iterdir())}
    manifest = Manifest(
        base_digest="sha256:" + "b" * 64, files=files, graphs={"infer": "infer.onnx"}, inputs={},
        groups={"q": BundleGroup(("q.weight",), 4, 5, 2)},
        tensors={"q.weight": TensorPlace(0, "float32", (5, 4), True)}, extras={}, task="text-classification",
        labels=tuple(f"label {n}" for n in range(9)), preprocessing={}, opset=20, ir_version=10,
    )  # fmt: skip
    (root / "manifest.json").write_bytes(serialize_manifest(manifest))
    return root


def test_inspect_a_bundle(cli, bundle):
    code, payload, err = cli("inspect", bundle, "--json")
    assert (code, err, payload["kind"]) == (0, "", "bundle")
    assert payload["digests_match"] is True
    assert payload["bytes"] == 85
    assert payload["files"]["base.bin"]["bytes"] == 80
    assert payload["groups"] == {"q": {"slices": 1, "n1": 4, "n2": 5, "rank": 2}}
    assert payload["graphs"] == {"infer": "infer.onnx"}
    text = cli("inspect", bundle)[1]
    assert payload["precision"] == "fp32"
    for part in ("all match", "label 5, ... (9)", "base.bin", "80 B", "4x5", "stored as fp32"):
        assert part in text


def test_inspect_a_damaged_bundle(cli, bundle):
    (bundle / "base.bin").write_bytes(b"\1" * 80)
    code, payload, _ = cli("inspect", bundle, "--json")
    assert (code, payload["digests_match"], list(payload["damaged"])) == (6, False, ["base.bin"])
    (bundle / "infer.onnx").unlink()
    code, text, _ = cli("inspect", bundle)
    assert code == 6
    assert "2 files do not match" in text
    (bundle / "manifest.json").write_text("{")
    assert cli("inspect", bundle)[0] == 3


@dataclass(frozen=True)
class Report:
    """Stands for `ExportReport` where only the command is under test."""

    parity: dict = field(default_factory=lambda: {"onnx": {"logits": 1e-7}})
    seconds: float = 1.5
    graph_bytes: dict = field(default_factory=lambda: {"infer.onnx": 2048})
    base_bytes: int = 4096
    executorch: ProgramReport = field(default_factory=ProgramReport)
    quantization: QuantizationReport = field(default_factory=QuantizationReport)
    not_run: dict = field(default_factory=lambda: {"infer-vulkan": "no such backend"})
    converted: dict = field(default_factory=lambda: {"bfloat16": 3})
    held_out: HeldOut = field(default_factory=lambda: HeldOut(None, "the data are gone"))

    def to_dict(self):
        return {"bundle": "b", "base_bytes": self.base_bytes, "graph_bytes": self.graph_bytes}


@pytest.fixture
def exported(monkeypatch):
    """Calls that reached `export_run`, which is tested in tests/export."""
    calls = []
    program = ProgramSpec("train-xnnpack.pte", (), (), {"batch": 4}, 2**20)
    programs = ProgramReport(
        {"train-xnnpack": program}, {"train.pte": 2048}, {"train-xnnpack": {"mm": 2, "erf": 1}}
    )

    scored = QuantizationReport(
        "int4", 4096, 1024, {"a.weight": 0.01, "b.weight": 0.125}, {"base": 0.25, "adapter": 0.5},
        {"fp32": 0.875, "int4": 0.75, "samples": 8.0},
    )  # fmt: skip
    changes = [scored, replace(scored, accuracy=None, note="the data are gone")]

    def export_run(run, out, settings, *, on_stage, **options):
        on_stage("tracing")
        calls.append((run.root, out, settings, options))
        if settings.precision != "fp32":
            return Report(quantization=changes[len(calls) - 1])
        return Report(executorch=programs) if "executorch" in settings.targets else Report()

    monkeypatch.setattr(bundles, "export_run", export_run)
    return calls


def test_export_passes_everything_on(cli, trained, tmp_path, exported):
    out = tmp_path / "bundle"
    code, payload, err = cli("export", trained, "--out", out, "--json")
    assert (code, err) == (0, "")
    assert payload["base_bytes"] == 4096
    targets = ("--target", "step", "--target", "onnx", "--target", "step")
    code, text, _ = cli("export", trained, "--out", out, *targets, "--no-verify", "--force", "--device", "x")
    assert code == 0
    for part in ("4.0 KiB", "infer.onnx", "1.0e-07", "1.5 s", "infer-vulkan: not compared: no such backend"):
        assert part in text
    everything = ExportSettings(("onnx", "ort-training", "step"))
    chosen = ExportSettings(("step", "onnx"), "x", verify=False)
    assert exported == [(trained, out, everything, {"force": False}), (trained, out, chosen, {"force": True})]


def test_export_to_executorch_passes_its_settings_on(cli, trained, tmp_path, exported):
    options = ("--target", "executorch", "--backend", "xnnpack", "--max-batch", "4", "--max-length", "16")
    code, text, _ = cli("export", trained, "--out", tmp_path / "bundle", *options)
    assert code == 0
    assert exported[0][2].targets == ("executorch",)
    assert exported[0][2].programs == ProgramSettings(("xnnpack",), 4, 16)
    for part in (
        "train.pte",
        "2.0 KiB",
        "train-xnnpack",
        "1.0 MiB",
        "4 batch",
        "outside its delegates 3",
        "mm 2",
    ):
        assert part in text


def test_export_says_what_a_precision_changed(cli, trained, tmp_path, exported):
    options = ("export", trained, "--out", tmp_path / "bundle", "--precision", "int4")
    code, text, _ = cli(*options)
    assert code == 0
    assert exported[0][2].precision == "int4"
    for part in (
        "fp32 -> int4", "4.0 KiB -> 1.0 KiB", "1.2e-01 (b.weight)", "base 2.5e-01, adapter 5.0e-01",
        "87.5% -> 75.0% (8 samples)",
    ):  # fmt: skip
        assert part in text
    assert "the data are gone" in cli(*options)[1]
    code, _, err = cli(*options, "--target", "executorch")
    assert code == 2
    assert "float32 base" in err
    assert len(exported) == 2


def test_export_refuses(cli, trained, tmp_path, exported):
    assert cli("export", tmp_path, "--out", tmp_path / "b")[0] == 3
    assert cli("export", trained, "--out", tmp_path / "b", "--target", "tflite")[0] == 2
    assert cli("export", trained)[0] == 2
    assert exported == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(mode):
    with stage_bar(Sink(mode), "loading", total=2) as bar:
        bar.advance(detail="epoch 1")
        bar.stage("training")
        bar.advance()


def test_the_bar_is_only_for_people_at_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, mode, seen in (
        (Terminal(), Mode.HUMAN, True),
        (Terminal(), Mode.JSON, True),
        (Terminal(), Mode.QUIET, False),
        (io.StringIO(), Mode.HUMAN, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        show(mode)
        assert bool(stream.getvalue()) is seen
        if seen:
            assert "training" in stream.getvalue()


def test_a_text_with_no_label_names_its_line(cli, bert_dir, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\nwhere is my card,card\nsend money,\n")
    code, out, _ = cli(
        "train", "--base", bert_dir, "--data", path, "--out", tmp_path / "run", "--threads", "1", "--json"
    )
    assert (code, out["error"]["where"]) == (3, f"{path}:3")


def test_losses_are_numbers_in_json(trained):
    losses = json.loads((trained / "run.json").read_text())["metrics"]["losses"]
    assert np.isfinite(losses).all()


def test_a_preset_sets_the_axes_and_single_settings_override_it(cli, vit_dir, digits_npz, tmp_path):
    arguments = train_arguments(vit_dir, digits_npz, tmp_path / "run", "--preset", "paper", "--json")
    code, result, err = cli(*arguments, "--frame", "orthonormal")
    assert code == 0, err
    axes = {
        name: result["config"][name] for name in ("grouping", "coupling", "transform", "selection", "frame")
    }
    assert axes == {
        "grouping": "shape",
        "coupling": "all",
        "transform": "dft",
        "selection": "norm",
        "frame": "orthonormal",
    }
    assert {group["blocks"] for group in result["groups"]} == {1}


def test_a_budget_of_numbers_is_shared_out_and_the_run_can_be_scored(cli, vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    code, result, err = cli(*train_arguments(vit_dir, digits_npz, out, "--rank-budget", "150", "--json"))
    assert code == 0, err
    ranks = [group["rank"] for group in result["groups"]]
    assert result["trained_numbers"] == sum(rank * rank for rank in ranks) <= 150
    assert len(ranks) == 12
    assert len(set(ranks)) > 1
    code, scored, err = cli("eval", out, "--data", digits_npz, "--json")
    assert code == 0, err
    assert scored["samples"] == 60


def test_a_budget_needs_gradients_of_single_weights(cli, vit_dir, digits_npz, tmp_path):
    arguments = train_arguments(vit_dir, digits_npz, tmp_path / "run", "--rank-budget", "150")
    code, _, err = cli(*arguments, "--selection", "random")
    assert code == 3
    assert "say coupling none and selection gradient" in err
    assert cli(*train_arguments(vit_dir, digits_npz, tmp_path / "run", "--rank-budget", "5"))[0] == 3
