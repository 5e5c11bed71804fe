"""The runtime's wheel with the extra `ota` alone in an empty environment, updating from a real server.

No torch, no cryptography; ONNX Runtime is there for the health check. The publisher runs in
this environment. Installing needs the package index; nothing else here does.
"""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
pytestmark = pytest.mark.skipif(
    None in (find_spec("tuf"), find_spec("cryptography")), reason="publishing needs the extra 'publish'"
)


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def device(tmp_path):
    """Runs ``edge-tcur-device`` of an environment that holds the wheel and what its extras ask for."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT / "runtime")
    (wheel,) = tmp_path.glob("*.whl")
    bin_dir = tmp_path / "venv" / "bin"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(bin_dir / "python", "-m", "pip", "install", "--quiet", f"{wheel}[ort,ota]")
    installed = run(bin_dir / "python", "-m", "pip", "list", "--format=freeze").lower()
    assert "tuf==" in installed
    assert not [line for line in installed.splitlines() if line.startswith(("torch=", "cryptography="))]
    environment = {"PATH": str(bin_dir), "HOME": str(tmp_path), "EDGE_TCUR_STORE": str(tmp_path / "store")}

    def go(*arguments):
        command = (bin_dir / "edge-tcur-device", *arguments, "--json")
        return json.loads(run(*command, env=environment, cwd=tmp_path))

    return go


@pytest.fixture
def publish(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_TCUR_PASSPHRASE", "correct horse battery")

    def go(*arguments):
        return json.loads(run(sys.executable, "-m", "edge_tcur", "publish", *arguments, "--json"))

    return go


def test_the_wheel_alone_installs_updates_and_goes_back(device, publish, make_server, tmp_path, make_variant):
    repo = tmp_path / "repo"
    url = make_server(repo).url
    shutil.copytree(DATA / "bundle-v1", tmp_path / "bundle")
    publish("init", repo)
    publish("trust", tmp_path / "bundle", "--repo", repo)
    options = ("--repo", repo, "--base", tmp_path / "bundle", "--name", "banking")
    added = []
    for number in range(2):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(make_variant(number))
        added.append(publish("add", file, *options)["digest"])
        if number == 0:
            assert device("update", tmp_path / "bundle", "--url", url)["active"] == added[0]
    assert device("update", tmp_path / "bundle", "--url", url, "--check-only")["changed"] is False
    updated = device("update", tmp_path / "bundle", "--url", url)
    assert (updated["active"], updated["health"][:10]) == (added[1], "the signed")
    answer = device("predict", tmp_path / "bundle", "--data", DATA / "user.npz", "--adapter", "banking")
    assert len(answer["predictions"]) > 0
    publish("rotate", "targets", "snapshot", "timestamp", "--repo", repo)
    publish("withdraw", "banking", "2", "--repo", repo)
    assert device("update", tmp_path / "bundle", "--url", url)["active"] == added[0]
    publish("bundle", tmp_path / "bundle", "--repo", repo, "--name", "mini")
    root = repo / "metadata" / "1.root.json"
    fresh = device("update", tmp_path / "fresh", "--install", "--url", url, "--root", root)
    assert fresh["installed_bundle"]["size"] > 0
    stick = device("update", tmp_path / "bundle", "--url", repo.as_uri(), "--offline")
    assert stick["active"] == added[0]
