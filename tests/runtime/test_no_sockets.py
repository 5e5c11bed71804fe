"""Local data stay local: nothing but `update` opens a socket."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_tcur_runtime.installed import find_onnxruntime

DATA = Path(__file__).parents[1] / "data"
V1, USER = DATA / "bundle-v1", DATA / "user.npz"
pytestmark = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")

# Python tells of every socket before it is made by Python's own module, whoever asks for it. The hook cannot
# see one that native code makes by itself (ONNX Runtime, a tokenizer's library, a resolver of names in libc),
# nor one of a child process. The kernel sees those: `test_the_kernel_sees_no_socket`, where strace is
# installed, and the run without a network below, where namespaces are to be had.
REFUSING = """
import os, sys
def refuse(event, arguments):
    if event.startswith("socket."):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(refuse)
if len(sys.argv) == 1:
    import socket
    socket.socket()
from edge_tcur_runtime.cli import main
main()
"""
PERSONALIZE = ("personalize", V1, "--data", USER, "--threads", "1", "--engine", "ort-step", "--epochs", "2")
COMMANDS = {
    "personalize": (*PERSONALIZE, "--store", "store", "--json"),
    "private": (*PERSONALIZE, "--store", "store", "--private", "--checkpoint-seconds", "0", "--json"),
    "predict": ("predict", V1, "--data", USER, "--json"),
    "adapters": ("adapters", "list", "--store", "store", "--json"),
    "doctor": ("doctor", "--bundle", V1, "--json"),
}


def python(code, arguments, folder, prefix=()):
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)


def test_the_hook_sees_a_socket(tmp_path):
    done = python(REFUSING, (), tmp_path)
    assert done.returncode == 99
    assert done.stderr.startswith("socket.__new__")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_but_update_opens_a_socket(tmp_path, name):
    if name == "adapters":
        assert python(REFUSING, COMMANDS["personalize"], tmp_path).returncode == 0
    done = python(REFUSING, COMMANDS[name], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_version"]


def without_a_network():
    """A prefix that runs a command where there is no network, or why that cannot be had here."""
    found = shutil.which("unshare")
    if found is None:
        return None, "the command unshare is not installed"
    prefix = (found, "--map-root-user", "--net")
    done = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    return (prefix, "") if done.returncode == 0 else (None, f"no network namespace here: {done.stderr}")


PREFIX, WHY = without_a_network()


@pytest.mark.skipif(PREFIX is None, reason=WHY)
def test_personalize_works_where_there_is_no_network(tmp_path):
    outside_folder = tmp_path / "outside"
    outside_folder.mkdir()
    names = "import socket; print(*(name for _, name in socket.if_nameindex()))"
    assert python(names, (), tmp_path, PREFIX).stdout.split() == ["lo"]  # and that is down
    outside = python(
        "from edge_tcur_runtime.cli import main; main()", COMMANDS["personalize"], tmp_path / ".."
    )
    inside = python(
        "from edge_tcur_runtime.cli import main; main()", COMMANDS["personalize"], tmp_path, PREFIX
    )
    assert inside.returncode == 0, inside.stderr
    assert json.loads(inside.stdout)["installed"] == json.loads(outside.stdout)["installed"]


def tracing(log):
    """A prefix that writes the network calls of a command and its children to `log`, or why there is none."""
    found = shutil.which("strace")
    if found is None:
        return None, "the command strace is not installed"
    prefix = (found, "-f", "-qq", "-e", "trace=network", "-e", "signal=none", "-o", str(log))
    done = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    return (prefix, "") if done.returncode == 0 else (None, f"processes cannot be traced here: {done.stderr}")


@pytest.mark.parametrize("name", ["personalize", "predict"])
def test_the_kernel_sees_no_socket(tmp_path, name):
    log = tmp_path / "calls"
    prefix, why = tracing(log)
    if prefix is None:
        pytest.skip(why)
    assert python("import socket; socket.socket()", (), tmp_path, prefix).returncode == 0
    assert "socket(AF_INET" in log.read_text()  # what is to be seen is seen
    done = python("from edge_tcur_runtime.cli import main; main()", COMMANDS[name], tmp_path, prefix)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_version"]
    assert log.read_text() == ""
