"""The steps of the quickstart, in order, each through the same code as the command of that name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_tcur.quickstart.baselines import RivalProcess, Rivals
from edge_tcur.quickstart.device import run_device, torch_is_absent
from edge_tcur.quickstart.digits import BASE_EPOCHS, TASK, Digits, train_base, write_digits
from edge_tcur.training.config import TrainConfig
from edge_tcur.training.train import TrainResult, set_threads, train
from edge_tcur_export.bundle import export_run
from edge_tcur_export.report import ExportReport

EPOCHS = 100  # of the adapter and of its rivals
DEVICE_EPOCHS = 60
RATE = 0.05
WEIGHT_DECAY = 0.1
THREADS = 1  # the model is tiny: a second thread only waits, and the rivals train on the other core
DEFAULT_BUDGET = 256 * 2**20  # bytes, of the device's personalisation
_STAGES = 100  # the bar's length; each step below says how far it brings the bar


@dataclass(frozen=True)
class QuickstartResult:
    """Everything the quickstart measured; accuracies 0 to 1 on the user's test scans.

    Attributes:
        training: the workstation's adapter.
        rivals: the base alone, full fine-tuning and LoRA.
        export: the bundle; personal: the device's personalisation; swaps: the live process.
    """

    out: Path
    seconds: float
    training: TrainResult
    rivals: Rivals
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
            "full_accuracy": self.rivals.full.accuracy,
            "full_local_accuracy": self.rivals.full_local.accuracy,
            "lora_accuracy": self.rivals.lora.accuracy,
            "plain_accuracy": self.rivals.plain_accuracy,
            "trained_numbers": adapter["trained_numbers"],
            "lora_trained_numbers": self.rivals.lora.trained_numbers,
            "full_trained_numbers": self.rivals.full.trained_numbers,
            "adapter_bytes": self.export.adapter_bytes,
            "lora_adapter_bytes": self.rivals.lora.shipped_bytes,
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
    set_threads(THREADS)
    progress.begin("training a small Vision Transformer base on plain scans", 12)
    digits = write_digits(out / "data", seed)
    train_base(digits.base, out / "base", seed, lambda epoch, _: progress.part(epoch / BASE_EPOCHS))
    with RivalProcess(out, seed, EPOCHS) as rivals:
        progress.begin("training the tCURLoRA adapter on the workstation's sample", 36)
        training = train(
            _config(out, digits, seed), out / "run", on_epoch=lambda epoch, _: progress.part(epoch / EPOCHS)
        )
        progress.begin("exporting base and factors", 84)
        export = export_run(
            training.run, out / "bundle", on_stage=lambda stage: progress.part(0.0, f": {stage}")
        )
        progress.begin("full fine-tuning and LoRA (peft), for comparison", 86)
        rival = rivals.result()
    progress.begin("on the device, without torch: personalising", 95)
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
        training=training,
        rivals=rival,
        export=export,
        personal=personal,
        swaps=swaps,
        torch_absent=torch_is_absent(),
    )


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
        threads=THREADS,
    )


def _personalize(bundle: Path, store: Path, digits: Digits, budget: int, seed: int) -> dict[str, Any]:
    adapter = bundle / "adapter.safetensors"
    run_device("adapters", "install", adapter, "--name", "workstation", "--bundle", bundle, "--store", store)
    run_device("adapters", "activate", "workstation", "--bundle", bundle, "--store", store)
    return run_device(
        "personalize", bundle, "--data", digits.local, "--store", store, "--budget", str(budget),
        "--engine", "ort-training", "--epochs", str(DEVICE_EPOCHS), "--learning-rate", str(RATE),
        "--weight-decay", str(WEIGHT_DECAY),
        "--holdout", "0",
        "--seed", str(seed),
    )  # fmt: skip
