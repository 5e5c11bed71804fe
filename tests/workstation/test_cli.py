"""`edge-tcur` as a user runs it: results, JSON, exit codes, and help that imports nothing heavy."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time

import click
import numpy as np
import pytest

from edge_tcur import __version__
from edge_tcur.cli import COMMANDS
from edge_tcur.cli.progress import stage_bar
from edge_tcur_runtime.errors import ExitCode
from edge_tcur_runtime.output import Mode, Sink
from training_runs import GROUP_KEYS, train_arguments


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from edge_tcur.cli import edge_tcur; from edge_tcur_runtime.cli.framework import run\n"
        "try: run(edge_tcur, ['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    )
    out = python(code)
    assert out.splitlines()[-1] == "[]"
    for name, (_, _, short) in COMMANDS.items():
        assert name in out
        assert short.split()[0] in out
    assert out.count("  edge-tcur ") >= 3  # the examples


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "quickstart"])
def test_help_of_a_command_imports_no_torch(command):
    code = (
        "import sys; from edge_tcur.cli import edge_tcur; from edge_tcur_runtime.cli.framework import run\n"
        f"try: run(edge_tcur, [{command!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'rich', 'transformers', 'onnx') if m in sys.modules])"
    )
    started = time.perf_counter()
    out = python(code)
    assert time.perf_counter() - started < 5  # 0.2 s here; the bound only catches a heavy import
    assert out.splitlines()[-1] == "[]"
    for part in ("Examples:", "--json", "--quiet", "--debug"):
        assert part in out


def test_every_command_is_there():
    for module, attribute, _ in COMMANDS.values():
        if attribute != "quickstart":
            command = getattr(__import__(module, fromlist=[attribute]), attribute)
            assert isinstance(command, click.Command)


def test_python_m_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "edge_tcur", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"edge-tcur, version {__version__}"


def test_train_shows_every_setting(cli):
    code, out, _ = cli("train", "--help")
    assert code == 0
    text = " ".join(out.split())
    for option in ("--text-column", "--learning-rate", "--eval-fraction", "--max-length", "--config"):
        assert option in text
    for choices in (
        "[raw|orthonormal|sketch]",
        "[none|layer|all]",
        "[auto|dft|dct|identity]",
        "[norm|squared-norm|inverse-norm|leverage|gradient|update|random]",
    ):
        assert choices in text
    assert "[default: 20]" in text


def test_train_as_json(cli, vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    code, payload, err = cli(*train_arguments(vit_dir, digits_npz, out, "--json"))
    assert (code, err) == (0, "")
    assert set(payload) == {
        "metric", "score", "scores",
        "schema_version", "run", "adapter", "base_digest", "task", "labels", "rank", "groups", "accuracy",
        "trained_numbers", "head_numbers", "adapter_bytes", "samples", "held_out_samples", "seconds",
        "step_seconds", "steps", "losses", "accuracies", "skipped", "notes", "config",
    }  # fmt: skip
    assert payload["adapter_bytes"] == (out / "adapter.safetensors").stat().st_size
    assert payload["trained_numbers"] == sum(group["trained_numbers"] for group in payload["groups"]) == 48
    assert set(payload["groups"][0]) == GROUP_KEYS
    assert payload["skipped"]["module.classifier"] == "not inside a numbered layer"
    assert payload["config"]["rank"] == payload["rank"] == 2


def test_train_for_people(cli, vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    code, text, err = cli(*train_arguments(vit_dir, digits_npz, out, "--targets", "*.q_proj"))
    assert (code, err) == (0, "")
    assert "trained numbers    8" in text
    assert "of 12 held-out samples" in text
    assert "matched by no target pattern" in text
    assert "more (all of them with --json)" in text
    assert text.count("LayerNorm, not a linear layer") == 1  # one line a reason, not one a module
    assert f"next: edge-tcur export {out} --out bundle/" in text
    assert cli(*train_arguments(vit_dir, digits_npz, tmp_path / "two", "--quiet")) == (0, "", "")


def test_the_command_line_is_before_the_file_and_the_file_before_defaults(cli, vit_dir, digits_npz, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(
        f'base = "{vit_dir}"\ndata = "{digits_npz}"\ntask = "image-classification"\n'
        "rank = 3\nepochs = 1\nthreads = 1\nbatch_size = 16\n"
    )
    # --batch-size at its default value was still said by the user
    arguments = ("--config", config, "--rank", 2, "--batch-size", 16, "--out", tmp_path / "run", "--json")
    code, payload, _ = cli("train", *arguments)
    assert code == 0
    resolved = payload["config"]
    assert (resolved["rank"], resolved["epochs"], resolved["batch_size"]) == (2, 1, 16)
    assert (resolved["learning_rate"], resolved["seed"]) == (0.02, 0)


def test_train_refuses(cli, vit_dir, digits_npz, tmp_path):
    usual = train_arguments(vit_dir, digits_npz, tmp_path / "run")

    def code_of(*more, arguments=usual):
        code, out, err = cli(*arguments, *more, "--json")
        assert out["error"]["exit_code"] == code
        assert err.startswith("error: ")
        return code, out["error"]

    assert code_of("--rank", "two")[0] == ExitCode.USAGE
    for option in ("--coupling", "--transform", "--selection", "--frame"):
        assert code_of(option, "other")[0] == ExitCode.USAGE
    code, error = code_of("--grouping", "shap")  # patterns are allowed too, so not one of some choices
    assert (code, error["code"], error["where"]) == (3, "bad-config", "grouping")
    assert error["hint"] == "did you mean 'shape'?"
    code, error = code_of("--transform", "dct")
    assert (code, error["code"], error["where"]) == (3, "bad-config", "transform")
    assert code_of(arguments=("train", "--data", digits_npz, "--out", tmp_path / "run"))[0] == ExitCode.USAGE
    code, error = code_of("--rank", "99")
    assert (code, error["code"], error["where"]) == (3, "bad-config", "rank")
    assert code_of("--learning-rate", "-1")[0] == ExitCode.BAD_INPUT
    assert code_of("--data", tmp_path / "none.npz")[1]["code"] == "bad-data"
    assert code_of("--base", "./none")[1]["code"] == "bad-base"
    assert code_of("--base", "none-such")[0] == ExitCode.NETWORK
    assert code_of("--config", tmp_path / "none.toml")[1]["code"] == "bad-config"
    config = tmp_path / "train.toml"
    config.write_text("epoch = 3\n")
    code, error = code_of("--config", config)
    assert (code, error["where"], error["hint"]) == (3, str(config), "did you mean 'epochs'?")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert code_of("--out", full)[1]["code"] == "output-exists"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "train.toml"]


def test_eval(cli, trained, digits_npz, tmp_path):
    code, payload, err = cli("eval", trained, "--data", digits_npz, "--json")
    assert (code, err) == (0, "")
    assert set(payload) == {
        "metric", "adapter_score", "base_score",
        "schema_version", "run", "adapter", "data", "adapter_accuracy", "base_accuracy", "samples",
    }  # fmt: skip
    assert payload["samples"] == 60
    copy = tmp_path / "other.safetensors"
    shutil.copy(trained / "adapter.safetensors", copy)
    code, text, _ = cli("eval", trained, "--data", digits_npz, "--adapter", copy)
    assert code == 0
    assert f"{payload['adapter_accuracy']:.1%}" in text
    assert "on 60 samples" in text
    assert cli("eval", tmp_path, "--data", digits_npz)[0] == 3
    assert cli("eval", trained, "--data", tmp_path / "none.npz")[0] == 3
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x7f")
    assert cli("eval", trained, "--data", digits_npz, "--adapter", copy)[0] == 6
    assert cli("eval", trained, "--data", digits_npz, "--adapter", tmp_path / "none")[0] == 3


def test_train_along_other_axes(cli, vit_dir, digits_npz, tmp_path):
    """Every setting of the method from the command line, and a file that holds sketches."""
    out = tmp_path / "sketch"
    more = ("--frame", "sketch", "--layers-to-transform", "1", "--rank-pattern", "*.fc1=3", "--alpha", "0.5")
    more += ("--modules-to-save", "module.classifier", "--gradient-batches", "2")
    code, payload, err = cli(*train_arguments(vit_dir, digits_npz, out, *more, "--json"))
    assert (code, err) == (0, "")
    assert {group["name"]: (group["slices"], group["rank"]) for group in payload["groups"]} == {
        **{f"attention.{leaf}_proj": (1, 2) for leaf in "qkvo"},
        "mlp.fc1": (1, 3),
        "mlp.fc2": (1, 2),
    }
    assert not any({"rows", "cols"} & set(group) for group in payload["groups"])
    assert payload["trained_numbers"] == 5 * 4 + 9
    assert payload["head_numbers"] == 3 * 16 + 3
    assert payload["skipped"]["module.classifier"] == "trained in full (modules_to_save)"
    assert payload["skipped"]["module.vit.layers.0.mlp.fc1"] == "not among the layers to transform"
    code, shown, _ = cli("inspect", out, "--json")
    assert (code, shown["adapter"]["frame"], shown["adapter"]["coupling"]) == (0, "sketch", "none")
    assert shown["adapter"]["extras"] == {"module.classifier.weight": [3, 16], "module.classifier.bias": [3]}
    code, text, _ = cli("inspect", out)
    assert code == 0
    assert "t-product (identity), coupling none, frame sketch" in text
    assert text.count("sketch") >= 2 * 6
    code, scores, _ = cli("eval", out, "--data", digits_npz, "--json")
    assert (code, scores["samples"]) == (0, 60)
    code, payload, _ = cli(
        *train_arguments(vit_dir, digits_npz, tmp_path / "run", "--coupling", "all", "--json")
    )
    assert (code, payload["groups"][0]["blocks"]) == (0, 1)
    other = tmp_path / "run" / "adapter.safetensors"
    code, payload, _ = cli("eval", out, "--data", digits_npz, "--adapter", other, "--json")
    assert (code, payload["error"]["code"]) == (4, "incompatible")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(mode):
    with stage_bar(Sink(mode), "loading", total=2) as bar:
        bar.advance(detail="epoch 1")
        bar.stage("training")
        bar.advance()


def test_the_bar_is_only_for_people_at_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, mode, seen in (
        (Terminal(), Mode.HUMAN, True),
        (Terminal(), Mode.JSON, True),
        (Terminal(), Mode.QUIET, False),
        (io.StringIO(), Mode.HUMAN, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        show(mode)
        assert bool(stream.getvalue()) is seen
        if seen:
            assert "training" in stream.getvalue()


def test_a_text_with_no_label_names_its_line(cli, bert_dir, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\nwhere is my card,card\nsend money,\n")
    code, out, _ = cli(
        "train", "--base", bert_dir, "--data", path, "--out", tmp_path / "run", "--threads", "1", "--json"
    )
    assert (code, out["error"]["where"]) == (3, f"{path}:3")


def test_losses_are_numbers_in_json(trained):
    losses = json.loads((trained / "run.json").read_text())["metrics"]["losses"]
    assert np.isfinite(losses).all()


def test_a_preset_sets_the_axes_and_single_settings_override_it(cli, vit_dir, digits_npz, tmp_path):
    arguments = train_arguments(vit_dir, digits_npz, tmp_path / "run", "--preset", "paper", "--json")
    code, result, err = cli(*arguments, "--frame", "orthonormal")
    assert code == 0, err
    axes = {
        name: result["config"][name] for name in ("grouping", "coupling", "transform", "selection", "frame")
    }
    assert axes == {
        "grouping": "shape",
        "coupling": "all",
        "transform": "dft",
        "selection": "norm",
        "frame": "orthonormal",
    }
    assert {group["blocks"] for group in result["groups"]} == {1}


def test_a_budget_of_numbers_is_shared_out_and_the_run_can_be_scored(cli, vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    code, result, err = cli(*train_arguments(vit_dir, digits_npz, out, "--rank-budget", "150", "--json"))
    assert code == 0, err
    ranks = [group["rank"] for group in result["groups"]]
    assert result["trained_numbers"] == sum(rank * rank for rank in ranks) <= 150
    assert len(ranks) == 12
    assert len(set(ranks)) > 1
    code, scored, err = cli("eval", out, "--data", digits_npz, "--json")
    assert code == 0, err
    assert scored["samples"] == 60


def test_a_budget_needs_gradients_of_single_weights(cli, vit_dir, digits_npz, tmp_path):
    arguments = train_arguments(vit_dir, digits_npz, tmp_path / "run", "--rank-budget", "150")
    code, _, err = cli(*arguments, "--selection", "random")
    assert code == 3
    assert "say coupling none and selection gradient" in err
    assert cli(*train_arguments(vit_dir, digits_npz, tmp_path / "run", "--rank-budget", "5"))[0] == 3
