"""What the quickstart leaves behind: a plot, a JSON file, and one table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from edge_tcur.quickstart.run import QuickstartResult
from edge_tcur_runtime.output import SCHEMA_VERSION
from edge_tcur_runtime.units import format_size

PLOT = "quickstart.png"
RESULT = "quickstart.json"


def write_report(result: QuickstartResult) -> dict[str, Any]:
    """Writes the plot and the JSON file, and returns the JSON object."""
    out = result.out
    draw_plot(result, out / PLOT)
    result.paths.update(
        {
            "base": str(out / "base"),
            "data": str(out / "data"),
            "run": str(out / "run"),
            "adapter": str(out / "run" / "adapter.safetensors"),
            "bundle": str(out / "bundle"),
            "store": str(out / "store"),
            "plot": str(out / PLOT),
            "result": str(out / RESULT),
        }
    )
    document = {"schema_version": SCHEMA_VERSION, **result.to_dict()}
    (out / RESULT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return result.to_dict()


def build_table(result: QuickstartResult) -> Table:
    """The one table: accuracy, trained numbers and shipped bytes of each way, then the device."""
    table = Table(title="A user whose scans are turned and inverted", title_justify="left")
    table.add_column("")
    for name in ("accuracy", "trained", "shipped"):
        table.add_column(name, justify="right")
    numbers, size = result.training.run.metrics["trained_numbers"], result.export.adapter_bytes
    full, local, low_rank = result.rivals.full, result.rivals.full_local, result.rivals.lora
    rows: list[tuple[str, float, int | str, int | str]] = [
        ("base, on scans as it knows them", result.rivals.plain_accuracy, "-", "-"),
        ("base, on the user's scans", result.swap("base")["accuracy"], "-", "-"),
        ("tCURLoRA r8, trained on the workstation", result.swap("bundle")["accuracy"], numbers, size),
        ("LoRA r8 (peft), same sample", low_rank.accuracy, low_rank.trained_numbers, low_rank.shipped_bytes),
        ("full fine-tuning, same sample", full.accuracy, full.trained_numbers, full.shipped_bytes),
        ("tCURLoRA r8, personalised on the device", result.swap("personal")["accuracy"], numbers, 0),
        ("full fine-tuning on the user's local set", local.accuracy, local.trained_numbers, "-"),
    ]
    for name, score, trained, shipped in rows:
        table.add_row(
            name,
            f"{score:.1%}",
            f"{trained:,}" if isinstance(trained, int) else trained,
            format_size(shipped) if isinstance(shipped, int) else shipped,
        )
    return table


def build_device_table(result: QuickstartResult) -> Table:
    """What the device measured: memory against the budget, step and swap times, the base's digest."""
    personal = result.personal
    same = personal["base_digest_before"] == personal["base_digest_after"]
    table = Table(title="On the device (fresh process, torch cannot be imported)", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    peak, budget = personal["peak_rss_bytes"], personal["budget_bytes"]
    swaps = ", ".join(f"{item['swap_ms']:.2f}" for item in result.swaps["adapters"])
    for name, value in (
        ("engine", f"{personal['engine']}, micro-batch {personal['micro_batch']}"),
        ("peak resident memory", f"{format_size(peak)} of {format_size(budget)}"),
        ("seconds a step (16 scans)", f"{personal['step_seconds']:.4f}"),
        ("swap ms: base, workstation, personal, base", swaps),
        ("base.bin", f"{format_size(result.export.base_bytes)}, " + ("unchanged" if same else "CHANGED")),
    ):
        table.add_row(name, value)
    return table


def draw_plot(result: QuickstartResult, path: Path) -> None:
    """Loss and accuracy of both trainings, with the base and the rivals as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    workstation, personal = result.training.run.metrics, result.personal
    left.plot(workstation["losses"], label="workstation", color="tab:blue", linewidth=0.9)
    left.plot(personal["losses"], label="device", color="tab:orange", linewidth=0.9)
    left.set(xlabel="step", ylabel="loss", title="Training loss (only the factors move)", yscale="log")
    left.legend()
    lines = [
        ("base", result.swap("base")["accuracy"], "tab:gray", ":"),
        ("LoRA r8", result.rivals.lora.accuracy, "tab:green", "--"),
        ("full fine-tuning", result.rivals.full.accuracy, "tab:red", "-."),
        ("personal adapter", result.swap("personal")["accuracy"], "tab:orange", "-"),
    ]
    epochs = range(1, len(workstation["accuracies"]) + 1)
    right.plot(epochs, [100 * a for a in workstation["accuracies"]], label="tCURLoRA, workstation")
    for name, score, color, style in lines:
        right.axhline(100 * score, label=f"{name} {score:.1%}", color=color, linestyle=style)
    right.set(xlabel="epoch", ylabel="accuracy on the user's scans, %", ylim=(0, 100), title="Accuracy")
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
