"""`edge-tcur merge` of a base whose files are not float32, and back."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_tcur.models.stored import same_bits
from edge_tcur.training import TrainConfig, train
from edge_tcur.training.rework import merge_run, unmerge
from edge_tcur_runtime.errors import BadInputError

WEIGHTS = "model.safetensors"


def write_base(source, folder, weights, said, *, shards=False):
    """A copy of a base with these weights; `said`: what its config.json says of their dtype."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": said}))
    if not shards:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        return
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def made(vit_dir, digits_npz, tmp_path_factory):
    """A run, its float32 base's weights (float16 and bfloat16 hold them too) and what merging gives."""
    root = tmp_path_factory.mktemp("dtypes")
    weights = {name: (value * 512).round() / 512 for name, value in load_file(vit_dir / WEIGHTS).items()}
    assert any((value.signbit() & (value == 0)).any() for value in weights.values())  # zeros of both signs
    write_base(vit_dir, root / "base", weights, "float32")
    config = TrainConfig(
        base=str(root / "base"), data=str(digits_npz), task="image-classification", rank=3, epochs=1,
        threads=1, selection="squared-norm", modules_to_save="*layernorm_after",
    )  # fmt: skip
    run = train(config, root / "run").run
    merge_run(run, root / "merged")
    return run, weights, load_file(root / "merged" / WEIGHTS)


@pytest.mark.parametrize("layout", ["float32", "bfloat16", "float16", "float64", "mixed", "shards"])
def test_a_merge_keeps_the_dtypes_of_the_files_and_its_undoing_their_bits(made, tmp_path, layout):
    run, plain, summed = made
    dtype = getattr(torch, layout, torch.bfloat16)
    weights = {name: value.to(dtype) for name, value in plain.items()}
    if layout == "float64":
        weights = {name: value * (1 + 1e-12) for name, value in weights.items()}  # no float32 holds these
    elif layout == "mixed":
        weights |= {name: plain[name] for name in weights if "layernorm" in name}
    said = str(dtype).removeprefix("torch.")
    write_base(run.config.base, tmp_path / "base", weights, said, shards=layout == "shards")
    other = replace(run, config=replace(run.config, base=str(tmp_path / "base")))
    count = merge_run(other, tmp_path / "merged").weights
    unmerge(tmp_path / "merged", tmp_path / "back")
    merged, back = (load_file(tmp_path / name / WEIGHTS) for name in ("merged", "back"))
    changed = {name for name, value in weights.items() if not same_bits(merged[name], value)}
    assert count == len(changed) >= 12
    for name, value in weights.items():
        assert same_bits(back[name], value), name
        rounded = summed[name].to(value.dtype)
        assert same_bits(merged[name], rounded if name in changed else value), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == said


def test_a_sum_that_half_precision_does_not_hold_is_refused(made, tmp_path):
    run, plain, _ = made
    weights = {name: value.half() for name, value in plain.items()}
    write_base(run.config.base, tmp_path / "base", weights, "float16")
    adapter = run.adapter()
    for factors in adapter.factors.values():
        factors.core[:] = 1e7
    shutil.copytree(run.root, tmp_path / "run")
    from edge_tcur_runtime.formats.adapter import write_adapter

    write_adapter(tmp_path / "run" / "adapter.safetensors", adapter)
    large = replace(run, root=tmp_path / "run", config=replace(run.config, base=str(tmp_path / "base")))
    with pytest.raises(BadInputError, match=r"no finite number in torch\.float16"):
        merge_run(large, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_zeros_of_both_signs_are_not_the_same_bits():
    zero = torch.zeros(2)
    assert torch.equal(zero, -zero)
    assert not same_bits(zero, -zero)
    assert same_bits(torch.tensor(torch.nan), torch.tensor(torch.nan))
    assert not same_bits(zero, zero.half())
