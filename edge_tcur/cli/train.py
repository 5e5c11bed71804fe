"""`edge-tcur train`: from a base and labelled data to an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_tcur.cli.inspect import describe_groups, group_rows
from edge_tcur.cli.options import force_option, run_out_option
from edge_tcur.cli.progress import stage_bar
from edge_tcur.method.config import PRESETS
from edge_tcur.method.selection import UPDATE
from edge_tcur.settings import TrainConfig, config_from_dict, read_config
from edge_tcur_runtime.cli.framework import add_options, output_options
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.output import Sink
from edge_tcur_runtime.tasks import find_device_task
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur.training import TrainResult
    from edge_tcur_runtime.formats.adapter import Adapter

EPILOG = """\b
Examples:
  edge-tcur train --base all-MiniLM-L6-v2 --data intents.csv --out run/
  edge-tcur train --base vit/ --data digits.npz --task image-classification --out run/
  edge-tcur train --preset sketch --rank 16 --base all-MiniLM-L6-v2 --data intents.csv --out run/
  edge-tcur train --config train.toml --rank 16 --out run/ --force
"""
_METAVARS = {str: "TEXT", int: "N", float: "X"}


def _setting(item: Field[Any]) -> Callable[..., Any]:
    """The option of a field of `TrainConfig`."""
    choices = item.metadata["choices"]
    return click.option(
        f"--{item.name.replace('_', '-')}",
        item.name,
        type=click.Choice(choices) if choices else type(item.default),
        default=item.default,
        show_default=item.default != "",
        metavar=None if choices else _METAVARS[type(item.default)],
        help=item.metadata["help"],
    )


@click.command("train", epilog=EPILOG)
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="Settings as TOML.")
@click.option(
    "--preset",
    type=click.Choice(tuple(PRESETS)),
    help="Named choice of grouping, coupling, transform, selection and frame; single settings override it.",
)
@add_options(*map(_setting, fields(TrainConfig)))
@run_out_option
@force_option
@output_options
@click.pass_context
def train(
    context: click.Context, /, file: Path | None, out: Path, force: bool, sink: Sink, **options: object
) -> None:
    """Train a tCURLoRA adapter on labelled data and write a run directory.

    A setting is taken from the command line, else from the --config file (the same names, with
    underscores), else its default. Nothing is written unless the whole run succeeds.
    """
    config = _resolve(file, _given(context, options))
    from edge_tcur.training import train as train_adapter

    phases = 2 if config.selection == UPDATE else 1
    with stage_bar(sink, "loading", total=phases * config.epochs) as bar:

        def show(stage: str, epoch: int, loss: float) -> None:
            bar.stage(stage)
            bar.advance(detail=f"epoch {epoch}/{config.epochs}, loss {loss:.3f}")

        result = train_adapter(
            config,
            out,
            force=force,
            on_epoch=partial(show, "training"),
            on_rehearsal=partial(show, "rehearsing"),
        )
    for note in result.notes:
        sink.note(f"note: {note}")
    adapter = result.run.adapter()
    sink.result(_payload(result, adapter), _describe(result, adapter))


def _given(context: click.Context, options: Mapping[str, object]) -> dict[str, object]:
    """The settings that were given, not their defaults."""
    return {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _resolve(file: Path | None, given: dict[str, object]) -> TrainConfig:
    axes = PRESETS[str(given["preset"])] if "preset" in given else {}
    values = {**axes, **(read_config(file) if file is not None else {}), **given}
    values.pop("preset", None)
    for name in ("base", "data"):
        if not values.get(name):
            raise UsageError(
                f"no {name} was named", where=f"--{name}", hint=f"say --{name}, or set it in a --config file"
            )
    return config_from_dict(values, "--config")


def _payload(result: TrainResult, adapter: Adapter) -> dict[str, object]:
    run = result.run
    series = ("losses", "scores", "accuracies")
    measured = {key: value for key, value in run.metrics.items() if key not in series}
    return {
        "run": str(run.root),
        "adapter": str(run.adapter_path),
        "base_digest": run.base_digest,
        "task": run.config.task,
        "labels": list(run.labels),
        "rank": run.config.rank,
        "groups": describe_groups(adapter),
        **measured,
        "steps": len(run.metrics["losses"]),
        **{key: run.metrics[key] for key in series},
        "skipped": result.skipped,
        "notes": list(result.notes),
        "config": run.config.to_dict(),
    }


def _describe(result: TrainResult, adapter: Adapter) -> str:
    run, metrics = result.run, result.run.metrics
    metric = find_device_task(run.config.task).metric
    held_out = metrics["held_out_samples"]
    scored = "no held-out samples"
    if metrics["score"] is not None:
        scored = f"{metric.format(metrics['score'])} of {held_out} held-out samples"
    lines = [
        group_rows(adapter),
        "",
        f"trained numbers    {metrics['trained_numbers']:,}",
        f"head numbers       {metrics['head_numbers']:,}",
        f"adapter            {format_size(metrics['adapter_bytes'])}",
        f"{metric.name:<19}{scored}",
        f"seconds a step     {metrics['step_seconds']:.3f} ({len(metrics['losses'])} steps)",
        f"base               {run.base_digest}",
        *_skipped_lines(result.skipped),
        "",
        f"wrote {run.adapter_path}",
        f"next: edge-tcur export {run.root} --out bundle/",
    ]
    return "\n".join(lines)


def _skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    if not skipped:
        return []
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines = ["", "left alone"]
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more (all of them with --json)" if len(names) > 1 else ""
        lines.append(f"  {names[0]}{more}: {reason}")
    return lines
