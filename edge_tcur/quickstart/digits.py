"""Real handwriting (scikit-learn's bundled digits) and a small Vision Transformer trained on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge_tcur.data import prepare
from edge_tcur.models import load_base
from edge_tcur.models.quiet import import_quietly
from edge_tcur.tasks import find_task
from edge_tcur.training.loop import LoopSettings, fit
from edge_tcur_runtime.data import label_names, load_dataset

TASK = "image-classification"
SPLIT = {"base": 800, "sample": 300, "local": 300, "test": 397}  # 1,797 scans, disjoint
_WHITE = 16.0  # largest grey value of a scan
_BASE_EPOCHS = 30
_BASE_RATE = 2e-3


@dataclass(frozen=True)
class Digits:
    """Paths of the data files.

    Attributes:
        base: what the base is trained on, upright and dark on white as scanned.
        sample: what the workstation has from the user's kind of device.
        local: the user's own labelled scans; they stay on the device.
        test: the user's later scans.
        plain_test: the same later scans as the base knows them.
    """

    base: Path
    sample: Path
    local: Path
    test: Path
    plain_test: Path


def as_user_device(images: np.ndarray) -> np.ndarray:
    """The user's device: every scan [n, 8, 8] comes out a quarter turn to the left and inverted."""
    return np.ascontiguousarray(_WHITE - np.rot90(images, 1, axes=(1, 2)))


def write_digits(folder: Path, seed: int) -> Digits:
    """Splits the 1,797 scans and writes them as ``.npz`` files."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(scans.target))
    images = scans.images.astype(np.float32)[order]
    labels = scans.target.astype(np.int64)[order]
    folder.mkdir(parents=True, exist_ok=True)
    begin, paths = 0, {}
    for name, count in SPLIT.items():
        part = slice(begin, begin + count)
        begin += count
        shifted = images[part] if name == "base" else as_user_device(images[part])
        paths[name] = folder / f"{name}.npz"
        np.savez_compressed(paths[name], images=shifted, labels=labels[part])
        if name == "test":
            paths["plain_test"] = folder / "plain_test.npz"
            np.savez_compressed(paths["plain_test"], images=images[part], labels=labels[part])
    return Digits(**paths)


def train_base(data: Path, folder: Path, seed: int, on_epoch: Callable[[int, float], None]) -> None:
    """Trains a Vision Transformer of 136,000 parameters and saves it in the Hugging Face layout."""
    import_quietly("torchao")
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"do_rescale": True, "rescale_factor": 1 / _WHITE, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    dataset = load_dataset(data, "image")
    labels, task = label_names(dataset), find_task(TASK)
    base = load_base(str(folder), task, labels, {})
    prepared = prepare(dataset, labels, base.preprocessing, folder, task)
    parameters = list(base.model.parameters())
    settings = LoopSettings(_BASE_EPOCHS, batch_size=64, weight_decay=0.01, seed=seed)
    fit(base.model, [(parameters, _BASE_RATE)], prepared, task, settings, on_epoch=on_epoch)
    base.model.module.save_pretrained(folder)  # type: ignore[operator,union-attr]


BASE_EPOCHS = _BASE_EPOCHS
