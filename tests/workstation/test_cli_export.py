"""`edge-tcur export` and `edge-tcur inspect BUNDLE` on a real, small run."""

from __future__ import annotations

import json

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur.cli import export as command
from edge_tcur.training import TrainConfig, train
from edge_tcur_export.executorch import BACKENDS
from edge_tcur_export.settings import ALL_TARGETS, TARGETS
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.formats.digest import digest_file

FILES = {"adapter.safetensors", "base.bin", "canary.safetensors", "infer.onnx", "step.onnx"}


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
    code, out, err = call(capsys, "export", trained, "--out", bundle, *targets, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {
        "schema_version", "bundle", "base_digest", "parity", "graph_bytes", "base_bytes", "adapter_bytes",
        "files", "seconds", "stages", "executorch", "not_run",
    }  # fmt: skip
    assert report["bundle"] == str(bundle)
    assert set(report["parity"]) == {"infer", "step"}
    assert set(report["files"]) == FILES
    for name, entry in report["files"].items():
        assert entry == {"size": (bundle / name).stat().st_size, "sha256": digest_file(bundle / name)}
    assert report["graph_bytes"] == {
        name: report["files"][name]["size"] for name in ("infer.onnx", "step.onnx")
    }
    assert report["base_bytes"] == report["files"]["base.bin"]["size"]
    assert report["adapter_bytes"] == (trained / "adapter.safetensors").stat().st_size
    inspected(bundle, report, capsys)
    damaged(bundle, capsys)


def inspected(bundle, report, capsys):
    code, out, err = call(capsys, "inspect", bundle, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert (shown["kind"], shown["digests_match"], shown["damaged"]) == ("bundle", True, {})
    assert (shown["base_digest"], shown["device"]) == (report["base_digest"], "raspberry-pi-5-8gb")
    assert shown["graphs"] == {"infer": "infer.onnx", "step": "step.onnx"}
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
    assert set(command.TARGETS) == set(TARGETS)
    assert {*command.TARGETS, command.EXECUTORCH} == set(ALL_TARGETS)
    assert command.BACKENDS == BACKENDS
