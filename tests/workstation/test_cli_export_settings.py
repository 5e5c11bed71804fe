"""`edge-tcur export`: what it passes on to `export_run`, and what it says of a report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from edge_tcur_export import bundle as bundles
from edge_tcur_export.executorch import ProgramReport
from edge_tcur_export.held_out import HeldOut
from edge_tcur_export.quantization import QuantizationReport
from edge_tcur_export.settings import ExportSettings, ProgramSettings
from edge_tcur_runtime.formats.bundle import (
    ProgramSpec,
)


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
