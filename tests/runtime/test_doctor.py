"""The doctor: what is installed is read from files, and a library that crashes does not end it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edge_tcur_runtime import doctor as doctor_module
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.doctor import (
    EngineReport,
    examine,
    examine_bundle,
    examine_store,
    probe_providers,
    read_memory,
    render,
)
from edge_tcur_runtime.engines import ENGINES
from edge_tcur_runtime.formats.bundle import FileEntry, Manifest, serialize_manifest
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.installed import (
    OnnxRuntimeInstall,
    executorch_problem,
    find_conflicts,
    find_onnxruntime,
    is_importable,
    version_of,
)

FILES = {"base.bin": b"weights", "infer.onnx": b"infer", "step.onnx": b"step"}


def install(site, name, version, *, training=False, top_level=True, build_info=True):
    """Puts what pip would put for an ONNX Runtime wheel into `site`."""
    package = site / "onnxruntime"
    (package / "capi").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    if build_info:
        text = f"package_name = '{name}'\n__version__ = '{version}'\n"
        (package / "capi" / "build_and_package_info.py").write_text(text)
    if training:
        (package / "training" / "api").mkdir(parents=True)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    if top_level:
        (info / "top_level.txt").write_text("onnxruntime\n")


@pytest.mark.parametrize("top_level", [True, False])
@pytest.mark.parametrize("build_info", [True, False])
@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("onnxruntime", False),
        ("onnxruntime-gpu", False),
        ("onnxruntime-webgpu", False),
        ("onnxruntime-training", True),
        ("onnxruntime-training-cpu", True),
    ],
)
def test_the_owner_of_the_module_is_found_without_importing_it(
    tmp_path, name, training, top_level, build_info
):
    install(tmp_path, name, "1.19.2", training=training, top_level=top_level, build_info=build_info)
    assert find_onnxruntime([str(tmp_path)]) == OnnxRuntimeInstall(name, "1.19.2", training)
    assert find_conflicts([str(tmp_path)]) == []


def test_nothing_installed(tmp_path):
    assert find_onnxruntime([str(tmp_path)]) is None
    assert find_conflicts([str(tmp_path)]) == []
    (tmp_path / "onnxruntime").mkdir()  # what an uninstalled package leaves behind
    assert find_onnxruntime([str(tmp_path)]) is None


def test_two_distributions_are_a_conflict_and_the_files_say_who_won(tmp_path):
    install(tmp_path, "onnxruntime-training-cpu", "1.19.2", training=True)
    install(tmp_path, "onnxruntime", "1.23.0")
    assert find_conflicts([str(tmp_path)]) == ["onnxruntime", "onnxruntime-training-cpu"]
    assert find_onnxruntime([str(tmp_path)]) == OnnxRuntimeInstall("onnxruntime", "1.23.0", True)


def test_distributions_beside_it_do_not_own_the_module(tmp_path):
    install(tmp_path, "onnxruntime", "1.23.0")
    info = tmp_path / "onnxruntime_extensions-0.13.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime_extensions\nVersion: 0.13\n")
    (info / "top_level.txt").write_text("onnxruntime_extensions\n")
    assert find_conflicts([str(tmp_path)]) == []


def test_importable_or_not(tmp_path, monkeypatch):
    assert is_importable("json")
    assert not is_importable("no_such_module_anywhere")
    (tmp_path / "leftover_directory").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_importable("leftover_directory")
    monkeypatch.setitem(sys.modules, "made_by_hand", type(sys)("made_by_hand"))
    assert is_importable("made_by_hand")


def test_versions():
    assert version_of("click")
    assert version_of("no-such-distribution-anywhere") is None


# --- machine -------------------------------------------------------------------------------------


def machine(root, cgroup, limits, meminfo="MemTotal:  2048 kB\nMemAvailable: 1024 kB\n"):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(cgroup)
    for place, value in limits.items():
        path = root / "sys/fs/cgroup" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return read_memory(root)


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": 4096}, 4096),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 8192, "memory.max": 9000}, 8192),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "max"}, None),
        ("4:cpu:/x\n7:memory:/box\n", {"memory/box/memory.limit_in_bytes": 5000}, 5000),
        ("7:memory:/box\n", {"memory/box/memory.limit_in_bytes": 9223372036854771712}, None),
        ("7:memory:/gone\n", {"memory/memory.limit_in_bytes": 6000}, 6000),
        ("nonsense\n", {}, None),
    ],
)
def test_the_tightest_cgroup_limit_counts(tmp_path, cgroup, limits, expected):
    memory = machine(tmp_path, cgroup, limits)
    assert (memory.total, memory.available) == (2048 * 1024, 1024 * 1024)
    assert memory.cgroup_limit == expected


def test_a_system_without_proc_is_no_error(tmp_path):
    memory = read_memory(tmp_path)
    assert (memory.total, memory.available, memory.cgroup_limit) == (None, None, None)


def test_the_store_is_judged_by_its_nearest_parent(tmp_path):
    report = examine_store(tmp_path / "a" / "b")
    assert (report.exists, report.writable) == (False, True)
    assert report.free > 0
    (tmp_path / "file").write_text("")
    assert examine_store(tmp_path / "file" / "store").writable is False
    assert examine_store(tmp_path).exists is True


def script(tmp_path, body):
    """A stand-in for the Python that imports onnxruntime."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_probe_that_answers(tmp_path):
    executable = script(tmp_path, """echo noise; echo '["CUDAExecutionProvider", "CPUExecutionProvider"]'""")
    assert probe_providers(executable) == (("CUDAExecutionProvider", "CPUExecutionProvider"), None)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("kill -4 $$", "signal 4"),
        ("echo 'ImportError: libcuda.so.1: cannot open' >&2; exit 1", "libcuda"),
        ("exit 1", "no message"),
        ("exit 0", "no message"),
    ],
)
def test_a_probe_that_fails_says_why(tmp_path, body, problem):
    providers, actual = probe_providers(script(tmp_path, body))
    assert providers == ()
    assert problem in actual


def test_a_probe_that_hangs_or_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module, "PROBE_SECONDS", 0.2)
    assert "timed out" in probe_providers(script(tmp_path, "exec sleep 30"))[1]
    assert "could not be tried" in probe_providers(str(tmp_path / "missing"))[1]


# --- engines and bundle --------------------------------------------------------------------------


def with_runtime(monkeypatch, found, problem=None, conflicts=()):
    providers = () if problem else ("CPUExecutionProvider",)
    monkeypatch.setattr(doctor_module, "find_onnxruntime", lambda: found)
    monkeypatch.setattr(doctor_module, "find_conflicts", lambda: list(conflicts))
    monkeypatch.setattr(doctor_module, "probe_providers", lambda: (providers, problem))


@pytest.mark.parametrize(
    ("found", "problem", "available", "reason"),
    [
        (OnnxRuntimeInstall("onnxruntime-training-cpu", "1.19.2", True), None, [True, True], None),
        (OnnxRuntimeInstall("onnxruntime", "1.23.0", False), None, [False, True], "no training interface"),
        (OnnxRuntimeInstall("onnxruntime", "1.23.0", False), "crashes here", [False, False], "crashes here"),
        (None, None, [False, False], "not installed"),
    ],
)
def test_an_engine_that_is_not_available_says_why_and_how_to_get_it(
    tmp_path, monkeypatch, found, problem, available, reason
):
    with_runtime(monkeypatch, found, problem)
    report = examine(tmp_path)
    assert [engine.name for engine in report.engines] == ["ort-training", "ort-step", "executorch"]
    assert [engine.available for engine in report.engines[:2]] == available
    assert all((engine.reason is None) == engine.available for engine in report.engines)
    assert reason is None or reason in report.engines[0].reason
    assert all(engine.install.startswith("pip install 'edge-tcur-runtime[") for engine in report.engines)
    assert "pip install" in render(report)


def test_what_executorch_lacks_is_told(tmp_path, monkeypatch):
    with_runtime(monkeypatch, None)
    monkeypatch.setattr(doctor_module, "executorch_problem", lambda: "its Python needs torch")
    report = examine(tmp_path)
    assert (report.engines[2].available, report.engines[2].reason) == (False, "its Python needs torch")
    assert "edge-tcur-runtime[executorch]' (brings torch)" in render(report)


def test_executorch_is_found_without_importing_it(tmp_path):
    assert executorch_problem([str(tmp_path)]) == "ExecuTorch is not installed"
    (tmp_path / "executorch" / "extension" / "training").mkdir(parents=True)
    assert "needs torch, which is not installed" in executorch_problem([str(tmp_path)])
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
    assert executorch_problem([str(tmp_path)]) is None


def test_a_conflict_is_told(tmp_path, monkeypatch):
    with_runtime(monkeypatch, None, conflicts=("onnxruntime", "onnxruntime-gpu"))
    assert "CONFLICT" in render(examine(tmp_path))


def write_bundle(root, graphs):
    root.mkdir()
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    manifest = Manifest(
        base_digest="sha256:base", files={n: FileEntry(len(c), digest_bytes(c)) for n, c in FILES.items()},
        graphs=graphs, inputs={}, groups={}, tensors={}, extras={}, task="text-classification", labels=(),
        preprocessing={}, opset=17, ir_version=9,
    )  # fmt: skip
    (root / "manifest.json").write_bytes(serialize_manifest(manifest))
    return root


ALL = tuple(EngineReport(name, True, None, "") for name in ENGINES)


def test_the_doctor_knows_every_engine():
    assert tuple(doctor_module.INSTALL) == tuple(ENGINES)


def test_a_whole_bundle_and_the_engines_that_can_use_it(tmp_path):
    root = write_bundle(tmp_path / "bundle", {"infer": "infer.onnx", "step": "step.onnx"})
    report = examine_bundle(root, ALL)
    assert (report.ok, report.problem, report.predict) == (True, None, True)
    assert report.graphs == ("infer", "step")
    assert report.engines == ("ort-step",)
    assert examine_bundle(root, ()).engines == ()


def test_a_damaged_bundle_is_refused_with_its_exit_code(tmp_path):
    root = write_bundle(tmp_path / "bundle", {"infer": "infer.onnx"})
    (root / "base.bin").write_bytes(b"weightz")
    report = examine_bundle(root, ALL)
    assert (report.ok, report.exit_code) == (False, 6)
    assert "base.bin" in report.problem
    (root / "manifest.json").unlink()
    report = examine_bundle(root, ALL)
    assert report.exit_code == 3
    assert "export, copy or fetch it again" in report.problem


# --- the command ---------------------------------------------------------------------------------


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(device, ["doctor", *map(str, arguments)])
    return caught.value.code, capsys.readouterr().out


def test_the_command_in_both_modes(tmp_path, capsys, monkeypatch):
    with_runtime(monkeypatch, OnnxRuntimeInstall("onnxruntime", "1.23.0", False))
    root = write_bundle(tmp_path / "bundle", {"infer": "infer.onnx", "step": "step.onnx"})
    code, out = command(capsys, "--store", tmp_path / "store", "--bundle", root)
    assert code == 0
    for text in (
        "onnxruntime 1.23.0, without training",
        "every digest matches",
        "ort-step",
        str(tmp_path / "store"),
    ):
        assert text in out
    code, out = command(capsys, "--store", tmp_path / "store", "--bundle", root, "--json")
    report = json.loads(out)
    assert (code, report["schema_version"], report["bundle"]["ok"]) == (0, 1, True)
    assert report["torch_importable"] in (True, False)
    assert report["memory"]["total"] > 0
    assert report["store"]["exists"] is False
    assert not (tmp_path / "store").exists()


def test_the_command_with_a_refused_bundle(tmp_path, capsys, monkeypatch):
    with_runtime(monkeypatch, None)
    root = write_bundle(tmp_path / "bundle", {"infer": "infer.onnx"})
    (root / "infer.onnx").unlink()
    code, out = command(capsys, "--store", tmp_path, "--bundle", root)
    assert code == 6
    assert "REFUSED" in out
    code, out = command(capsys, "--store", tmp_path, "--bundle", root, "--json")
    assert (code, json.loads(out)["bundle"]["exit_code"]) == (6, 6)


def test_the_real_doctor_imports_neither_torch_nor_onnxruntime(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom edge_tcur_runtime.doctor import examine, render\n"
        "print(render(examine(Path(sys.argv[1]))))\n"
        "print([name for name in ('torch', 'onnxruntime', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"
