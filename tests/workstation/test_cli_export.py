"""`edge-tcur export` and `edge-tcur inspect BUNDLE` on a real, small run."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from edge_tcur.cli import convert, edge_tcur, options
from edge_tcur.cli import export as command
from edge_tcur.training import TrainConfig, train
from edge_tcur_export.convert import KINDS
from edge_tcur_export.executorch import ALL_BACKENDS, BACKENDS
from edge_tcur_export.settings import ALL_TARGETS, TARGETS
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.weights import PRECISIONS

DATA = Path(__file__).parents[1] / "data"
FILES = {"adapter.safetensors", "base.bin", "canary.safetensors", "checks.onnx", "infer.onnx", "step.onnx"}


@pytest.fixture(scope="module")
def trained(vit_dir, digits_npz, tmp_path_factory):
    settings = {"task": "image-classification", "rank": 2, "epochs": 1, "threads": 1}
    root = tmp_path_factory.mktemp("cli-export") / "run"
    return train(TrainConfig(str(vit_dir), str(digits_npz), **settings), root).run.root


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(edge_tcur, [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_export_and_inspect(trained, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    targets = ("--target", "onnx", "--target", "step", "--device", "raspberry-pi-5-8gb")
    targets += ("--precision", "int8")
    code, out, err = call(capsys, "export", trained, "--out", bundle, *targets, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {
        "schema_version", "bundle", "base_digest", "parity", "graph_bytes", "base_bytes", "adapter_bytes",
        "files", "seconds", "stages", "executorch", "quantization", "not_run", "converted",
        "parity_inputs", "parity_note",
    }  # fmt: skip
    assert (report["parity_inputs"], report["parity_note"]) == ("held-out", "")
    assert report["bundle"] == str(bundle)
    assert set(report["parity"]) == {"infer", "step"}
    assert set(report["files"]) == FILES
    for name, entry in report["files"].items():
        assert entry == {"size": (bundle / name).stat().st_size, "sha256": digest_file(bundle / name)}
    assert report["graph_bytes"] == {
        name: report["files"][name]["size"] for name in ("checks.onnx", "infer.onnx", "step.onnx")
    }
    assert report["base_bytes"] == report["files"]["base.bin"]["size"]
    assert report["adapter_bytes"] == (trained / "adapter.safetensors").stat().st_size
    change = report["quantization"]
    assert change["precision"] == "int8"
    assert change["base_bytes"] == report["base_bytes"] < change["base_bytes_fp32"]
    inspected(bundle, report, capsys)
    damaged(bundle, capsys)


def inspected(bundle, report, capsys):
    code, out, err = call(capsys, "inspect", bundle, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert (shown["kind"], shown["digests_match"], shown["damaged"]) == ("bundle", True, {})
    assert (shown["base_digest"], shown["device"]) == (report["base_digest"], "raspberry-pi-5-8gb")
    assert shown["precision"] == "int8"
    assert shown["graphs"] == {"checks": "checks.onnx", "infer": "infer.onnx", "step": "step.onnx"}
    assert {name: entry["bytes"] for name, entry in shown["files"].items()} == {
        name: entry["size"] for name, entry in report["files"].items()
    }
    assert len(shown["groups"]) == 6
    assert all((group["slices"], group["rank"]) == (2, 2) for group in shown["groups"].values())
    text = call(capsys, "inspect", bundle)[1]
    assert "all match" in text
    assert "raspberry-pi-5-8gb" in text


def damaged(bundle, capsys):
    content = bytearray((bundle / "base.bin").read_bytes())
    content[100] ^= 1
    (bundle / "base.bin").write_bytes(content)
    code, out, _ = call(capsys, "inspect", bundle, "--json")
    assert code == 6
    assert list(json.loads(out)["damaged"]) == ["base.bin"]


def test_options_of_executorch_need_its_target(trained, tmp_path, capsys):
    for option in (("--backend", "xnnpack"), ("--max-batch", "4"), ("--max-length", "16")):
        code, out, err = call(capsys, "export", trained, "--out", tmp_path / "bundle", *option)
        assert (code, out) == (2, "")
        assert option[0] in err
        assert "--target executorch" in err
    assert not list(tmp_path.iterdir())


def test_the_command_offers_what_there_is():
    assert set(options.DEFAULT_TARGETS) == set(TARGETS)
    assert set(options.TARGETS) == set(ALL_TARGETS)
    assert (*command.BACKENDS, command.VULKAN) == ALL_BACKENDS
    assert command.BACKENDS == BACKENDS
    assert command.PRECISIONS == PRECISIONS
    assert convert.KINDS == KINDS


def test_a_dry_run_writes_nothing_and_says_all(trained, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    options = ("--target", "onnx", "--device", "pixel-8", "--provider", "webgpu")
    code, out, err = call(capsys, "export", trained, "--dry-run", *options, "--batch", "4", "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert {"infer.onnx", "base.bin"} <= set(content["files"])
    assert (content["batch"], content["device"], content["budget"]) == (4, "pixel-8", 2 * 2**30)
    assert all(entry["fits"] for entry in content["memory"].values())
    assert set(content["no_kernel"]["webgpu"]) == {"infer"}
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_a_plan_of_a_bundle_as_text(capsys):
    bundle = DATA / "bundle-v1"
    code, out, _ = call(
        capsys, "plan", bundle, "--budget", "58MiB", "--provider", "xnnpack", "--batch", "512"
    )
    assert code == 0
    assert "TOO LARGE" in out
    assert "kernels of the provider xnnpack (onnxruntime.ai/docs" in out
    assert "base.bin" in out
    code, out, _ = call(capsys, "plan", bundle, "--device", "jetson-nano", "--target", "ort-training")
    assert code == 4
    assert "CANNOT WORK: ort-training: jetson-nano has no package" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("plan", DATA / "bundle-v1", "--provider", "tpu"),
            2,
            "no table of operators for the provider 'tpu'",
        ),
        (("plan", DATA / "bundle-v1", "--device", "pixel-88"), 2, "no device profile named 'pixel-88'"),
        (("plan", DATA, "--batch", "2"), 3, "neither a run (run.json) nor a bundle (manifest.json)"),
        (("inspect", DATA), 3, "give an adapter file, a run directory or a bundle directory"),
        (
            ("convert", DATA / "adapter-v1.safetensors", "--to", "ptd", "--bundle", DATA, "--out", "x.ptd"),
            3,
            "is it a bundle, the directory that 'edge-tcur export' wrote? If so, export",
        ),
        (("export", "run"), 2, "--out is missing"),
        (("export", "run", "--out", "b", "--batch", "4"), 2, "--batch is for a plan"),
    ],
)
def test_plans_that_cannot_be_made(arguments, code, message, capsys):
    found, out, err = call(capsys, *arguments)
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.parametrize("kind", KINDS)
def test_convert(kind, tmp_path, capsys):
    bundle, out = DATA / "bundle-v1", tmp_path / f"a.{kind}"
    arguments = ("convert", bundle / "adapter.safetensors", "--to", kind, "--bundle", bundle, "--out", out)
    code, text, err = call(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    content = json.loads(text)
    assert (content["file"], content["format"], content["bytes"]) == (str(out), kind, out.stat().st_size)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    raw = out.read_bytes()
    code, _, err = call(capsys, *arguments)
    assert (code, "--force" in err) == (3, True)
    out.write_bytes(b"old")
    assert call(capsys, *arguments, "--force")[0] == 0
    assert out.read_bytes() == raw
    other = DATA / "sketch-v1" / "adapter.safetensors"
    code, _, err = call(capsys, "convert", other, *arguments[2:], "--force")
    assert code == 4
    assert "the adapter was made for the base" in err
    assert call(capsys, "convert", DATA / "user.npz", "--to", kind, "--out", tmp_path / "x")[0] == 3


def test_a_reference_set_goes_into_the_bundle(trained, digits_npz, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    options = ("--target", "onnx", "--no-verify", "--reference", digits_npz, "--reference-samples", "8")
    code, _, err = call(capsys, "export", trained, "--out", bundle, *options, "--json")
    assert code == 0, err
    spec = json.loads((bundle / "manifest.json").read_bytes())["reference"]
    assert (spec["file"], spec["samples"], spec["measure"]) == ("reference.safetensors", 8, "base")
    assert (bundle / spec["file"]).is_file()
    assert call(capsys, "inspect", bundle, "--json")[0] == 0
    none = ("--reference-samples", "0")
    assert call(capsys, "export", trained, "--out", tmp_path / "b", *none, "--json")[0] == 2
