"""`edge-tcur-device personalize`: fine-tune on local data and put the better adapter in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur_runtime.cli.framework import (
    EXISTING_DIRECTORY,
    SIZE,
    add_options,
    data_options,
    output_options,
    store_option,
)
from edge_tcur_runtime.cli.plan import privacy_rows, show_plan
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.settings import (
    HOLDOUT,
    OPTIMIZERS,
    RECOMPUTE,
    RESUME,
    Gate,
    KeepSettings,
    PersonalizeSettings,
    PrivacySettings,
)
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.cli.ending import Ending
    from edge_tcur_runtime.data import Dataset
    from edge_tcur_runtime.formats.adapter import Adapter
    from edge_tcur_runtime.formats.bundle import Bundle
    from edge_tcur_runtime.personalize import PersonalizeResult

EPILOG = """\b
Examples:
  edge-tcur-device personalize bundle/ --data mine.csv --budget 256MiB
  edge-tcur-device personalize bundle/ --data mine.csv --start base --epochs 40 --json
  edge-tcur-device personalize bundle/ --data mine.csv --patience 3 --forget 0.05
  edge-tcur-device personalize bundle/ --data mine.csv --optimizer sgd --momentum 0.9
  edge-tcur-device personalize bundle/ --data mine.csv --private --epsilon 8
  edge-tcur-device personalize bundle/ --data mine.csv --mains-only --between 01:00-05:30
"""


CHECKPOINTS = "checkpoints"  # folder of the store
_DEFAULT = PersonalizeSettings()
_ENGINES = click.Choice(("auto", "ort-training", "ort-step", "executorch"))
_OPTIONS = (
    ("--epochs", _DEFAULT.epochs, int, "Passes over the data."),
    ("--batch-size", _DEFAULT.batch_size, int, "Samples per update, whatever the memory allows at once."),
    ("--weight-decay", _DEFAULT.optimizer.weight_decay, float, "Pulls the factors back towards the base."),
    (
        "--patience",
        _DEFAULT.patience,
        int,
        "Epochs without a lower held-out loss that end the run; 0: run all, keep the last.",
    ),
    (
        "--forget",
        _DEFAULT.forget,
        float,
        "How far it may fall behind on the bundle's reference set: points of a share, part of an error.",
    ),
    ("--engine", _DEFAULT.engine, _ENGINES, "What computes the gradients."),
    ("--provider", _DEFAULT.provider, str, "What runs the graph: auto, cpu, webgpu, cuda, coreml, ..."),
    (
        "--recompute",
        _DEFAULT.recompute,
        click.Choice(RECOMPUTE),
        "Less memory for more time; auto: if needed.",
    ),
    ("--threads", _DEFAULT.threads, int, "CPU threads; 0 takes all, with --budget the fastest that fit."),
    ("--seed", _DEFAULT.seed, int, "Seed of the split and of the order."),
)
_PRIVACY = (
    ("--noise-multiplier", float, "Noise over the bound of a gradient.  [default: 1]"),
    ("--epsilon", float, "What the run may spend; the noise follows from it."),
    ("--clip", float, f"Bound of each sample's gradient.  [default: {PrivacySettings().clip:g}]"),
    ("--delta", float, "Chance that the promise fails.  [default: 1 / n^1.1]"),
    ("--noise-seed", int, "Repeatable noise, for tests: nothing is promised."),
)
_RATES = (
    ("--learning-rate", "Peak learning rate of the cores."),
    ("--head-learning-rate", "Peak for a trained head."),
    ("--momentum", "Part of the last update that goes on."),
)
_KEEP = KeepSettings()


def _by_optimizer(name: str) -> str:
    """The default of an option of the optimisers, as the help tells it."""
    key = name.removeprefix("--").replace("-", "_")
    found = {optimizer: getattr(kind(), key, None) for optimizer, kind in OPTIMIZERS.items()}
    return ", ".join(f"{optimizer} {value:g}" for optimizer, value in found.items() if value is not None)


# These become `PersonalizeSettings`; collected under ``training``.
_training_options = add_options(
    click.option("--optimizer", default="adamw", type=click.Choice(tuple(OPTIMIZERS)), show_default=True,
                 help="What moves the factors."),
    click.option("--private", is_flag=True, help="Train with differential privacy (DP-SGD)."),
    *(click.option(name, type=kind, help=text) for name, kind, text in _PRIVACY),
    click.option("--holdout", type=float, help="Part of the data kept apart to judge the new adapter.  "
                 f"[default: {HOLDOUT:g}; 0 with --private]"),
    *(click.option(name, type=float, help=f"{text}  [default: {_by_optimizer(name)}]")
      for name, text in _RATES),
    *(click.option(name, default=default, type=kind, show_default=True, help=text)
      for name, default, kind, text in _OPTIONS),
)  # fmt: skip

# These become `KeepSettings`; collected under ``training`` too.
_keeping_options = add_options(
    click.option("--checkpoint-seconds", default=_KEEP.seconds, type=float, show_default=True,
                 help="Seconds between checkpoints; a run that was killed goes on from the last one."),
    click.option("--resume", default=_KEEP.resume, type=click.Choice(RESUME), show_default=True,
                 help="Go on from a checkpoint of this very run: if there is one, always, or never."),
    click.option("--mains-only", is_flag=True, help="Pause while the device runs on its battery."),
    click.option("--max-temperature", type=float, metavar="CELSIUS", help="Pause above it."),
    click.option("--between", metavar="HH:MM-HH:MM", help="Pause outside these hours (local time)."),
)  # fmt: skip


@click.command(epilog=EPILOG)
@click.argument("bundle", type=EXISTING_DIRECTORY)
@data_options(required=True)
@click.option("--budget", type=SIZE, help="Peak memory of this whole process, e.g. 256MiB.")
@click.option("--last-blocks", is_flag=True, help="Train the last blocks alone (export --last-blocks).")
@click.option("--allow-last-blocks", is_flag=True, help="Do so where nothing else fits the budget.")
@click.option("--start", default="active", show_default=True, metavar="REF",
              help="Start from: base, bundle, active, a file, or a name or digest in the store.")  # fmt: skip
@click.option("--name", default="personal", show_default=True, help="Name in the store.")
@click.option("--dry-run", is_flag=True, help="Show what would run, with memory and time; change nothing.")
@click.option("--all", "every", is_flag=True, help="With --dry-run: every candidate, pointless ones too.")
@click.option("--keep-active", is_flag=True, help="Install the adapter, but leave the active one in use.")
@click.option(
    "--accept-unjudged",
    is_flag=True,
    help="Let an adapter that nothing judged take the place of one that was (--private).",
)
@_training_options
@_keeping_options
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
    started from, and than the active one, on a part of the data that was kept apart, does not fall
    behind on the bundle's reference set where it has one (edge-tcur export --reference), and
    passes its health check. What nothing judged (--private) takes no judged adapter's place.

    Killed, paused (SIGTERM, or a gate such as --mains-only: exit code 9) or stopped by the budget,
    the same command goes on from its last checkpoint and ends with the very same adapter.
    """
    from edge_tcur_runtime.cli.ending import Ending
    from edge_tcur_runtime.origin import content_digest
    from edge_tcur_runtime.store import check_name
    from edge_tcur_runtime.trial import Incumbent

    check_name(name)
    keep_active, accept, dry_run, every = (
        bool(training.pop(key)) for key in ("keep_active", "accept_unjudged", "dry_run", "every")
    )
    if keep_active and accept:
        raise UsageError("--keep-active puts nothing in use", hint="leave --accept-unjudged out")
    if every and not dry_run:
        raise UsageError("--all is of the candidates that --dry-run shows", hint="add --dry-run")
    keep = _keep(training, store / CHECKPOINTS / name)
    settings = _settings(training, budget)
    if dry_run:
        show_plan(bundle, data, columns, (start, store), settings, sink, every=every)
        return
    given = _read(bundle, data, columns, (start, store), budget, sink)
    in_use = Incumbent(store, given[0])
    ending = Ending(keep, store, name, sink, keep_active, in_use, given[0], budget, accept)
    if ending.came_before(*given, settings):
        return
    result = _run(*given, settings, ending)
    kept = result.adapter if result.better else None
    digest = None if kept is None else content_digest(kept)
    name = ending.settle_name(bool(result.judged_by))
    ending.put_away(kept, _payload(result, digest, name), _report(result, digest, name))


def _settings(training: dict[str, Any], budget: int | None) -> PersonalizeSettings:
    kind = training.pop("optimizer")
    rates = {name: training.pop(name) for name in ("learning_rate", "head_learning_rate", "momentum")}
    if rates["momentum"] is not None and kind != "sgd":
        raise UsageError("--momentum is for gradient descent", hint="add --optimizer sgd")
    given = {name: value for name, value in rates.items() if value is not None}
    optimizer = OPTIMIZERS[kind](weight_decay=training.pop("weight_decay"), **given)
    privacy = _privacy(training)
    return PersonalizeSettings(optimizer=optimizer, budget=budget, privacy=privacy, **training)


def _privacy(training: dict[str, Any]) -> PrivacySettings | None:
    """Takes the options of privacy out of `training`."""
    private, names = training.pop("private"), [name for name, _, _ in _PRIVACY]
    found = {name: training.pop(name.removeprefix("--").replace("-", "_")) for name in names}
    given = {name: value for name, value in found.items() if value is not None}
    if given and not private:
        raise UsageError(f"{next(iter(given))} is for differential privacy", hint="add --private")
    if not private:
        return None
    return PrivacySettings(**{name[2:].replace("-", "_"): value for name, value in given.items()})


def _keep(training: dict[str, Any], directory: Path) -> KeepSettings:
    """Takes the options of keeping out of `training`."""
    from edge_tcur_runtime.gates import Cool, Hours, MainsPower

    gates: list[Gate] = [MainsPower()] if training.pop("mains_only") else []
    if (limit := training.pop("max_temperature")) is not None:
        gates.append(Cool(limit))
    if (hours := training.pop("between")) is not None:
        gates.append(Hours.parse(hours))
    return KeepSettings(directory, training.pop("checkpoint_seconds"), training.pop("resume"), gates)


def _read(
    root: Path,
    data: Path,
    columns: dict[str, str],
    start: tuple[str, Path],
    budget: int | None,
    sink: Sink,
) -> tuple[Bundle, Adapter | None, Dataset]:
    """`start`: the reference of the adapter to start from, and the store that it may lie in."""
    from edge_tcur_runtime.cli.inputs import load_for
    from edge_tcur_runtime.cli.references import load_start
    from edge_tcur_runtime.formats.bundle import open_bundle

    bundle = open_bundle(root)
    dataset = load_for(bundle, data, columns, require_labels=True)
    return bundle, load_start(start[0], bundle, start[1], sink, budget=budget), dataset


def _run(
    bundle: Bundle,
    begin: Adapter | None,
    dataset: Dataset,
    settings: PersonalizeSettings,
    ending: Ending,
) -> PersonalizeResult:
    from edge_tcur_runtime.personalize import personalize as run

    in_use = None if ending.keep_active else ending.incumbent
    with ending.sink.steps("personalizing") as advance:
        result = run(
            bundle,
            dataset,
            settings,
            start=begin,
            keep=ending.keep,
            in_use=in_use,
            accept_unjudged=ending.accept_unjudged,
            on_step=advance,
        )
    for note in result.notes:
        ending.sink.note(note)
    return result


def _payload(result: PersonalizeResult, digest: str | None, name: str) -> dict[str, object]:
    fields = {key: value for key, value in vars(result).items() if key != "adapter"}
    return {
        **fields,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "accuracies": result.accuracies,
        "installed": digest,
        "installed_as": None if digest is None else name,
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
        ("graph", result.graph),
        ("threads", str(result.threads)),
        ("provider", f"{result.provider} ({result.provider_reason})"),
        (f"held-out {metric.name}", f"{show(result.score_before)} -> {show(result.score_after)}"),
        ("held-out loss", f"{_number(result.loss_before)} -> {_number(result.loss_after)}"),
        *_compared_rows(result, show),
        *_reference_rows(result, show),
        *privacy_rows(result.privacy),
        ("trained numbers", f"{result.adapter.trained_numbers:,} + head {result.adapter.extra_numbers:,}"),
        ("peak memory", f"{format_size(result.peak_rss_bytes)} of {budget}"),
        *([("predicted", format_size(predicted))] if (predicted := result.predicted_peak_bytes) else []),
        ("micro-batch", str(result.micro_batch)),
        ("seconds a step", f"{result.step_seconds:.4f}"),
        *([("gone on from update", str(result.resumed_from))] if result.resumed_from else []),
        ("base", "unchanged" if result.base_digest_before == result.base_digest_after else "CHANGED"),
    ]
    end = f"installed as {name!r}: {digest}" if digest else "nothing was installed"
    end = f"{result.verdict}: {end}"
    if result.withheld is not None:
        end += (
            f"\nnot put in use: {result.withheld}"
            f"\nuse it with: edge-tcur-device adapters activate {name} (--accept-unjudged would have)"
        )
    return f"{table(('', 'value'), rows)}\n{end}"


def _compared_rows(result: PersonalizeResult, show: Callable[[float | None], str]) -> list[tuple[str, str]]:
    """Of what was trained on where nothing was held out, and of the adapter in use where it is another."""
    rows, own = [], result.training
    if own is not None:
        rows.append(("on what was trained on", f"{show(own['score_before'])} -> {show(own['score_after'])}"))
    if result.in_use is not None:
        rows.append(("the adapter in use", show(result.in_use["score"])))
    return rows


def _reference_rows(result: PersonalizeResult, show: Callable[[float | None], str]) -> list[tuple[str, str]]:
    found = result.reference
    if found is None:
        return []
    change = f"{show(found['score_before'])} -> {show(found['score_after'])}"
    return [("on the reference set", f"{change} ({found['measure']}: {show(found['score'])})")]
