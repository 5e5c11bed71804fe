"""Segmentation models for the tests: patches, one residual block, and a linear head of pixels."""

from __future__ import annotations

import torch
from torch import nn

CLASSES, WIDTH, PATCH = 3, 16, 2


class Segmenter(nn.Module):
    """f32 [batch, 1, *size] -> [batch, 3, *size], of sizes that 2 divides."""

    def __init__(self, *size):
        super().__init__()
        torch.manual_seed(5)
        self.axes = len(size)
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[self.axes]
        self.embed = kind(1, WIDTH, PATCH, PATCH)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())])
        self.head = nn.Linear(WIDTH, CLASSES * PATCH**self.axes)
        sides = dict(zip(("width", "height", "depth"), size[::-1], strict=False))
        self.preprocessing = {
            "kind": "image", "input": "pixel_values", **sides, "channels": 1,
            "scale": 1 / 255, "mean": [0.5], "std": [0.25],
        }  # fmt: skip

    def forward(self, pixel_values):
        """See the class."""
        x = self.embed(pixel_values)
        space, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        x = self.head(x).reshape(x.shape[0], *space, CLASSES, *[PATCH] * self.axes)
        # [batch, *space, class, *patch] -> [batch, class, space 0, patch 0, space 1, patch 1, ...]
        pairs = [axis for place in range(self.axes) for axis in (1 + place, self.axes + 2 + place)]
        x = x.permute(0, self.axes + 1, *pairs)
        return x.reshape(x.shape[0], CLASSES, *[PATCH * side for side in space])


def plane():
    """A model of pictures of 4 x 6."""
    return Segmenter(4, 6)


def volume():
    """A model of volumes of 2 x 4 x 4."""
    return Segmenter(2, 4, 4)
