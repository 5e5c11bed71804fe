"""`edge-tcur-device` as a user runs it: processes of their own in which torch cannot be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.formats.adapter import Adapter, read_adapter, write_adapter
from edge_tcur_runtime.formats.bundle import MANIFEST
from edge_tcur_runtime.formats.factors import Factors
from edge_tcur_runtime.installed import find_onnxruntime

DATA = Path(__file__).parents[1] / "data"
V1, USER, ADAPTER = DATA / "bundle-v1", DATA / "user.npz", DATA / "adapter-v1.safetensors"
COMMAND = "import sys; sys.modules['torch'] = None; from edge_tcur_runtime.cli import main; main()"
INSTALLED = find_onnxruntime()

pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")


@dataclass(frozen=True)
class Done:
    """What a process left: exit code, both outputs, and with ``--json`` the one object on stdout."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self):
        return self.json["error"]


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def device(tmp_path, store):
    def call(*arguments, code=0):
        environment = {**os.environ, "EDGE_TCUR_STORE": str(store), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *map(str, arguments)],
            capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def broken(tmp_path):
    """A bundle with one flipped bit in the base."""
    root = shutil.copytree(V1, tmp_path / "broken")
    raw = bytearray((root / "base.bin").read_bytes())
    raw[1000] ^= 1
    (root / "base.bin").write_bytes(raw)
    return root


def foreign(path):
    """An adapter file of another base."""
    own = read_adapter(ADAPTER)
    write_adapter(path, replace(own, header=replace(own.header, base_digest="sha256:" + "0" * 64)))
    return path


def personalize(device, *arguments, **options):
    return device("personalize", V1, "--data", USER, "--threads", "1", "--json", *arguments, **options)


# --- predict ---------------------------------------------------------------------------------------


def test_predict_prints_one_json_object(device):
    result = device("predict", V1, "--data", USER, "--adapter", "bundle", "--json").json
    assert set(result) == {
        "schema_version", "task", "labels", "predictions", "metric", "score", "accuracy", "adapter",
        "passed_over",
    }  # fmt: skip
    assert result["schema_version"] == 1
    assert result["labels"] == ["0", "1", "2", "3"]
    assert len(result["predictions"]) == 80
    for item in result["predictions"]:
        assert set(item) == {"label", "scores"}
        assert sum(item["scores"]) == pytest.approx(1, abs=1e-4)
    assert result["accuracy"] < 0.3


def test_predict_shows_people_a_table_and_the_accuracy(device):
    done = device("predict", V1, "--data", USER)
    lines = done.out.splitlines()
    assert lines[0].split() == ["sample", "label", "score"]
    assert len(lines) == 2 + 20 + 2
    assert "user.npz[0]" in lines[2]
    assert lines[-2] == "and 60 more (all of them with --json)"
    assert lines[-1].startswith("accuracy ")
    assert lines[-1].endswith("% of 80 samples")
    assert done.err == ""


def test_predict_with_packed_weights_answers_the_same(device):
    options = ("predict", V1, "--data", USER, "--adapter", "bundle", "--json")
    plain, packed = (device(*options, *more).json["predictions"] for more in ((), ("--prepack",)))
    assert [one["label"] for one in packed] == [one["label"] for one in plain]


def test_predict_answers_data_without_labels(device, tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.zeros((3, 8, 8), np.uint8))
    assert device("predict", V1, "--data", "plain.npz", "--json").json["accuracy"] is None
    assert "accuracy" not in device("predict", V1, "--data", "plain.npz").out


def test_predict_names_a_file_like_an_adapter_of_the_store(device, tmp_path):
    shutil.copyfile(ADAPTER, tmp_path / "mine.safetensors")
    by_file, by_bundle = (
        device("predict", V1, "--data", USER, "--adapter", ref, "--json").json["predictions"]
        for ref in ("mine.safetensors", "bundle")
    )
    assert by_file == by_bundle


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "message"),
    [
        (("predict", V1), 2, "usage", "give either --text or --data"),
        (("predict", V1, "--data", USER, "--text", "x"), 2, "usage", "give either --text or --data"),
        (("predict", V1, "--text", "x"), 2, "usage", "answers images"),
        (("predict", V1, "--data", USER, "--adapter", "nobody"), 3, "bad-input", "no store of adapters"),
        (
            ("predict", V1, "--data", USER, "--adapter", "a.safetensors"),
            3,
            "bad-input",
            "cannot read: No such file",
        ),
        (
            ("predict", V1, "--data", USER, "--adapter", "some/file"),
            3,
            "bad-input",
            "cannot read: No such file",
        ),
        (("predict", V1, "--data", USER, "--adapter", "x" * 300), 3, "bad-input", "no store of adapters"),
        (("predict", V1, "--data", USER, "--adapter", f"{USER}"), 3, "bad-format", "header"),
        (("predict", V1, "--data", USER, "--adapter", f"{V1}"), 3, "bad-input", "not a regular file"),
        (("predict", V1, "--data", "none.npz"), 3, "bad-data", "cannot read"),
        (("predict", V1, "--data", V1 / MANIFEST), 3, "bad-data", "not a form of image data"),
        (("predict", DATA, "--data", USER), 3, "bad-input", "cannot read"),
        (("personalize", V1, "--data", USER, "--epochs", "0"), 3, "bad-config", "expected at least 1"),
        (("personalize", V1, "--data", USER, "--threads", "-2"), 3, "bad-config", "expected at least 0"),
        (
            ("personalize", V1, "--data", USER, "--learning-rate", "nan"),
            3,
            "bad-config",
            "above 0 and below 100",
        ),
        (("personalize", V1, "--data", USER, "--weight-decay", "-1"), 3, "bad-config", "expected at least 0"),
        (("personalize", V1, "--data", USER, "--seed", "-1"), 3, "bad-config", "expected at least 0"),
        (("personalize", V1, "--data", USER, "--name", "../a"), 2, "usage", "cannot be the name"),
        (("personalize", V1, "--data", USER, "--budget", "64MB"), 2, "usage", "64MB"),
        (("personalize", V1, "--data", USER, "--budget", "1MiB"), 5, "budget", "cannot be met"),
        (("personalize", V1, "--data", USER, "--engine", "torch"), 2, "usage", "torch"),
        (("personalize", V1), 2, "usage", "--data"),
        (("adapters", "compare", V1, "--data", USER), 2, "usage", "--adapter"),
        (("doctor", "--bundle", "nowhere"), 3, "bad-input", "does not exist"),
        (("predict", "nowhere", "--data", USER), 3, "bad-input", "does not exist"),
        (("predict", V1, "--data", USER, "--store", USER), 3, "bad-input", "not a directory"),
        (("adapters", "install", "nothing.safetensors"), 3, "bad-input", "does not exist"),
    ],
)
def test_every_mistake_has_its_exit_code_and_one_json_object(device, store, arguments, code, kind, message):
    done = device(*arguments, "--json", code=code)
    assert done.error["code"] == kind
    assert done.error["exit_code"] == code
    assert message in done.error["message"]
    assert "Traceback" not in done.err
    assert list(store.rglob("*")) == []


def test_an_adapter_of_another_base_has_exit_code_4(device, tmp_path):
    path = foreign(tmp_path / "foreign.safetensors")
    given = V1, "--data", USER
    for command in (
        ("predict", *given, "--adapter"),
        ("personalize", *given, "--start"),
        ("adapters", "compare", *given, "--adapter"),
    ):
        done = device(*command, path, "--json", code=4)
        assert done.error["code"] == "base-mismatch"
        assert "sha256:0000" in done.error["message"]
        assert "sha256:602d2cf7" in done.error["message"]
    done = device("predict", V1, "--data", USER, "--adapter", path, code=4)
    assert done.out == ""
    assert done.err.startswith("error: the adapter was made for the base sha256:0000")
    assert "\n  hint: " in done.err


def test_a_flipped_bit_in_the_base_has_exit_code_6_everywhere(device, broken, store):
    for command in (("predict", broken, "--data", USER), ("personalize", broken, "--data", USER),
                    ("adapters", "compare", broken, "--data", USER, "--adapter", "base")):  # fmt: skip
        done = device(*command, "--json", code=6)
        assert done.error["code"] == "integrity"
        assert done.error["where"] == str(broken / "base.bin")
        assert "altered" in done.error["message"]
    assert list(store.rglob("*")) == []
    result = device("doctor", "--bundle", broken, "--json", code=6).json
    assert result["bundle"]["ok"] is False
    assert "altered" in result["bundle"]["problem"]


def test_a_directory_without_a_manifest_has_exit_code_3_and_says_what_to_do(device, tmp_path):
    hint = (
        "is it a bundle, the directory that 'edge-tcur export' wrote? If so, export, copy or fetch it again"
    )
    error = device("predict", tmp_path, "--data", USER, "--json", code=3).error
    assert (error["where"], error["hint"]) == (str(tmp_path / MANIFEST), hint)
    result = device("doctor", "--bundle", tmp_path, "--json", code=3).json
    assert hint in result["bundle"]["problem"]


def test_a_flipped_bit_in_an_adapter_has_exit_code_6(device, tmp_path):
    raw = bytearray(ADAPTER.read_bytes())
    raw[-1] ^= 1
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    assert (
        device("predict", V1, "--data", USER, "--adapter", path, "--json", code=6).error["code"]
        == "integrity"
    )


def test_a_newer_adapter_has_exit_code_4(device, tmp_path):
    raw = ADAPTER.read_bytes()
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw.replace(b'format_version\\":1', b'format_version\\":7'))
    error = device("predict", V1, "--data", USER, "--adapter", path, "--json", code=4).error
    assert error["code"] == "format-version"
    assert "version 7 is newer than 1" in error["message"]


# --- personalize -----------------------------------------------------------------------------------


RESULT = {
    "schema_version", "better", "accuracy_before", "accuracy_after", "losses", "accuracies", "engine",
    "metric", "score_before", "score_after", "loss_before", "loss_after", "scores",
    "engine_reason", "micro_batch", "step_seconds", "seconds", "peak_rss_bytes", "budget_bytes", "samples",
    "holdout_samples", "base_digest_before", "base_digest_after", "installed", "trained_numbers",
    "head_numbers", "graph", "resumed_from", "notes", "predicted_peak_bytes", "provider", "provider_reason",
    "judged_by", "threads", "verdict", "withheld", "installed_as", "held_out_losses", "kept_epoch",
    "stopped_early", "reference", "privacy", "training", "in_use",
}  # fmt: skip


def test_personalize_prints_one_json_object_and_puts_the_better_adapter_in_use(device, store):
    done = personalize(device, "--budget", "1GiB")
    result = done.json
    assert set(result) == RESULT
    assert done.err == ""
    assert result["better"] is True
    assert result["accuracy_before"] < 0.3 < 0.8 < result["accuracy_after"]
    assert result["base_digest_before"] == result["base_digest_after"]
    assert result["peak_rss_bytes"] <= result["budget_bytes"] == 2**30
    assert (result["trained_numbers"], result["head_numbers"]) == (108, 0)
    assert result["installed"].startswith("sha256:")
    answered = device("predict", V1, "--data", USER, "--json").json
    assert answered["accuracy"] > 0.8
    base = device("predict", V1, "--data", USER, "--adapter", "base", "--json").json
    assert base["accuracy"] < 0.3
    (kept,) = store.glob("adapters/*.safetensors")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert read_adapter(kept).header.provenance["personal"] == "true"


def test_personalize_tells_people_what_it_did(device):
    done = device("personalize", V1, "--data", USER, "--threads", "1", "--name", "mine")
    for word in ("engine", "held-out accuracy", "trained numbers", "peak memory", "unchanged"):
        assert word in done.out
    assert "108 + head 0" in done.out
    assert "installed as 'mine': sha256:" in done.out
    assert done.err == ""  # no bars where stderr is no terminal
    assert device("personalize", V1, "--data", USER, "--epochs", "1", "--quiet").out == ""


def test_keeping_the_active_adapter_installs_and_leaves_it_in_use(device):
    result = personalize(device, "--keep-active", "--name", "mine").json
    assert result["installed"]
    in_use, mine = (
        device("predict", V1, "--data", USER, "--adapter", ref, "--json").json["accuracy"]
        for ref in ("active", "mine")
    )
    assert in_use < 0.3 < 0.8 < mine


def test_an_adapter_that_is_not_better_is_not_installed(device, store):
    done = device("personalize", V1, "--data", USER, "--start", "bundle", "--learning-rate", "1e-30")
    assert "not better on what was held out: nothing was installed" in done.out
    assert list(store.rglob("*")) == []


def test_an_adapter_of_another_rank_is_personalised_by_the_step_graph(device, tmp_path):
    own = read_adapter(ADAPTER)
    factors = {
        group: Factors(np.ascontiguousarray(part.core[:, :1, :1]), part.rows[:, :1], part.cols[:, :1])
        for group, part in own.factors.items()
    }
    path = tmp_path / "one.safetensors"
    write_adapter(path, Adapter(own.header, factors))
    result = personalize(device, "--start", path, "--epochs", "2").json
    assert result["engine"] == "ort-step"
    if INSTALLED.training:
        assert "the adapter has rank 1" in result["engine_reason"]
        error = personalize(device, "--start", path, "--engine", "ort-training", code=4).error
        assert "--engine ort-step" in error["hint"]


def test_the_engine_of_this_environment_is_chosen_with_the_reason(device):
    result = personalize(device, "--epochs", "1").json
    if INSTALLED.training:
        assert result["engine"] == "ort-training"
    else:
        assert result["engine"] == "ort-step"
        assert "has no training interface" in result["engine_reason"]
        error = personalize(device, "--engine", "ort-training", code=4).error
        assert error["code"] == "missing-engine"
        assert "edge-tcur-runtime[ort-training]" in error["hint"]


def test_data_that_cannot_be_learnt_from_has_exit_code_3_and_leaves_no_store(device, store, tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    for name, labels, message in (
        ("one", [1, 1, 1, 1], "training needs at least two classes"),
        ("unknown", [0, 1, 2, 9], "unknown label '9'"),
        ("none", [], "the data set is empty"),
    ):
        np.savez(tmp_path / f"{name}.npz", images=images[: len(labels)], labels=np.array(labels, int))
        done = device("personalize", V1, "--data", f"{name}.npz", "--json", code=3)
        assert done.error["code"] == "bad-data"
        assert message in done.error["message"]
    assert list(store.rglob("*")) == []


# --- adapters compare ------------------------------------------------------------------------------


def test_compare_swaps_adapters_in_one_process(device):
    digest = personalize(device).json["installed"]
    refs = ("base", "bundle", "active", "personal", digest, ADAPTER, "base")
    arguments = [word for ref in refs for word in ("--adapter", ref)]
    result = device("adapters", "compare", V1, "--data", USER, *arguments, "--json").json
    assert set(result) == {"schema_version", "samples", "metric", "adapters", "peak_rss_bytes"}
    assert result["samples"] == 80
    assert [item["adapter"] for item in result["adapters"]] == list(map(str, refs))
    assert all(item["swap_ms"] > 0 for item in result["adapters"])
    base, bundle, active, personal, by_digest, file, again = (item["accuracy"] for item in result["adapters"])
    assert base == again < 0.3
    assert bundle == file < 0.3
    assert active == personal == by_digest > 0.8


def test_compare_shows_people_a_table(device):
    done = device("adapters", "compare", V1, "--data", USER, "--adapter", "base", "--adapter", "bundle")
    lines = done.out.splitlines()
    assert lines[0].split() == ["adapter", "accuracy", "swap", "ms"]
    assert [line.split()[0] for line in lines[2:4]] == ["base", "bundle"]
    assert lines[-1].startswith("peak memory ")


# --- doctor ----------------------------------------------------------------------------------------


def test_doctor_verifies_the_bundle_of_version_1(device):
    result = device("doctor", "--bundle", V1, "--json").json
    assert result["schema_version"] == 1
    assert result["bundle"]["ok"] is True
    assert result["bundle"]["predict"] is True
    assert "ort-step" in result["bundle"]["engines"]
    assert ("ort-training" in result["bundle"]["engines"]) == INSTALLED.training
    assert result["torch_importable"] is False
    done = device("doctor", "--bundle", V1)
    assert "whole, every digest matches" in done.out
    assert "REFUSED" not in done.out


def test_doctor_without_a_bundle_never_fails(device):
    assert "ONNX Runtime" in device("doctor").out
    assert device("doctor", "--json").json["bundle"] is None
