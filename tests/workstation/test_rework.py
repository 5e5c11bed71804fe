"""`edge-tcur combine`, `merge`, `migrate` and `reduce` on a small Vision Transformer."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_tcur_runtime.formats.adapter import read_adapter

TASK = ("--task", "image-classification")


@pytest.fixture(scope="module")
def runs(vit_dir, digits_npz, tmp_path_factory):
    """Two runs with the same rows and columns, and other cores."""
    from edge_tcur.settings import TrainConfig
    from edge_tcur.training.train import train

    root = tmp_path_factory.mktemp("runs")
    for name, rate in (("one", 0.02), ("two", 0.05)):
        config = TrainConfig(
            base=str(vit_dir),
            data=str(digits_npz),
            task=TASK[1],
            rank=3,
            epochs=3,
            threads=1,
            selection="squared-norm",
            learning_rate=rate,
        )
        train(config, root / name)
    return root


@pytest.fixture(scope="module")
def newer(vit_dir, tmp_path_factory):
    """A later version of the base: every weight a little different."""
    folder = tmp_path_factory.mktemp("newer") / "vit"
    shutil.copytree(vit_dir, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        weights[name] = value + 0.002 * torch.randn(value.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def score(cli, run, data, *more):
    code, result, _ = cli("eval", run, "--data", data, "--json", *more)
    assert code == 0
    return result


def test_the_mean_of_two_adapters(cli, runs, digits_npz, tmp_path):
    paths = [runs / name / "adapter.safetensors" for name in ("one", "two")]
    code, result, _ = cli("combine", *paths, "--out", tmp_path / "mean.safetensors", "--json")
    assert code == 0
    assert result["weights"] == dict.fromkeys(map(str, paths), 0.5)
    one, two, mean = (read_adapter(path) for path in (*paths, tmp_path / "mean.safetensors"))
    for name, factors in mean.factors.items():
        expected = (one.factors[name].core + two.factors[name].core) / 2
        np.testing.assert_allclose(factors.core, expected, rtol=1e-6)
    score(cli, runs / "one", digits_npz, "--adapter", tmp_path / "mean.safetensors")


def test_an_adapter_minus_itself_is_the_base(cli, runs, digits_npz, tmp_path):
    path, out = runs / "one" / "adapter.safetensors", tmp_path / "zero.safetensors"
    code, _, _ = cli("combine", f"{path}=1", f"{path}=-1", "--out", out)
    assert code == 0
    result = score(cli, runs / "one", digits_npz, "--adapter", out)
    assert result["adapter_accuracy"] == result["base_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("{one}=x",), 3, "not a number"),
        (("{one}=1", "{two}"), 2, "some adapters have a weight"),
        (("{one}", "--head-of", "3"), 2, "there are 1 adapters"),
        (("missing.safetensors",), 3, "missing.safetensors"),
    ],
)
def test_what_cannot_be_combined_is_refused(cli, runs, tmp_path, arguments, code, text):
    names = {name: runs / name / "adapter.safetensors" for name in ("one", "two")}
    out = tmp_path / "out.safetensors"
    actual, _, err = cli("combine", *(part.format(**names) for part in arguments), "--out", out)
    assert (actual, out.exists()) == (code, False)
    assert text in err


def test_a_file_is_replaced_only_when_told(cli, runs, tmp_path):
    path, out = runs / "one" / "adapter.safetensors", tmp_path / "out.safetensors"
    out.write_text("kept")
    code, _, err = cli("combine", path, "--out", out)
    assert (code, out.read_text()) == (3, "kept")
    assert "--force" in err
    assert cli("combine", path, "--out", out, "--force")[0] == 0


def test_a_merged_base_answers_as_base_and_adapter_and_comes_back_bit_by_bit(
    cli, runs, vit_dir, digits_npz, tmp_path
):
    merged, back = tmp_path / "merged", tmp_path / "back"
    code, result, _ = cli("merge", runs / "two", "--out", merged, "--json")
    assert code == 0
    assert result["weights"] == 12
    code, evaluated, _ = cli(
        "train", "--base", merged, "--data", digits_npz, *TASK, "--rank", "1", "--epochs", "1",
        "--selection", "random", "--learning-rate", "1e-9", "--threads", "1",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0
    assert evaluated["skipped"]
    adapted = score(cli, runs / "two", digits_npz)["adapter_accuracy"]
    assert score(cli, tmp_path / "run", digits_npz)["base_accuracy"] == adapted
    assert cli("merge", merged, "--undo", "--out", back)[0] == 0
    original, restored = load_file(vit_dir / "model.safetensors"), load_file(back / "model.safetensors")
    assert set(original) == set(restored)
    assert all(torch.equal(value, restored[name]) for name, value in original.items())


def test_an_altered_merge_is_not_undone(cli, runs, tmp_path):
    merged = tmp_path / "merged"
    assert cli("merge", runs / "one", "--out", merged)[0] == 0
    weights = load_file(merged / "model.safetensors")
    name = next(name for name in load_file(merged / "unmerge.safetensors"))
    weights[name][0, 0] += 1
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("merge", merged, "--undo", "--out", tmp_path / "back")
    assert (code, (tmp_path / "back").exists()) == (6, False)
    assert name in err
    assert cli("merge", runs / "one", "--undo", "--out", tmp_path / "back")[0] == 3


def test_an_adapter_moves_to_a_newer_base(cli, runs, newer, digits_npz, tmp_path):
    code, result, _ = cli("migrate", runs / "two", "--base", newer, "--out", tmp_path / "moved", "--json")
    assert code == 0
    assert 0 < max(result["residuals"].values()) < 0.3
    old, moved = (read_adapter(run / "adapter.safetensors") for run in (runs / "two", tmp_path / "moved"))
    assert moved.header.base_digest == result["base_digest"] != old.header.base_digest
    np.testing.assert_array_equal(moved.factors["mlp.fc1"].rows, old.factors["mlp.fc1"].rows)
    assert score(cli, tmp_path / "moved", digits_npz)["samples"] == 60


def test_a_model_of_other_sizes_is_no_newer_version(cli, runs, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "wide")
    code, _, err = cli("migrate", runs / "one", "--base", tmp_path / "wide", "--out", tmp_path / "moved")
    assert (code, (tmp_path / "moved").exists()) == (4, False)
    assert "[16, 16]" in err


def test_a_lower_rank_is_a_run_of_its_own(cli, runs, digits_npz, tmp_path):
    code, result, _ = cli("reduce", runs / "two", "--rank", "2", "--out", tmp_path / "small", "--json")
    assert code == 0
    assert (
        result["trained_numbers"]
        == read_adapter(runs / "two" / "adapter.safetensors").trained_numbers * 4 // 9
    )
    small = read_adapter(tmp_path / "small" / "adapter.safetensors")
    assert all(factors.rank == 2 for factors in small.factors.values())
    score(cli, tmp_path / "small", digits_npz)
    assert cli("reduce", runs / "two", "--rank", "3", "--out", tmp_path / "other")[0] == 3


@pytest.mark.parametrize("damage", ["digests", "another name", "shape"])
def test_a_merge_whose_files_do_not_belong_together_is_refused(cli, runs, tmp_path, damage):
    merged = tmp_path / "merged"
    assert cli("merge", runs / "one", "--out", merged)[0] == 0
    undo = load_file(merged / "unmerge.safetensors")
    name = next(iter(undo))
    if damage == "digests":
        (merged / "unmerge.json").write_text("[]")
    elif damage == "another name":
        undo["other"] = undo.pop(name)
    else:
        undo[name] = undo[name][:1].clone()
    save_file(undo, merged / "unmerge.safetensors")
    code, _, err = cli("merge", merged, "--undo", "--out", tmp_path / "back")
    assert (code, (tmp_path / "back").exists()) == (6, False)
    assert "Traceback" not in err


def test_a_lower_rank_of_ranks_that_were_shared_out(cli, digits_npz, vit_dir, tmp_path):
    from edge_tcur.training import TrainConfig, open_run, train
    from edge_tcur.training.rework import reduce_run

    config = TrainConfig(
        base=str(vit_dir), data=str(digits_npz), task="image-classification", epochs=1, threads=1,
        rank=4, rank_budget=120, head_epochs=0,
    )  # fmt: skip
    run = train(config, tmp_path / "run").run
    ranks = [factors.rank for factors in run.adapter().factors.values()]
    assert max(ranks) > 2
    reduced = reduce_run(run, 2, tmp_path / "reduced").run
    smaller = open_run(reduced.root)
    found = [factors.rank for factors in smaller.adapter().factors.values()]
    assert found == [min(rank, 2) for rank in ranks]
    method = smaller.config.method()
    assert method.rank == 2
    assert sorted(method.rank_pattern.values()) == sorted(found)
    assert cli("eval", reduced.root, "--data", digits_npz)[0] == 0
