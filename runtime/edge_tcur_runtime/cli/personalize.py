"""`edge-tcur-device personalize`: fine-tune on local data and put the better adapter in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur_runtime.cli.framework import (
    EXISTING_DIRECTORY,
    SIZE,
    data_options,
    output_options,
    store_option,
)
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.personalize import PersonalizeResult

EPILOG = """\b
Examples:
  edge-tcur-device personalize bundle/ --data mine.csv --budget 256MiB
  edge-tcur-device personalize bundle/ --data mine.csv --start base --epochs 40 --json
"""


_DEFAULT = PersonalizeSettings()
_ENGINES = click.Choice(("auto", "ort-training", "ort-step"))
_OPTIONS = (
    ("--epochs", _DEFAULT.epochs, int, "Passes over the data."),
    ("--batch-size", _DEFAULT.batch_size, int, "Samples per update, whatever the memory allows at once."),
    ("--learning-rate", _DEFAULT.optimizer.learning_rate, float, "Peak learning rate of the cores."),
    ("--head-learning-rate", _DEFAULT.optimizer.head_learning_rate, float, "Peak for a trained head."),
    ("--weight-decay", _DEFAULT.optimizer.weight_decay, float, "Pulls the factors back towards the base."),
    ("--holdout", _DEFAULT.holdout, float, "Part of the data kept apart to judge the new adapter."),
    ("--engine", _DEFAULT.engine, _ENGINES, "What computes the gradients."),
    ("--threads", _DEFAULT.threads, int, "CPU threads; 0 takes all."),
    ("--seed", _DEFAULT.seed, int, "Seed of the split and of the order."),
)


def _training_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that become `PersonalizeSettings`; collected under ``training``."""
    for name, default, kind, text in reversed(_OPTIONS):
        command = click.option(name, default=default, type=kind, show_default=True, help=text)(command)
    return command


@click.command(epilog=EPILOG)
@click.argument("bundle", type=EXISTING_DIRECTORY)
@data_options(required=True)
@click.option("--budget", type=SIZE, help="Peak memory of this whole process, e.g. 256MiB.")
@click.option("--start", default="active", show_default=True, metavar="REF",
              help="Start from: base, bundle, active, a file, or a name or digest in the store.")  # fmt: skip
@click.option("--name", default="personal", show_default=True, help="Name in the store.")
@click.option("--keep-active", is_flag=True, help="Install the adapter, but leave the active one in use.")
@_training_options
@store_option
@output_options
def personalize(
    bundle: Path,
    data: Path,
    columns: dict[str, str],
    budget: int | None,
    start: str,
    name: str,
    store: Path,
    sink: Sink,
    **training: Any,
) -> None:
    """Fine-tune the factors on your own labelled DATA. The base is only read, nothing is uploaded.

    The new adapter goes to the store and is put in use only if it is better than the one it
    started from on a part of the data that was kept apart.
    """
    from edge_tcur_runtime.store import check_name

    check_name(name)
    keep_active = bool(training.pop("keep_active"))
    settings = _settings(training, budget)
    result = _run(bundle, data, columns, start, store, settings, sink)
    digest = _install(result, store, name, keep_active) if result.better else None
    sink.result(_payload(result, digest), _report(result, digest, name))


def _settings(training: dict[str, Any], budget: int | None) -> PersonalizeSettings:
    optimizer = AdamWSettings(
        learning_rate=training.pop("learning_rate"),
        head_learning_rate=training.pop("head_learning_rate"),
        weight_decay=training.pop("weight_decay"),
    )
    return PersonalizeSettings(optimizer=optimizer, budget=budget, **training)


def _run(
    root: Path,
    data: Path,
    columns: dict[str, str],
    start: str,
    store: Path,
    settings: PersonalizeSettings,
    sink: Sink,
) -> PersonalizeResult:
    from edge_tcur_runtime.cli.inputs import load_for
    from edge_tcur_runtime.cli.references import load_reference
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import personalize as run

    bundle = open_bundle(root)
    dataset = load_for(bundle, data, columns, require_labels=True)
    begin = load_reference(start, bundle, store)
    with sink.steps("personalizing") as advance:
        return run(bundle, dataset, settings, start=begin, on_step=advance)


def _install(result: PersonalizeResult, store: Path, name: str, keep_active: bool) -> str:
    from edge_tcur_runtime.formats.adapter import serialize_adapter
    from edge_tcur_runtime.store import Store

    opened = Store.open(store)
    digest = opened.install(serialize_adapter(result.adapter), name=name)
    if not keep_active:
        opened.activate(digest)
    return digest


def _payload(result: PersonalizeResult, digest: str | None) -> dict[str, object]:
    fields = {key: value for key, value in vars(result).items() if key != "adapter"}
    return {
        **fields,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "accuracies": result.accuracies,
        "installed": digest,
        "trained_numbers": result.adapter.trained_numbers,
        "head_numbers": result.adapter.extra_numbers,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _report(result: PersonalizeResult, digest: str | None, name: str) -> str:
    from edge_tcur_runtime.tasks import find_device_task

    metric = find_device_task(result.adapter.header.task).metric

    def show(value: float | None) -> str:
        return "-" if value is None else metric.format(value)

    budget = "none" if result.budget_bytes is None else format_size(result.budget_bytes)
    rows = [
        ("engine", f"{result.engine} ({result.engine_reason})"),
        (f"held-out {metric.name}", f"{show(result.score_before)} -> {show(result.score_after)}"),
        ("held-out loss", f"{_number(result.loss_before)} -> {_number(result.loss_after)}"),
        ("trained numbers", f"{result.adapter.trained_numbers:,} + head {result.adapter.extra_numbers:,}"),
        ("peak memory", f"{format_size(result.peak_rss_bytes)} of {budget}"),
        ("micro-batch", str(result.micro_batch)),
        ("seconds a step", f"{result.step_seconds:.4f}"),
        ("base", "unchanged" if result.base_digest_before == result.base_digest_after else "CHANGED"),
    ]
    end = f"installed as {name!r}: {digest}" if digest else "not better than before: nothing was installed"
    return f"{table(('', 'value'), rows)}\n{end}"
