"""Writes the files of format version 1 that stay in the tests: ``python tests/data/make_bundle.py OUT``.

A small Vision Transformer learns which quarter of a small picture is bright. The workstation trains an
adapter on pictures of less contrast; those of the user are mirrored as well, which base and adapter answer
badly.

``bundle-v1`` has two layers and every graph. Its groups by shape, coupled in each layer, hold what the format
can: blocks of four slices that the transform couples, blocks of one, and more than one block a group.
``sketch-v1`` has one layer and the graphs of inference and the step: frame ``sketch``, the classifier
trained in full.
What a released version wrote is never written again: a new format version gets files of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from edge_tcur.data import prepare
from edge_tcur.models import load_base
from edge_tcur.settings import TrainConfig
from edge_tcur.tasks import find_task
from edge_tcur.training.loop import LoopSettings, fit
from edge_tcur.training.train import train
from edge_tcur_export.bundle import export_run
from edge_tcur_export.settings import ExportSettings
from edge_tcur_runtime.data import label_names, load_dataset

TASK = "image-classification"
CLASSES = 4
_PROCESSOR = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5], "image_std": [0.25]}


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures uint8 [count, 8, 8] and their classes: the bright pair of columns, 0 to 3."""
    generator = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(count) % CLASSES
    images = generator.normal(80, 25, (count, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += 90
    return images.clip(0, 255).astype(np.uint8), labels


def dim(images: np.ndarray) -> np.ndarray:
    """The pictures [n, 8, 8] at half the contrast."""
    return images // 2 + 40


def mirrored(images: np.ndarray) -> np.ndarray:
    """The pictures with left for right, so that every class looks like another."""
    return np.ascontiguousarray(images[:, :, ::-1])


def write_pictures(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Writes a data file and returns its path."""
    np.savez_compressed(path, images=images, labels=labels)
    return path


def train_base(folder: Path, data: Path, layers: int) -> Path:
    """Trains every weight of the base on upright pictures, saves it in the Hugging Face layout, and returns
    its folder."""
    torch.manual_seed(7)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=32, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR), encoding="utf-8")
    dataset = load_dataset(data, "image")
    base = load_base(str(folder), find_task(TASK), label_names(dataset), {})
    prepared = prepare(dataset, label_names(dataset), base.preprocessing, folder, find_task(TASK))
    settings = LoopSettings(epochs=20, batch_size=32, seed=0)
    fit(base.model, [(list(base.model.parameters()), 5e-3)], prepared, find_task(TASK), settings)
    base.model.module.save_pretrained(folder)
    return folder


def main(out: Path) -> None:
    """Writes ``bundle-v1/``, ``sketch-v1/``, ``adapter-v1.safetensors`` and ``user.npz`` into `out`."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work:
        root = Path(work)
        upright, labels = pictures(400, seed=1)
        sample, sample_labels = pictures(160, seed=2)
        upright_data = write_pictures(root / "upright.npz", upright, labels)
        data = write_pictures(root / "sample.npz", dim(sample), sample_labels)
        common = TrainConfig(
            base=str(train_base(root / "two", upright_data, 2)),
            data=str(data),
            task=TASK,
            epochs=15,
            threads=1,
            learning_rate=0.005,  # a farther adapter is a hard start for the user's pictures
        )
        config = replace(common, rank=3, grouping="shape", coupling="layer", transform="dft")
        export_run(train(config, root / "run").run, out / "bundle-v1", force=True)
        base = train_base(root / "one", upright_data, 1)
        config = replace(
            common,
            base=str(base),
            rank=2,
            frame="sketch",
            grouping="shape",
            alpha=2.0,
            modules_to_save="*classifier",
        )
        run = train(config, root / "sketch").run
        export_run(run, out / "sketch-v1", ExportSettings(("onnx", "step")), force=True)
    user, user_labels = pictures(80, seed=3)
    write_pictures(out / "user.npz", mirrored(dim(user)), user_labels)
    shutil.copyfile(out / "bundle-v1" / "adapter.safetensors", out / "adapter-v1.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
