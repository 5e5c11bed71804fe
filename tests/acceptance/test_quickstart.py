"""The quickstart as a user runs it, and everything that it must show."""

import json
import subprocess
import sys

import pytest

KEYS = """
schema_version base_accuracy adapter_accuracy personal_accuracy full_accuracy lora_accuracy trained_numbers
lora_trained_numbers adapter_bytes lora_adapter_bytes base_bytes budget_bytes peak_rss_bytes step_seconds
swap_ms base_digest_before base_digest_after
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "edge_tcur", "quickstart", "--json", "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 1, "stdout carries one JSON object and nothing else"
    return json.loads(lines[0])


pytestmark = pytest.mark.timeout(900)


def test_it_prints_every_key(result):
    assert set(result) >= set(KEYS.split())


def test_the_personal_adapter_does_its_job(result):
    assert result["personal_accuracy"] >= result["base_accuracy"] + 0.30
    assert result["personal_accuracy"] >= result["full_accuracy"] - 0.05


def test_it_is_small(result):
    assert result["trained_numbers"] * 16 <= result["lora_trained_numbers"]
    assert result["adapter_bytes"] <= 16 * 2**10


def test_the_device_kept_its_promises(result):
    assert result["torch_absent_on_device"] is True
    assert result["engine"] == "ort-training"
    assert 0 < result["peak_rss_bytes"] < result["budget_bytes"]
    assert result["base_digest_before"] == result["base_digest_after"]
    assert result["swap_ms"] < 5


def test_the_exported_graphs_agree_with_torch(result):
    assert set(result["parity"]) == {"infer", "step", "train"}
    assert result["parity"]["step"]["gradients"] < 1e-3


def test_everything_it_names_was_written(result):
    from pathlib import Path

    for path in result["paths"].values():
        assert Path(path).exists(), path
    assert Path(result["paths"]["plot"]).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_does_not_overwrite_the_first(result):
    from pathlib import Path

    out = str(Path(result["paths"]["bundle"]).parent)
    done = subprocess.run(
        [sys.executable, "-m", "edge_tcur", "quickstart", "--json", "--out", out],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "output-exists"
