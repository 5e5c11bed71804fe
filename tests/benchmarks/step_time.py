"""Seconds and memory of one training step against LoRA r8 (peft): `python tests/benchmarks/step_time.py`.

Every way runs forward and backward of the same batch in turn, in one process; printed are medians, ratios
to LoRA's median, and the bytes that autograd keeps beyond those of the frozen base.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig, preset
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.targets import find_targets

WAYS: dict[str, TCurConfig | None] = {
    "frozen base": None,
    "LoRA r8": None,
    "gradient r8 (coupling none)": preset("gradient", rank=8),
    "by projection, coupling all, dft": TCurConfig(rank=8, coupling="all", selection="squared-norm"),
    "sketch r8": preset("sketch", rank=8),
    "paper r8": preset("paper", rank=8),
}


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    """all-MiniLM-L6-v2's shape with random weights, 16 sequences of 32 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=4000,
        attn_implementation="eager",
    )
    inputs = {
        "input_ids": torch.randint(4000, (16, 32)),
        "attention_mask": torch.ones(16, 32, dtype=torch.long),
    }
    return BertModel(config, add_pooling_layer=False), inputs


def vit_s() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-S/16's shape with random weights, 2 pictures of 224 x 224 (394 tokens)."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        attn_implementation="eager",
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 224, 224)}


MODELS = {"MiniLM, 16 x 32 tokens": minilm, "ViT-S/16, 2 pictures": vit_s}


def build(name: str, base: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """The base in that way."""
    model = copy.deepcopy(base).eval().requires_grad_(False)
    # The frozen base's own backward is timed too: a gradient flows to its embeddings in every way.
    embeddings = cast("nn.Module", model.get_input_embeddings())  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, given, output: output.requires_grad_())
    config = WAYS[name]
    if config is not None:
        gradients = None
        if config.needs_directions:
            targets = find_targets(model, config)
            gradients = mean_gradients(model, targets, [lambda: loss_of(model, inputs)])
        inject(model, config, directions=gradients)
    elif name.startswith("LoRA"):
        import peft

        names = [m for group in find_targets(model, TCurConfig()).groups for m in group.modules]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=names), model)
    return model


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A scalar that depends on every output."""
    loss: Tensor = model(**inputs).last_hidden_state.square().mean()
    return loss


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps between forward and backward, weights left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or tensor.requires_grad is False:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(kept.values())


def measure(name: str, rounds: int) -> list[tuple[str, float, int]]:
    """Way -> median seconds of a step, saved bytes."""
    torch.manual_seed(0)
    base, inputs = MODELS[name]()
    models = {way: build(way, base, inputs) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for count in range(rounds + 2):
        for way, model in models.items():
            started = time.process_time()
            torch.autograd.backward(loss_of(model, inputs))
            if count >= 2:
                seconds[way].append(time.process_time() - started)
            model.zero_grad()
    return [
        (way, median(seconds[way]), saved_bytes(partial(loss_of, model, inputs)))
        for way, model in models.items()
    ]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in MODELS:
        rows = measure(name, options.rounds)
        lora = next(seconds for way, seconds, _ in rows if way == "LoRA r8")
        frozen = rows[0][2]
        sys.stdout.write(f"{name}, {options.threads} thread(s), processor seconds\n")
        for way, seconds, kept in rows:
            extra = (kept - frozen) / 2**20
            sys.stdout.write(
                f"  {way:34} {seconds:7.4f} s  {seconds / lora:5.2f} x LoRA  {extra:+8.2f} MiB kept\n"
            )


if __name__ == "__main__":
    main()
