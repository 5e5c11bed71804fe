"""A small segmentation problem on real handwriting: pages of four digits, each pixel paper or a class.

The base, a Vision Transformer with a linear pixel head (the encoder of UNETR without its decoder),
learns upright dark-on-white pages; the user's are turned and inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur.data import Samples, in_batches
from edge_tcur.quickstart.digits import as_user_device
from edge_tcur.tasks import Task
from edge_tcur.tasks import task as tasks
from edge_tcur.training.loop import LoopSettings, fit
from edge_tcur_runtime.formats.bundle import InputSpec

_SIDE, _CELL, _PATCH, _WIDTH, _LAYERS, _HEADS = 16, 8, 2, 64, 4, 4
_INK = 4.0  # grey value from which a pixel of a scan belongs to the digit
_WHITE = 16.0
_BASE_SCANS, _BASE_PAGES, _BASE_EPOCHS, _BASE_RATE = 900, 1500, 15, 2e-3
LABELS = ("paper", *map(str, range(10)))
INPUTS = {"pixel_values": InputSpec("float32", ("batch", 1, _SIDE, _SIDE))}


class Segmentation(tasks.Segmentation):
    """The product's task with the loss that docs/results.md was measured with: Dice over the whole batch,
    without the background. It is no mean over samples, so micro-batches would not add up to it."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Dice loss plus cross-entropy, the paper's loss for UNETR."""
        entropy = nn.functional.cross_entropy(outputs, targets)
        probabilities = outputs.softmax(dim=1)
        truth = nn.functional.one_hot(targets, outputs.shape[1]).movedim(-1, 1).to(outputs.dtype)
        overlap = (probabilities * truth).sum(dim=(0, 2, 3))
        sizes = probabilities.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
        return entropy + 1 - (2 * overlap[1:] / sizes[1:].clamp_min(1e-6)).mean()


TASK: Task = Segmentation("segmentation", "image")


class _Block(nn.Module):
    """A pre-norm transformer block with separate projections, attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same."""
        normed = self.before(x)
        query, key, value = (
            part(normed).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(-1, -2) / (_WIDTH // _HEADS) ** 0.5).softmax(dim=-1)
        x = x + self.output((scores @ value).transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.after(x))))
        return result


class PageModel(nn.Module):
    """[batch, 1, 16, 16] -> [batch, 11, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        tokens = (_SIDE // _PATCH) ** 2
        self.embed = nn.Conv2d(1, _WIDTH, _PATCH, _PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, _WIDTH))
        self.layers = nn.ModuleList(_Block() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, len(LABELS) * _PATCH**2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(pixel_values).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        pixels = self.head(self.norm(x)).transpose(1, 2).unflatten(-1, (_SIDE // _PATCH, -1))
        result: Tensor = nn.functional.pixel_shuffle(pixels, _PATCH)
        return result


@dataclass(frozen=True)
class Pages:
    """Pages f32 [n, 1, 16, 16] and their classes int64 [n, 16, 16]."""

    images: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """See `edge_tcur.data.Samples`."""
        return {"pixel_values": torch.from_numpy(self.images[indices])}, torch.from_numpy(
            self.classes[indices]
        )


def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(scans.target))
    return scans.images[order].astype(np.float32), scans.target[order].astype(np.int64)


def _compose(scans: tuple[np.ndarray, np.ndarray], count: int, seed: int, *, user: bool) -> Pages:
    """Pages of four scans drawn at random, each in a corner."""
    images, digits = scans
    picks = np.random.Generator(np.random.PCG64(seed)).integers(len(digits), size=(count, 4))
    pages = np.zeros((count, _SIDE, _SIDE), np.float32)
    classes = np.zeros((count, _SIDE, _SIDE), np.int64)
    for corner in range(4):
        top, left = (_CELL * part for part in divmod(corner, 2))
        part = images[picks[:, corner]]
        inked = np.where(part >= _INK, 1 + digits[picks[:, corner]][:, None, None], 0)
        pages[:, top : top + _CELL, left : left + _CELL] = part
        classes[:, top : top + _CELL, left : left + _CELL] = inked
    if user:
        pages, classes = as_user_device(pages), np.ascontiguousarray(np.rot90(classes, 1, axes=(1, 2)))
    return Pages(pages[:, None] / _WHITE, classes)


def user_pages(seed: int) -> tuple[Samples, Samples, Samples]:
    """The user's training, validation and test pages, of scans that the base has not seen."""
    images, digits = _scans()
    cuts = ((_BASE_SCANS, 1200, 200), (1200, 1400, 100), (1400, len(digits), 300))
    train, validation, test = (
        _compose((images[first:last], digits[first:last]), count, 10 * seed + place, user=True)
        for place, (first, last, count) in enumerate(cuts)
    )
    return train, validation, test


def build_model() -> PageModel:
    """An untrained model."""
    return PageModel()


def train_base(seed: int) -> PageModel:
    """The base, trained on upright pages."""
    torch.manual_seed(seed)
    images, digits = _scans()
    pages = _compose((images[:_BASE_SCANS], digits[:_BASE_SCANS]), _BASE_PAGES, 1000 + seed, user=False)
    model = build_model()
    settings = LoopSettings(_BASE_EPOCHS, batch_size=32, weight_decay=0.01, seed=seed)
    fit(model, [(list(model.parameters()), _BASE_RATE)], pages, TASK, settings)
    return model


def mean_dice(model: nn.Module, data: Samples, _: Task) -> float:
    """Dice coefficient of each digit class over all pages together, averaged over the classes."""
    count = len(LABELS)
    overlap, sizes = torch.zeros(2, count)
    model.eval()
    with torch.no_grad():
        for inputs, classes in in_batches(data, 64):
            answers, targets = model(**inputs).argmax(dim=1).cpu(), classes.cpu()
            overlap += torch.bincount(answers[answers == targets], minlength=count)
            sizes += torch.bincount(answers.flatten(), minlength=count)
            sizes += torch.bincount(targets.flatten(), minlength=count)
    return float((2 * overlap[1:] / sizes[1:].clamp_min(1)).mean())
