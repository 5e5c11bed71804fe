"""Every command that docs/ota.md prints is run, as printed, in the order of the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ota.md").read_text(encoding="utf-8")


def commands(name):
    block = re.search(rf"<!-- commands: {name} -->\n```sh\n(.*?)```", PAGE, re.DOTALL).group(1)
    return [re.sub(r"\s{2,}#.*", "", line) for line in block.splitlines()]


@pytest.fixture
def page(tmp_path, monkeypatch, capsys, make_variant, make_server):
    """Runs the lines of a block; what each printed (with ``--json``)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_TCUR_STORE", str(tmp_path / "store"))
    shutil.copytree(ROOT / "tests" / "data" / "bundle-v1", "bundle")
    Path("run").mkdir()
    Path("run/adapter.safetensors").write_bytes(make_variant(0))
    Path("next.safetensors").write_bytes(make_variant(1))
    urls = []

    def go(name):
        printed = []
        for line in commands(name):
            if line.startswith("export "):
                key, _, value = line.removeprefix("export ").partition("=")
                monkeypatch.setenv(key, shlex.split(value)[0])
                continue
            if line.startswith("python3 -m http.server 8000 "):
                urls.append(make_server(tmp_path / "repo").url)
                continue
            if not line.startswith("edge-tcur"):
                subprocess.run(["bash", "-euc", line], check=True)
                continue
            tool, *arguments = shlex.split(line.replace("http://127.0.0.1:8000/", urls[0] if urls else ""))
            with pytest.raises(SystemExit) as caught:
                run({"edge-tcur": edge_tcur, "edge-tcur-device": device}[tool], [*arguments, "--json"])
            out, err = capsys.readouterr()
            assert caught.value.code == 0, f"{line}\n{out}\n{err}"
            printed.append(json.loads(out))
        return printed

    return go


def test_the_commands_of_the_page(page):
    *_, added, updated = page("path")
    assert updated["active"] == added["digest"]
    *_, checked, later = page("later")
    assert not checked["changed"]
    assert later["active"] == added["digest"]  # version 2 was withdrawn again
    page("ceremony")
    (published, installed) = page("install")
    assert installed["installed_bundle"]["size"] == published["bytes"]
    assert installed["active"] == added["digest"]


def test_every_command_of_the_page_exists():
    found = set(re.findall(r"`?publish (\w+)", PAGE)) - {"anything"}
    group = edge_tcur.get_command(None, "publish")
    assert found <= set(group.commands), found
    assert set(group.commands) <= found | {"add"}
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        options = {o for c in [*group.commands.values(), device.get_command(None, "update")]
                   for p in c.params for o in p.opts}  # fmt: skip
        assert option in options, option


@pytest.mark.parametrize("name", sorted(edge_tcur.get_command(None, "publish").commands))
def test_every_command_has_examples_and_the_common_options(name, capsys):
    with pytest.raises(SystemExit) as caught:
        run(edge_tcur, ["publish", name, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("Example", "--json", "--quiet", "--debug", f"edge-tcur publish {name}"):
        assert part in out


def test_publishing_needs_no_torch():
    code = (
        "import sys, edge_tcur.cli.publish, edge_tcur.publish.operations, edge_tcur.publish.bundles\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
