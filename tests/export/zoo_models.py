"""Small models of the families that must export, as functions that a base names (``zoo_models:unetr``).

They are written from the published descriptions, with random weights; each call of a function gives the
same ones.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def _pictures(*size, channels=1):
    names = ("height", "width") if len(size) == 2 else ("depth", "height", "width")
    return {
        "kind": "image", "input": "pixel_values", "channels": channels, "scale": 1 / 255,
        **dict(zip(names, size, strict=True)),
        "mean": [0.5] * channels, "std": [0.25] * channels,
    }  # fmt: skip


class Residual(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one, with batch normalisation (He et al., 2016)."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride=stride)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outer) for _ in range(2))

    def forward(self, x):
        y = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.norms[1](self.second(y)) + self.shortcut(x))


class ResidualClassifier(nn.Module):
    """A stem, a pooling, two residual blocks and a linear head."""

    preprocessing = _pictures(16, 16, channels=3)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList([Residual(8, 16, 2), Residual(16, 16, 1)])
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values):
        x = functional.max_pool2d(functional.relu(self.stem(pixel_values)), 3, stride=2, padding=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class SpeechClassifier(nn.Module):
    """Whisper's encoder on features [mel, frames], which come as a picture, and a head on its mean."""

    preprocessing = _pictures(8, 32)

    def __init__(self):
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        super().__init__()
        config = WhisperConfig(
            num_mel_bins=8, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
            max_source_positions=16, vocab_size=32, attn_implementation="eager",
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        self.encoder = WhisperEncoder(config)
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values):
        hidden = self.encoder(pixel_values.squeeze(1)).last_hidden_state
        return self.head(hidden.mean(dim=1))


class Attention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values, written out."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-2, -1)) / (width // self.heads) ** 0.5
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2)
        return self.out_proj(mixed.reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block with its normalisation in front."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.linear2(functional.gelu(self.linear1(self.norm2(x))))


class Refine(nn.Module):
    """A residual block of UNETR: two 3x3x3 convolutions with instance normalisation."""

    def __init__(self, inner, outer):
        super().__init__()
        self.first = nn.Conv3d(inner, outer, 3, padding=1, bias=False)
        self.second = nn.Conv3d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv3d(inner, outer, 1, bias=False)
        self.norms = nn.ModuleList(nn.InstanceNorm3d(outer, affine=True) for _ in range(3))

    def forward(self, x):
        y = functional.leaky_relu(self.norms[0](self.first(x)), 0.01)
        y = self.norms[1](self.second(y))
        return functional.leaky_relu(y + self.norms[2](self.shortcut(x)), 0.01)


class Rise(nn.Module):
    """A transposed convolution that doubles each side, the skip beside it, and a `Refine`."""

    def __init__(self, inner, outer):
        super().__init__()
        self.up = nn.ConvTranspose3d(inner, outer, 2, stride=2, bias=False)
        self.refine = Refine(2 * outer, outer)

    def forward(self, x, skip):
        return self.refine(torch.cat([self.up(x), skip], dim=1))


class Unetr(nn.Module):
    """UNETR (Hatamizadeh et al., WACV 2022) of two decoder steps: a vision transformer over the patches of a
    volume, whose hidden states are the skips of a convolutional decoder; outputs [batch, classes, depth,
    height, width]."""

    preprocessing = _pictures(8, 8, 8)
    width, patch, classes = 16, 4, 3

    def __init__(self):
        super().__init__()
        width = self.width
        self.patch_embedding = nn.Conv3d(1, width, self.patch, stride=self.patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.encoder1 = Refine(1, 4)
        self.encoder2 = nn.ConvTranspose3d(width, 8, 2, stride=2, bias=False)
        self.decoder2, self.decoder1 = Rise(width, 8), Rise(8, 4)
        self.out = nn.Conv3d(4, self.classes, 1)

    def forward(self, pixel_values):
        x = self.patch_embedding(pixel_values)
        sides = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.position
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        hidden, deepest = states[0], self.norm(x)

        def as_volume(tokens):
            return tokens.transpose(1, 2).reshape(-1, self.width, *sides)

        x = self.decoder2(as_volume(deepest), self.encoder2(as_volume(hidden)))
        return self.out(self.decoder1(x, self.encoder1(pixel_values)))


def _made(kind):
    torch.manual_seed(0)
    return kind()


def convolutional():
    """A convolutional classifier."""
    return _made(ResidualClassifier)


def whisper():
    """A Whisper encoder with a head."""
    return _made(SpeechClassifier)


def unetr():
    """A UNETR that segments volumes."""
    return _made(Unetr)


class Convolutions(nn.Module):
    """Convolutions of one shape with a stride, a dilation and a reflected border, for 8x8 pictures."""

    preprocessing = _pictures(8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(6, 6, 3, padding=2, dilation=2),
                nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", bias=False),
                nn.Conv2d(6, 6, 3, padding="same"),
            ]
        )
        self.point = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.point(x).mean(dim=(2, 3)))


def convolutions():
    """Convolutions that a transform can couple."""
    return _made(Convolutions)
