"""`edge-tcur-device adapters`, as a user runs it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, read_adapter, write_adapter
from edge_tcur_runtime.formats.bundle import BundleGroup, FileEntry, Manifest, serialize_manifest
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.factors import Factors, GroupSpec
from edge_tcur_runtime.formats.weights import TensorPlace

BASE = "sha256:" + "b" * 64
OTHER_BASE = "sha256:" + "c" * 64
LABELS = tuple(f"label {i}" for i in range(12))


def write(path, seed, base=BASE):
    """Writes a valid adapter file of rank 2 and returns its digest."""
    core = np.random.default_rng(seed).normal(size=(2, 2, 2)).astype(np.float32)
    factors = Factors(core, np.array([[0, 3]], np.int32), np.array([[1, 4]], np.int32))
    header = AdapterHeader(
        base,
        {"q": GroupSpec(("q.0", "q.1"), 4, 5)},
        "text-classification",
        LABELS,
        provenance={"tool": "test"},
    )
    return write_adapter(path, Adapter(header, {"q": factors}))


@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    """Runs `adapters` with a store of its own; returns exit code, stdout (parsed with --json), stderr."""
    monkeypatch.setenv("EDGE_TCUR_STORE", str(tmp_path / "store"))

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            run(device, ["adapters", *map(str, arguments)])
        out, err = capsys.readouterr()
        return caught.value.code, json.loads(out) if "--json" in arguments else out, err

    return call


@pytest.fixture
def files(tmp_path):
    """Two adapter files of one base, and their digests."""
    return {name: (tmp_path / f"{name}.safetensors", write(tmp_path / f"{name}.safetensors", seed))
            for seed, name in enumerate(("one", "two"))}  # fmt: skip


@pytest.fixture
def bundle(tmp_path):
    """A bundle without graphs, so that an adapter that fits it has passed its health check."""
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "base.bin").write_bytes(weights := bytes(2 * 4 * 4 * 5))
    places = {f"q.{slice_}": TensorPlace(80 * slice_, "float32", (4, 5), False) for slice_ in range(2)}
    groups = {"q": BundleGroup(("q.0", "q.1"), 4, 5, 2)}
    manifest = Manifest(
        base_digest=BASE, files={"base.bin": FileEntry(len(weights), digest_bytes(weights))}, graphs={},
        inputs={}, groups=groups, tensors=places, extras={}, task="text-classification", labels=LABELS,
        preprocessing={}, opset=17, ir_version=9,
    )  # fmt: skip
    (root / "manifest.json").write_bytes(serialize_manifest(manifest))
    return root


def test_install_activate_rollback_remove(cli, bundle, files):
    for name, (path, digest) in files.items():
        code, out, _ = cli("install", path, "--name", name, "--json")
        assert (code, out) == (0, {"schema_version": 1, "digest": digest, "name": name, "active": False})
    one, two = files["one"][1], files["two"][1]
    assert cli("activate", "one", "--json")[1] == {
        "schema_version": 1, "active": one, "previous": None, "pending": True,
    }  # fmt: skip
    assert cli("activate", two[7:15], "--json")[1]["previous"] is None  # the first was never confirmed
    assert cli("activate", "one", "--bundle", bundle, "--json")[1]["pending"] is False
    assert cli("activate", "two", "--bundle", bundle, "--json")[1]["previous"] == one
    assert cli("rollback", "--json")[1]["active"] == one
    code, out, _ = cli("list", "--json")
    assert code == 0
    assert out["active"] == one
    assert [(line["name"], line["active"], line["previous"]) for line in out["adapters"]] == [
        ("one", True, False), ("two", False, True),
    ]  # fmt: skip
    assert cli("remove", "two", "--json")[1]["removed"] == two
    assert cli("activate", "base", "--json")[1]["active"] is None


def test_human_output(cli, bundle, files):
    path, digest = files["one"]
    assert cli("list") == (0, "no adapters installed\n", "")
    code, out, err = cli("install", path, "--name", "one")
    assert (code, err) == (0, "")
    assert out == f"installed {digest}\nuse it with: edge-tcur-device adapters activate one\n"
    assert cli("activate", "one", "--bundle", bundle)[1] == f"active: {digest}\n"
    lines = cli("list")[1].splitlines()
    assert lines[0].split() == ["name", "status", "digest", "size", "trained", "task", "base"]
    assert lines[2].split()[:3] == ["one", "active", digest]
    out = cli("show", "one")[1]
    assert f"digest: {digest}" in out
    assert "label 7, ... (12)" in out
    assert "rank: 2" in out
    assert cli("activate", "base")[1] == "active: base (no adapter)\n"
    assert cli("activate", "one", "--quiet") == (0, "", "")


def test_show(cli, files):
    path, digest = files["one"]
    cli("install", path)
    code, out, _ = cli("show", digest, "--json")
    assert code == 0
    assert (out["digest"], out["base_digest"], out["core_numbers"]) == (digest, BASE, 8)
    assert out["groups"] == {"q": {"weights": 2, "n1": 4, "n2": 5, "rank": 2}}
    assert cli("show", "active")[0] == 2  # the base is active: there is no file to show


def test_a_bundle_guards_install_and_activate(cli, tmp_path, bundle, files):
    foreign = tmp_path / "foreign.safetensors"
    write(foreign, 7, OTHER_BASE)
    code, out, err = cli("install", foreign, "--bundle", bundle, "--json")
    assert (code, out["error"]["code"]) == (4, "base-mismatch")
    assert OTHER_BASE in err
    assert BASE in err
    assert cli("install", foreign, "--name", "foreign")[0] == 0
    assert cli("activate", "foreign", "--bundle", bundle)[0] == 4
    assert cli("install", files["one"][0], "--name", "one", "--bundle", bundle)[0] == 0
    assert cli("activate", "one", "--bundle", bundle)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("install", "/no/such/file"), 3),
        (("install",), 2),
        (("activate", "nothing"), 2),
        (("activate", "one", "--bundle", "/no/such/bundle"), 3),
        (("rollback",), 2),
        (("remove", "one"), 2),
        (("show", "base"), 2),
    ],
)
def test_mistakes_have_their_exit_codes(cli, files, arguments, code):
    cli("install", files["one"][0], "--name", "one")
    if arguments[0] == "remove":
        cli("activate", "one")
    actual, out, _ = cli(*arguments, "--json")
    assert (actual, out["error"]["exit_code"]) == (code, code)


def test_a_damaged_file_is_refused_and_nothing_is_installed(cli, files):
    path, _ = files["one"]
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    code, out, _ = cli("install", path, "--json")
    assert (code, out["error"]["code"]) == (6, "integrity")
    assert str(path) in out["error"]["where"]
    path.write_bytes(b"no adapter at all")
    assert cli("install", path)[0] == 3
    assert cli("list", "--json")[1]["adapters"] == []


def test_a_store_that_is_not_there(cli, tmp_path):
    code, out, _ = cli("activate", "one", "--json")
    assert code == 3
    assert "install" in out["error"]["hint"]
    assert not (tmp_path / "store").exists()


def test_a_damaged_state_is_told_on_stderr(cli, tmp_path, files):
    cli("install", files["one"][0], "--name", "one")
    cli("activate", "one")
    for name in ("state-0.json", "state-1.json"):
        (tmp_path / "store" / name).write_bytes(b"{")
    code, out, err = cli("list", "--json")
    assert (code, out["active"], len(out["adapters"])) == (0, None, 1)
    assert "state is lost" in err


def test_a_damaged_adapter_is_listed_as_damaged(cli, tmp_path, files):
    cli("install", files["one"][0], "--name", "one")
    (path,) = (tmp_path / "store" / "adapters").iterdir()
    path.write_bytes(b"x")
    assert cli("list")[1].splitlines()[2].split()[:2] == ["one", "damaged"]
    assert cli("activate", "one")[0] == 6


@pytest.mark.parametrize("command", ["install", "list", "activate", "rollback", "remove", "show"])
def test_every_command_has_help_with_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"edge-tcur-device adapters {command}" in out.partition("Example")[2]
    for option in ("--store", "--json", "--quiet", "--debug"):
        assert option in out


def test_what_a_terminal_would_obey_is_escaped_and_json_has_it_as_it_is(cli, files, tmp_path):
    """Task, labels and provenance are texts of whoever wrote the adapter."""
    own = read_adapter(files["one"][0])
    task, label, tool = "im\x1b[2J", "a\x1b[31m\nactive: yes", "x\x9b31m\r\u202e\nforged: line"
    header = replace(own.header, task=task, labels=(label, "\u00e9"), provenance={"tool": tool, "k\x07": "v"})
    path = tmp_path / "hostile.safetensors"
    write_adapter(path, replace(own, header=header))
    assert cli("install", path, "--name", "hostile")[0] == 0
    for command in (("show", "hostile"), ("list",)):
        _, out, _ = cli(*command)
        assert not set(out) & set("\x1b\x9b\x07\r\u202e")
        assert r"im\x1b[2J" in out
        assert not [line for line in out.splitlines() if line.startswith(("active", "forged"))]
    shown = cli("show", "hostile")[1]
    assert r"a\x1b[31m\nactive: yes, \u00e9" in shown.replace("\u00e9", r"\u00e9")  # letters stay
    assert r"x\x9b31m\r\u202e\nforged: line" in shown
    _, document, _ = cli("show", "hostile", "--json")
    assert (document["task"], document["labels"][0]) == (task, label)
    assert document["provenance"] == {"tool": tool, "k\x07": "v"}
