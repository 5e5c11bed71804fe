"""The Python examples of docs/deploy.md, run as printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_tcur_export.convert import convert_adapter
from edge_tcur_runtime.formats.adapter import read_adapter

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def example(name):
    found = re.search(rf"<!-- python: {name} -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    assert found, name
    return found.group(1)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "tests" / "data" / "bundle-v1", tmp_path / "bundle")
    adapter = read_adapter(tmp_path / "bundle" / "adapter.safetensors")
    (tmp_path / "adapter.onnx_adapter").write_bytes(convert_adapter(adapter, "onnx_adapter"))
    return tmp_path


def run(python, name, folder):
    done = subprocess.run(
        [python, "-c", example(name)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_adapter_as_inputs(folder):
    output = run(sys.executable, "fed adapter", folder)
    numbers = [float(text) for text in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", output)]
    assert max(map(abs, numbers)) > 1e-4


def test_the_active_adapter(folder):
    python = os.environ.get("EDGE_TCUR_STOCK_ORT")
    if not python:
        pytest.skip("EDGE_TCUR_STOCK_ORT names no Python with a stock onnxruntime (1.20 or newer)")
    assert float(run(python, "active adapter", folder)) > 1e-4
