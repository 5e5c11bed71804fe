"""What the adapter is measured against, on the same base and sample: full fine-tuning, and LoRA by `peft`."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from edge_tcur.data import PreparedData
from edge_tcur.models import Base
from edge_tcur.tasks import Task
from edge_tcur.training.loop import LoopSettings, accuracy, fit

LORA_RANK = 8
_FULL_RATE = 1e-3
_LORA_RATE = 5e-3


@dataclass(frozen=True)
class Baseline:
    """Accuracy (0 to 1) on the user's test scans, trained numbers, and bytes that would be shipped."""

    accuracy: float
    trained_numbers: int
    shipped_bytes: int


def full_fine_tuning(
    base: Base, data: PreparedData, test: PreparedData, task: Task, settings: LoopSettings
) -> Baseline:
    """Trains every parameter of a copy of the base; a whole new base is what would be shipped."""
    model = copy.deepcopy(base.model)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    fit(model, [(parameters, _FULL_RATE)], data, task, settings)
    count = sum(parameter.numel() for parameter in parameters)
    return Baseline(accuracy(model, test, task), count, 4 * count)


def lora(base: Base, data: PreparedData, test: PreparedData, task: Task, settings: LoopSettings) -> Baseline:
    """LoRA of rank 8 on the same linear layers; the size is that of peft's own adapter file."""
    import peft

    torch.manual_seed(settings.seed)
    model = copy.deepcopy(base.model)
    inner = model.module
    assert isinstance(inner, torch.nn.Module)
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(inner, config)
        model.module = wrapped
        parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        fit(model, [(parameters, _LORA_RATE)], data, task, settings)
        score = accuracy(model, test, task)
        with TemporaryDirectory() as work:
            wrapped.save_pretrained(work)
            size = (Path(work) / "adapter_model.safetensors").stat().st_size
    return Baseline(score, sum(parameter.numel() for parameter in parameters), size)
