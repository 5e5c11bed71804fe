"""`edge-tcur inspect`: an adapter, a run, a bundle, and what is none of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_tcur_runtime.formats.adapter import read_adapter, write_adapter
from edge_tcur_runtime.formats.bundle import (
    BundleGroup,
    FileEntry,
    Manifest,
    TensorPlace,
    serialize_manifest,
)
from edge_tcur_runtime.formats.digest import digest_file
from training_runs import GROUP_KEYS


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
