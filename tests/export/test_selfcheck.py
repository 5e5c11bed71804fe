"""The self-check of a provider, with a provider that computes one operator wrongly.

The wrong one is a real session over a changed graph: every node of one type is followed by a factor, where it
is not pinned to the CPU.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edge_tcur_runtime.engines import selfcheck
from edge_tcur_runtime.engines.checks import Fault, Verdict, differs, distance, examine
from edge_tcur_runtime.engines.providers import (
    ON_CPU,
    PROVIDERS,
    available,
    can_pin,
    find_provider,
    require_provider,
)
from edge_tcur_runtime.engines.selfcheck import (
    asked,
    best,
    cached_check,
    check_apart,
    choose_provider,
    notes_of,
)
from edge_tcur_runtime.engines.session import import_onnxruntime, open_session
from edge_tcur_runtime.errors import IncompatibleError, MissingEngineError, UsageError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.installed import find_onnxruntime

WEBGPU, XNNPACK = PROVIDERS["webgpu"], PROVIDERS["xnnpack"]
RIGHT = Verdict("webgpu", 10, error=1e-7, seconds_cpu=1.0, seconds=0.1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle of format version 1, with checks of its graphs written anew."""
    from dataclasses import replace

    import safetensors.numpy

    from edge_tcur_export.operator_checks import write_checks
    from edge_tcur_runtime.formats.adapter import read_adapter
    from edge_tcur_runtime.formats.bundle import MANIFEST, FileEntry, serialize_manifest
    from edge_tcur_runtime.formats.digest import digest_file

    source = Path(__file__).parents[1] / "data" / "bundle-v1"
    root = tmp_path_factory.mktemp("selfcheck") / "bundle"
    root.mkdir()
    for path in source.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    manifest = open_bundle(root).manifest
    inputs = safetensors.numpy.load_file(root / manifest.canary)
    feeds = {name[6:]: value for name, value in inputs.items() if name.startswith("input.")}
    feeds |= read_adapter(root / manifest.adapter).feeds()
    feeds["labels"] = np.zeros(len(next(iter(feeds.values()))), np.int64)
    name = write_checks(root, manifest.graphs, feeds)
    entry = FileEntry((root / name).stat().st_size, digest_file(root / name))
    manifest = replace(
        manifest, files={**manifest.files, name: entry}, graphs={**manifest.graphs, "checks": name}
    )
    (root / MANIFEST).write_bytes(serialize_manifest(manifest))
    return open_bundle(root)


def wrong(operator, factor=1.5):
    """Opens sessions; where the CPU is not asked for, nodes of `operator` that are not pinned are wrong."""

    def opener(path, *, placement=ON_CPU, **more):
        if placement.provider.name == "cpu":
            return open_session(path, **more)
        model = onnx.load(str(path), load_external_data=False)
        added = []
        for node in model.graph.node:
            added.append(node)
            if node.op_type == operator and node.name not in placement.pinned:
                result, node.output[0] = node.output[0], f"{node.output[0]}.right"
                added.append(helper.make_node("Mul", [node.output[0], "wrong.factor"], [result]))
        del model.graph.node[:]
        model.graph.node.extend(added)
        model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "wrong.factor"))
        copy = path.with_name(f"{path.name}.wrong.onnx")
        copy.write_bytes(model.SerializeToString())
        try:
            return open_session(copy, **{**more, "files": None})  # another graph than the manifest's
        finally:
            copy.unlink()

    return opener


def nodes_of(bundle, operator):
    graph = onnx.load(str(bundle.graph("step")), load_external_data=False).graph
    return {node.name for node in graph.node if node.op_type == operator}


def test_a_provider_that_computes_as_the_cpu_is_trusted(bundle):
    verdict = examine(bundle, WEBGPU, ("step",), 1, wrong("NoSuchOperator"))
    assert verdict.problem is None
    assert not verdict.faults
    assert not verdict.pinned
    assert verdict.checked > 50
    assert verdict.error == 0.0


@pytest.mark.parametrize("operator", ["Softmax", "Erf", "LayerNormalization"])
def test_a_wrong_operator_is_named_and_pinned_to_the_cpu(bundle, operator):
    verdict = examine(bundle, WEBGPU, ("step",), 1, wrong(operator))
    assert {fault.operator for fault in verdict.faults} == {operator}
    assert set(verdict.pinned) == nodes_of(bundle, operator)
    assert verdict.problem is None
    assert verdict.error == 0.0
    choice = asked(verdict)
    assert choice.placement.pinned == verdict.pinned
    assert operator in choice.notes[0]
    assert "run on the CPU" in choice.notes[0]


def test_a_provider_that_cannot_pin_is_not_used(bundle):
    verdict = examine(bundle, XNNPACK, ("step",), 1, wrong("Softmax"))
    assert "no way to keep them" in verdict.problem
    choice = asked(verdict)
    assert choice.placement == ON_CPU
    assert "not xnnpack" in choice.reason
    assert "Softmax" in choice.notes[0]
    assert "not used" in choice.notes[0]


def test_pins_that_do_not_help_are_found_out_by_the_whole_pass(bundle):
    faulty = wrong("Softmax")

    def deaf(path, *, placement=ON_CPU, **more):  # takes the pins and ignores them
        return faulty(path, placement=placement.__class__(placement.provider), **more)

    verdict = examine(bundle, WEBGPU, ("step",), 1, deaf)
    assert verdict.pinned
    assert "whole pass is wrong" in verdict.problem
    assert asked(verdict).placement == ON_CPU


def test_a_bundle_without_checks_is_judged_by_the_pass_alone(bundle):
    old = open_bundle(Path(__file__).parents[1] / "data" / "bundle-v1")
    right, bad = (examine(old, WEBGPU, ("step",), 1, wrong(name)) for name in ("Nothing", "MatMul"))
    assert right.problem is None
    assert right.checked == 0
    assert "export it again" in notes_of(right)[0]
    assert "whole pass is wrong" in bad.problem


def test_a_run_that_fails_is_a_verdict(bundle):
    def opener(path, *, placement=ON_CPU, **more):
        if placement.provider.name != "cpu":
            raise IncompatibleError("the provider 'webgpu' does not start here")
        return open_session(path, **more)

    assert "does not start" in examine(bundle, WEBGPU, ("step",), 1, opener).problem


def test_the_process_of_its_own_says_what_this_one_would(bundle):
    verdict = check_apart(bundle, PROVIDERS["cpu"], ("step",), 1)
    assert verdict.problem is None
    assert verdict.error == 0.0
    assert verdict.checked > 50


@pytest.mark.parametrize(
    ("code", "reason"), [("import os; os.kill(os.getpid(), 11)", "signal 11"), ("raise ValueError('x')", "x")]
)
def test_a_crash_is_a_verdict(bundle, tmp_path, monkeypatch, code, reason):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {selfcheck.sys.executable} -c "{code}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(selfcheck.sys, "executable", str(program))
    assert reason in check_apart(bundle, WEBGPU, ("step",), 1).problem


def test_a_provider_that_never_starts_ends_on_the_cpu(bundle, monkeypatch):
    """ONNX Runtime itself would go on without a word: this build has no WebGPU."""
    monkeypatch.setattr(selfcheck, "require_provider", lambda *_: WEBGPU)
    choice = choose_provider("webgpu", bundle, ("step",), threads=1)
    assert choice.placement == ON_CPU
    assert "not webgpu" in choice.reason


def test_auto_takes_the_faster_one_that_is_trusted():
    slow = Verdict("coreml", 10, error=1e-7, seconds_cpu=1.0, seconds=0.95)
    bad = Verdict("cuda", 10, (Fault("Erf", "off by 0.5", ("a",)),), problem="it cannot keep them on the CPU")
    choice = best([bad, slow, RIGHT])
    assert choice.placement.provider == WEBGPU
    assert "0.1 s" in choice.reason
    assert "Erf" in choice.notes[0]
    stays = best([bad, slow])
    assert stays.placement == ON_CPU
    assert "not faster" in stays.reason
    assert "not cuda" in stays.reason


def test_where_only_the_cpu_is_there_nothing_is_checked(bundle):
    check = lambda *_: pytest.fail("checked")  # noqa: E731
    if available(import_onnxruntime()) == ("cpu",):
        choice = choose_provider("auto", bundle, ("step",), check=check)
        assert choice.placement == ON_CPU
        assert "only provider" in choice.reason
    assert choose_provider("cpu", bundle, ("step",), check=check).placement == ON_CPU


def test_unknown_and_missing_providers_are_refused():
    with pytest.raises(UsageError, match="webgpu"):
        find_provider("vulkan")
    with pytest.raises(MissingEngineError) as caught:
        require_provider("tensorrt", import_onnxruntime(), find_onnxruntime())
    assert "onnxruntime-gpu" in caught.value.hint


def test_a_verdict_is_kept_for_a_bundle_and_a_library(bundle, tmp_path, monkeypatch):
    calls = []

    def check(*_):
        calls.append(1)
        return RIGHT

    cache = tmp_path / "selfcheck.json"

    def ask():
        assert cached_check(bundle, WEBGPU, ("step",), 1, cache, check) == RIGHT
        return len(calls)

    assert [ask(), ask()] == [1, 1]
    monkeypatch.setenv("VK_ICD_FILENAMES", "another driver")
    assert ask() == 2
    cache.write_text('{"x": 1}')
    assert ask() == 3
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {**entry, "time": 0} for key, entry in known.items()}))
    assert ask() == 4


def test_pins_longer_than_a_session_takes_are_refused():
    assert can_pin(WEBGPU, ("node",))
    assert not can_pin(WEBGPU, ("n" * 100,) * 100)
    assert not can_pin(XNNPACK, ("node",))


def test_numbers_are_compared_as_their_type_needs():
    x = np.asarray([1.0, -np.inf, np.nan], np.float32)
    assert differs(x, x) is None
    assert distance(x, x) == 0.0
    assert "infinity" in differs(np.nan_to_num(x), x)
    assert differs(np.float32([1.0005, 1.0]), np.float32([1.0, 1.0])) is None
    assert "off by" in differs(np.float32([1.01, 1.0]), np.float32([1.0, 1.0]))
    assert "1 of 2" in differs(np.int64([1, 2]), np.int64([1, 3]))
    assert differs(np.float32([1]), np.float32([[1]])) is not None
