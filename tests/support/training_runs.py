"""Short runs of `train` on the tiny bases of the tests, and what it must refuse."""

from __future__ import annotations

import pytest

from edge_tcur.training import TrainConfig, train

IMAGE = "image-classification"
TEXT = "text-classification"
# What `inspect` and `train` say of each group.
GROUP_KEYS = {
    "name", "slices", "n1", "n2", "rank", "trained_numbers", "core_norm", "blocks", "rows", "cols",
    "parameters",
}  # fmt: skip


def image_config(vit_dir, digits_npz, **settings):
    values = {"rank": 2, "epochs": 2, "threads": 1, **settings}
    return TrainConfig(base=str(vit_dir), data=str(digits_npz), task=IMAGE, **values)


def text_config(bert_dir, texts_csv, **settings):
    values = {"rank": 2, "epochs": 2, "threads": 1, **settings}
    return TrainConfig(base=str(bert_dir), data=str(texts_csv), **values)


def refused(config, out, error, match):
    """`train` raises, and nothing is at `out` nor beside it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        train(config, out)
    assert sorted(out.parent.iterdir()) == before
    return caught.value


def train_arguments(vit_dir, digits_npz, out, *more):
    return (
        "train", "--base", vit_dir, "--data", digits_npz, "--task", "image-classification", "--rank", "2",
        "--epochs", "2", "--threads", "1", "--out", out, *more,
    )  # fmt: skip
