"""What the adapter is measured against, on the same base and sample: full fine-tuning, and LoRA by `peft`.

They train in a process of their own, on the second core, while the adapter trains and is exported.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch

from edge_tcur.data import PreparedData, prepare
from edge_tcur.models import Base, load_base
from edge_tcur.quickstart.digits import TASK
from edge_tcur.tasks import Task, find_task
from edge_tcur.training.loop import LoopSettings, fit, score_model
from edge_tcur_runtime.data import label_names, load_dataset
from edge_tcur_runtime.errors import EdgeError

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
    return Baseline(score_model(model, test, task), count, 4 * count)


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
        score = score_model(model, test, task)
        with TemporaryDirectory() as work:
            wrapped.save_pretrained(work)
            size = (Path(work) / "adapter_model.safetensors").stat().st_size
    return Baseline(score, sum(parameter.numel() for parameter in parameters), size)


@dataclass(frozen=True)
class Rivals:
    """The base alone and its other trainings, scored on the user's test scans.

    Attributes:
        plain_accuracy: the base on scans as it knows them.
        full, lora: trained on the workstation's sample.
        full_local: trained on the user's local set, which would have to leave the device.
    """

    plain_accuracy: float
    full: Baseline
    full_local: Baseline
    lora: Baseline


def train_rivals(root: Path, seed: int, epochs: int) -> Rivals:
    """Trains the rivals of the quickstart in `root` on one thread."""
    torch.set_num_threads(1)
    task = find_task(TASK)
    labels = label_names(load_dataset(root / "data" / "base.npz", "image"))
    base = load_base(str(root / "base"), task, labels, {})
    settings = LoopSettings(epochs, batch_size=16, seed=seed)

    def read(name: str) -> PreparedData:
        dataset = load_dataset(root / "data" / f"{name}.npz", "image")
        return prepare(dataset, labels, base.preprocessing, root, task)

    test = read("test")
    return Rivals(
        plain_accuracy=score_model(base.model, read("plain_test"), task),
        full=full_fine_tuning(base, read("sample"), test, task, settings),
        full_local=full_fine_tuning(base, read("local"), test, task, settings),
        lora=lora(base, read("sample"), test, task, settings),
    )


class RivalProcess:
    """`train_rivals` in a process of its own, begun at once; `result` waits for it.

    A context manager: the process does not outlive the block.
    """

    def __init__(self, root: Path, seed: int, epochs: int) -> None:
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(root), str(seed), str(epochs)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._process.kill()
        self._process.communicate()

    def result(self) -> Rivals:
        """The rivals' figures.

        Raises:
            EdgeError: the process failed; its last line is passed on.
        """
        out, errors = self._process.communicate()
        if self._process.returncode != 0:
            raise EdgeError(
                f"the baselines failed: {(errors.strip().splitlines() or ['no reason given'])[-1]}"
            )
        document = json.loads(out.splitlines()[-1])
        parts = {name: Baseline(**document[name]) for name in ("full", "full_local", "lora")}
        return Rivals(plain_accuracy=document["plain_accuracy"], **parts)


if __name__ == "__main__":
    found = train_rivals(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
