"""The built runtime wheel alone in an empty environment: it installs, has no torch, and predicts.

Each environment takes one Python and one ONNX Runtime; a Python that this machine does not have is
skipped. Installing needs the package index; nothing else here does.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "tests" / "data" / "bundle-v1"
USER = ROOT / "tests" / "data" / "user.npz"
CASES = [
    ("3.10", "ort-training"),
    ("3.11", "ort"),
    ("3.11", "ort-training"),
    ("3.12", "ort-training"),
    ("3.13", "ort"),
]
SLIM = ROOT / "runtime" / "requirements-slim.txt"
MOST_INSTALLED = 100 * 2**20  # bytes
# What each environment brings by itself, before anything of ours.
OF_VENV = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils")


def find_python(version):
    """A Python of that version: this one, one on the path, or one of pyenv's."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    for name in filter(None, names):
        done = subprocess.run([name, "-c", "import venv, ensurepip"], capture_output=True, check=False)
        if done.returncode == 0:
            return name
    return None


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT / "runtime")
    (found,) = out.glob("*.whl")
    return found


def make_environment(folder, version):
    """An empty environment's folder of programs."""
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    run(python, "-m", "venv", folder)
    return folder / "bin"


def installed_bytes(bin_dir):
    """Bytes of the installed files, without compiled copies of modules and what the environment brought."""
    (packages,) = bin_dir.parent.glob("lib/python3*/site-packages")
    total = 0
    for path in packages.rglob("*"):
        own = path.relative_to(packages).parts[0].split("-")[0] not in OF_VENV
        if own and path.is_file() and path.suffix != ".pyc":
            total += path.stat().st_size
    return total


def check_it_works(bin_dir, folder, engine):
    """Doctor, predict and personalize with the installed program alone."""
    environment = {"PATH": str(bin_dir), "HOME": str(folder), "EDGE_TCUR_STORE": str(folder / "store")}
    device = bin_dir / "edge-tcur-device"
    options = {"env": environment, "cwd": folder}
    doctor = json.loads(run(device, "doctor", "--bundle", BUNDLE, "--json", **options))
    assert doctor["torch_importable"] is False
    assert doctor["bundle"]["ok"] is True
    answer = json.loads(
        run(device, "predict", BUNDLE, "--data", USER, "--adapter", "bundle", "--json", **options)
    )
    assert len(answer["predictions"]) > 0
    result = json.loads(
        run(device, "personalize", BUNDLE, "--data", USER, "--budget", "256MiB", "--json", **options)
    )
    assert result["engine"] == engine
    assert result["base_digest_before"] == result["base_digest_after"]
    assert result["peak_rss_bytes"] < 256 * 2**20


@pytest.mark.parametrize(("version", "extra"), CASES)
def test_the_wheel_alone_predicts_and_personalises(wheel, tmp_path, version, extra):
    bin_dir = make_environment(tmp_path / "venv", version)
    run(bin_dir / "python", "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]")
    installed = run(bin_dir / "python", "-m", "pip", "list", "--format=freeze").lower()
    assert not [line for line in installed.splitlines() if line.startswith(("torch=", "transformers="))]
    check_it_works(bin_dir, tmp_path, {"ort": "ort-step", "ort-training": "ort-training"}[extra])


@pytest.mark.parametrize("version", ["3.11"])
def test_the_slim_install_is_below_100_mib_and_personalises(wheel, tmp_path, version):
    """The command of docs/deploy.md, with this tree's wheel in the place of the published one."""
    command = "pip install --no-deps --no-compile -r runtime/requirements-slim.txt"
    assert f"{command} edge-tcur-runtime" in (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    bin_dir = make_environment(tmp_path / "venv", version)
    run(bin_dir / "python", "-m", *command.split(), "--quiet", wheel, cwd=ROOT)
    assert 40 * 2**20 < installed_bytes(bin_dir) < MOST_INSTALLED  # the lower bound: it counts something
    check_it_works(bin_dir, tmp_path, "ort-training")
    # Text needs the tokenizer's library, and that imports without what it declares.
    run(bin_dir / "python", "-c", "from tokenizers import Tokenizer; Tokenizer.from_str", cwd=tmp_path)
