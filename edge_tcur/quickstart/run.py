"""The steps of the quickstart, in order, each through the same code as the command of that name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_tcur.data import PreparedData, prepare
from edge_tcur.models import load_base
from edge_tcur.quickstart.baselines import Baseline, full_fine_tuning, lora
from edge_tcur.quickstart.device import run_device, torch_is_absent
from edge_tcur.quickstart.digits import BASE_EPOCHS, TASK, Digits, train_base, write_digits
from edge_tcur.tasks import find_task
from edge_tcur.training.config import TrainConfig
from edge_tcur.training.loop import LoopSettings, accuracy
from edge_tcur.training.train import TrainResult, set_threads, train
from edge_tcur_export.bundle import ExportReport, export_run
from edge_tcur_runtime.data import label_names, load_dataset

EPOCHS = 100
DEVICE_EPOCHS = 60
RIVAL_EPOCHS = 40  # with 100 they overfit: see docs/quickstart.md
RATE = 0.05
WEIGHT_DECAY = 0.1
DEFAULT_BUDGET = 256 * 2**20  # bytes, of the device's personalisation
_STAGES = 100  # the bar's length; each step below says how far it brings the bar


@dataclass(frozen=True)
class QuickstartResult:
    """Everything the quickstart measured; accuracies 0 to 1 on the user's test scans.

    Attributes:
        plain_accuracy: the base on scans as it knows them.
        base_accuracy: the base on the user's scans.
        adapter: the workstation's adapter; full, lora: its rivals on the same sample.
        full_local: full fine-tuning on the user's local set, which would have to leave the device.
        export: the bundle; personal: the device's personalisation; swaps: the live process.
    """

    out: Path
    seconds: float
    plain_accuracy: float
    base_accuracy: float
    training: TrainResult
    full: Baseline
    full_local: Baseline
    lora: Baseline
    export: ExportReport
    personal: dict[str, Any]
    swaps: dict[str, Any]
    torch_absent: bool
    paths: dict[str, str] = field(default_factory=dict)

    def swap(self, name: str) -> dict[str, Any]:
        """Accuracy and swap time of one adapter in the live process."""
        return next(item for item in self.swaps["adapters"] if item["adapter"] == name)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the command."""
        adapter = self.training.run.metrics
        return {
            "base_accuracy": self.swap("base")["accuracy"],
            "adapter_accuracy": self.swap("bundle")["accuracy"],
            "personal_accuracy": self.swap("personal")["accuracy"],
            "full_accuracy": self.full.accuracy,
            "full_local_accuracy": self.full_local.accuracy,
            "lora_accuracy": self.lora.accuracy,
            "plain_accuracy": self.plain_accuracy,
            "trained_numbers": adapter["trained_numbers"],
            "lora_trained_numbers": self.lora.trained_numbers,
            "full_trained_numbers": self.full.trained_numbers,
            "adapter_bytes": self.export.adapter_bytes,
            "lora_adapter_bytes": self.lora.shipped_bytes,
            "base_bytes": self.export.base_bytes,
            "budget_bytes": self.personal["budget_bytes"],
            "peak_rss_bytes": self.personal["peak_rss_bytes"],
            "step_seconds": self.personal["step_seconds"],
            "swap_ms": max(item["swap_ms"] for item in self.swaps["adapters"]),
            "swaps": self.swaps["adapters"],
            "base_digest_before": self.personal["base_digest_before"],
            "base_digest_after": self.personal["base_digest_after"],
            "engine": self.personal["engine"],
            "torch_absent_on_device": self.torch_absent,
            "parity": {target: dict(errors) for target, errors in self.export.parity.items()},
            "seconds": self.seconds,
            "paths": self.paths,
        }


class _Progress:
    """Turns the steps' own progress into one bar of `_STAGES`."""

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report = report
        self._from, self._to, self._text = 0.0, 0.0, ""

    def begin(self, text: str, to: float) -> None:
        """The next step, and where the bar stands when it ends (0 to 100)."""
        self._from, self._to, self._text = self._to, to, text
        self._report(text, self._from / _STAGES)

    def part(self, done: float, detail: str = "") -> None:
        """Part of the current step that is done, 0 to 1."""
        place = self._from + (self._to - self._from) * done
        self._report(f"{self._text}{detail}", place / _STAGES)


def quickstart(
    out: Path,
    *,
    seed: int = 0,
    budget: int = DEFAULT_BUDGET,
    on_progress: Callable[[str, float], None] = lambda *_: None,
) -> QuickstartResult:
    """Runs the whole path in `out`.

    Args:
        out: an empty or missing directory; everything is written below it.
        seed: of the split, the base and the orders.
        budget: peak resident memory in bytes of the device's personalisation.
        on_progress: called with what is being done and the part of the whole that is done, 0 to 1.
    """
    started = time.perf_counter()
    progress = _Progress(on_progress)
    set_threads(0)
    progress.begin("training a small Vision Transformer base on plain scans", 12)
    digits = write_digits(out / "data", seed)
    train_base(digits.base, out / "base", seed, lambda epoch, _: progress.part(epoch / BASE_EPOCHS))
    progress.begin("training the tCURLoRA adapter on the workstation's sample", 22)
    training = train(
        _config(out, digits, seed), out / "run", on_epoch=lambda epoch, _: progress.part(epoch / EPOCHS)
    )
    rivals = _Rivals(out, digits, seed)
    progress.begin("full fine-tuning, for comparison", 30)
    full, full_local = rivals.full(digits.sample), rivals.full(digits.local)
    progress.begin("LoRA rank 8 (peft), for comparison", 36)
    low_rank = rivals.lora(digits.sample)
    progress.begin("exporting base and factors", 84)
    export = export_run(
        training.run, out / "bundle", on_stage=lambda stage: progress.part(_EXPORT[stage], f": {stage}")
    )
    progress.begin("on the device, without torch: personalising", 94)
    store = out / "store"
    personal = _personalize(export.root, store, digits, budget, seed)
    progress.begin("on the device, without torch: swapping adapters in one live process", 100)
    swaps = run_device(
        "adapters", "compare", export.root, "--store", store, "--data", digits.test,
        "--adapter", "base", "--adapter", "bundle", "--adapter", "personal", "--adapter", "base",
    )  # fmt: skip
    return QuickstartResult(
        out=out,
        seconds=time.perf_counter() - started,
        plain_accuracy=rivals.base_accuracy(digits.plain_test),
        base_accuracy=rivals.base_accuracy(digits.test),
        training=training,
        full=full,
        full_local=full_local,
        lora=low_rank,
        export=export,
        personal=personal,
        swaps=swaps,
        torch_absent=torch_is_absent(),
    )


# Where each stage of the export begins, as a part of its time.
_EXPORT = {
    "loading the base": 0.0,
    "tracing the forward pass": 0.02,
    "writing the inference graph": 0.12,
    "writing the step graph (forward and backward)": 0.27,
    "writing ONNX Runtime Training's graphs": 0.86,
    "writing the manifest": 0.94,
    "comparing with torch in a fresh process": 0.94,
    "moving the bundle into place": 1.0,
}


def _config(out: Path, digits: Digits, seed: int) -> TrainConfig:
    return TrainConfig(
        base=str(out / "base"),
        data=str(digits.sample),
        eval_data=str(digits.test),
        task=TASK,
        epochs=EPOCHS,
        learning_rate=RATE,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
    )


def _personalize(bundle: Path, store: Path, digits: Digits, budget: int, seed: int) -> dict[str, Any]:
    adapter = bundle / "adapter.safetensors"
    run_device("adapters", "install", adapter, "--name", "workstation", "--bundle", bundle, "--store", store)
    run_device("adapters", "activate", "workstation", "--bundle", bundle, "--store", store)
    return run_device(
        "personalize", bundle, "--data", digits.local, "--store", store, "--budget", str(budget),
        "--engine", "ort-training", "--epochs", str(DEVICE_EPOCHS), "--learning-rate", str(RATE),
        "--weight-decay", str(WEIGHT_DECAY),
        "--holdout", "0.1",
        "--seed", str(seed),
    )  # fmt: skip


class _Rivals:
    """The base alone and other ways to train it, on the same sample and scored on the same scans."""

    def __init__(self, out: Path, digits: Digits, seed: int) -> None:
        self._task = find_task(TASK)
        self._labels = label_names(load_dataset(digits.base, "image"))
        self._base = load_base(str(out / "base"), self._task, self._labels, {})
        self._test = self._prepare(digits.test)
        self._settings = LoopSettings(RIVAL_EPOCHS, batch_size=16, seed=seed)

    def _prepare(self, path: Path) -> PreparedData:
        dataset = load_dataset(path, "image")
        return prepare(dataset, self._labels, self._base.preprocessing, path.parent)

    def base_accuracy(self, data: Path) -> float:
        """The base without any training."""
        return accuracy(self._base.model, self._prepare(data), self._task)

    def full(self, data: Path) -> Baseline:
        """Every parameter trained on `data`."""
        return full_fine_tuning(self._base, self._prepare(data), self._test, self._task, self._settings)

    def lora(self, data: Path) -> Baseline:
        """LoRA of rank 8 trained on `data`."""
        return lora(self._base, self._prepare(data), self._test, self._task, self._settings)
