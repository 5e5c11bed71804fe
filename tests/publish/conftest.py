"""A publisher's command line, a device's command line, and a real static HTTP server between them."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run

collect_ignore_glob = ["test_*.py"] if None in (find_spec("tuf"), find_spec("cryptography")) else []
DATA = Path(__file__).parents[1] / "data"
PASSPHRASE = "correct horse battery"


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Runs ``publish ...`` or ``update ...`` in this process; exit code and the JSON object printed."""
    monkeypatch.setenv("EDGE_TCUR_PASSPHRASE", PASSPHRASE)
    monkeypatch.setenv("EDGE_TCUR_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("EDGE_TCUR_UPDATE_URL", raising=False)

    def go(*arguments):
        arguments = [str(argument) for argument in arguments]
        group = edge_tcur if arguments[0] in ("publish", "train", "export") else device
        with pytest.raises(SystemExit) as caught:
            run(group, [*arguments, "--json"])
        out, _ = capsys.readouterr()
        return caught.value.code, json.loads(out)

    return go


@pytest.fixture
def ok(call):
    """The same, for commands that must succeed."""

    def go(*arguments):
        code, payload = call(*arguments)
        assert code == 0, payload
        assert payload["schema_version"] == 1
        return payload

    return go


@pytest.fixture
def repo(tmp_path, ok):
    """An empty signed repository; its keys are beside it."""
    ok("publish", "init", tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def bundle(tmp_path, repo, ok):
    """The shipped bundle, with the repository's root in it."""
    shutil.copytree(DATA / "bundle-v1", tmp_path / "bundle")
    ok("publish", "trust", tmp_path / "bundle", "--repo", repo)
    return tmp_path / "bundle"


@pytest.fixture
def adapters(tmp_path, make_variant):
    """Files of five adapters of the shipped bundle."""
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"adapter-{number}.safetensors")
        paths[-1].write_bytes(make_variant(number))
    return paths


@pytest.fixture
def pem_files():
    """Writes ``key.pem`` (unencrypted) and ``public.pem`` of a private key into a folder; both paths."""
    from cryptography.hazmat.primitives import serialization

    def write(folder, private):
        key, public = folder / "key.pem", folder / "public.pem"
        key.write_bytes(private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ))  # fmt: skip
        public.write_bytes(private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ))  # fmt: skip
        return key, public

    return write


@pytest.fixture
def server(repo, make_server):
    return make_server(repo)
