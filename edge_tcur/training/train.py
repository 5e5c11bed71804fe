"""`train`: from a base and a labelled sample to an adapter in a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edge_tcur import __version__
from edge_tcur.data import PreparedData, prepare
from edge_tcur.method.adapted import Injection, inject
from edge_tcur.method.allocation import share_out
from edge_tcur.method.selection import GRADIENT, UPDATE
from edge_tcur.method.targets import Targets, find_targets, group_specs
from edge_tcur.models import Base, base_digest, load_base
from edge_tcur.settings import TrainConfig
from edge_tcur.tasks import Task, find_task
from edge_tcur.training.gradients import task_gradients
from edge_tcur.training.head import warm_head
from edge_tcur.training.loop import History, LoopSettings, fit
from edge_tcur.training.rehearsal import rehearsal_rate, rehearse
from edge_tcur.training.run import ADAPTER_FILE, Run, new_directory, write_run
from edge_tcur_runtime.data import Dataset, Layout, check_trainable, label_names, read_dataset, split
from edge_tcur_runtime.data.targets import LABEL
from edge_tcur_runtime.errors import ConfigError, OutputExistsError
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, write_adapter
from edge_tcur_runtime.preprocess import image_size
from edge_tcur_runtime.tasks import ACCURACY


@dataclass(frozen=True)
class TrainResult:
    """A finished run, the reasons why weights were left alone, and what the user should know."""

    run: Run
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()


def read_data(path: str, task: Task, config: TrainConfig, *, base: Base | None = None) -> Dataset:
    """Labelled data of the task's kind; pictures in the size and channels of `base`.

    Raises:
        DataError: see `edge_tcur_runtime.data`.
    """
    spec = base.preprocessing if base is not None else {}
    image = spec.get("kind") == "image"
    layout = Layout(
        task.kind,
        task.reads,
        text_column=config.text_column,
        label_column=config.label_column,
        image_size=image_size(spec) if image else None,
        channels=int(spec["channels"]) if image else None,
    )
    return read_dataset(Path(path), layout)


def read_labels(path: str, task: Task, config: TrainConfig) -> tuple[str, ...]:
    """What the outputs are called, from training data, before the base is known.

    Raises:
        DataError: unreadable, or nothing can be learnt from it (no samples, one class).
    """
    root = Path(path)
    if (
        task.reads == LABEL and task.kind == "image" and root.is_dir()
    ):  # a folder's images cannot be read without a size
        names = tuple(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        dataset = Dataset(task.kind, names, names, path, names)
    else:
        dataset = read_data(path, task, config)
    check_trainable(dataset)
    return label_names(dataset)


def set_threads(count: int) -> None:
    """Sets torch's CPU threads; 0 takes all cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    torch.set_num_threads(min(count or cores, cores))


def build_adapter(base: Base, injection: Injection, config: TrainConfig, labels: tuple[str, ...]) -> Adapter:
    """The adapter file's content from a trained injection."""
    header = AdapterHeader(
        base_digest=base.digest,
        groups=group_specs(injection.targets),
        task=config.task,
        labels=labels,
        coupling=config.coupling,
        transform=config.method().domain,
        frame=config.frame,
        alpha=config.alpha,
        provenance={"tool": f"edge-tcur {__version__}", "selection": config.selection},
    )
    extras = base.extra_parameters(config.method().modules_to_save)
    return Adapter(header, injection.factors(), {name: value_of(value) for name, value in extras.items()})


def value_of(parameter: torch.Tensor) -> np.ndarray:
    """A parameter as the adapter file holds it."""
    value: np.ndarray = parameter.detach().float().cpu().numpy()
    return value


def train(
    config: TrainConfig,
    out: Path,
    *,
    force: bool = False,
    on_epoch: Callable[[int, float], None] | None = None,
    on_rehearsal: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Trains an adapter and writes a run directory, whole or not at all.

    Args:
        config: every setting. A base that is a directory is saved with its absolute path.
        out: the run directory; must not exist, or be empty, unless `force`.
        on_epoch: called with the epoch (from 1) and its mean loss, for progress.
        on_rehearsal: the same of the rehearsal that the selection ``update`` begins with.

    Raises:
        DataError, ConfigError, BaseModelError, OutputExistsError, DiskError: before or instead of
            writing anything at `out`.
    """
    for name in ("base", "data"):
        if not getattr(config, name):
            raise ConfigError("no value given", where=name, hint=f"say --{name}")
    if Path(config.base).is_dir():
        config = replace(config, base=str(Path(config.base).resolve()))
    _protect_inputs(config, out)
    with new_directory(out, force=force) as work:
        result = _train_into(config, work, on_epoch, on_rehearsal)
    return replace(result, run=replace(result.run, root=out))


def _protect_inputs(config: TrainConfig, out: Path) -> None:
    """Refuses to replace a directory that holds the base or the data."""
    for name in ("base", "data", "eval_data"):
        path = Path(getattr(config, name)) if getattr(config, name) else None
        if path is not None and path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputExistsError(
                f"the output directory holds the {name.replace('_', ' ')}",
                where=str(out),
                hint="choose another --out",
            )


@dataclass(frozen=True)
class _Material:
    """What training reads: the base, training samples and held-out samples."""

    base: Base
    task: Task
    data: PreparedData
    held_out: PreparedData


def _load(config: TrainConfig, work: Path) -> _Material:
    """Reads base and data; the base's tokenizer goes to `work`."""
    task = find_task(config.task)
    names = read_labels(config.data, task, config)
    base = load_base(config.base, task, names, {"max_length": config.max_length})
    dataset = read_data(config.data, task, config, base=base)
    if config.eval_data:
        held_out = read_data(config.eval_data, task, config, base=base)
    else:
        dataset, held_out = split(dataset, config.eval_fraction, config.seed)
    if base.tokenizer is not None:
        (work / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")
    data, test = (prepare(part, base.labels, base.preprocessing, work, task) for part in (dataset, held_out))
    return _Material(base, task, data, test)


def _train_into(
    config: TrainConfig,
    work: Path,
    on_epoch: Callable[[int, float], None] | None,
    on_rehearsal: Callable[[int, float], None] | None,
) -> TrainResult:
    torch.manual_seed(config.seed)
    set_threads(config.threads)
    material = _load(config, work)
    base = material.base
    targets = find_targets(base.model, config.method(), keep=base.head)
    if config.selection == UPDATE and not config.rehearsal_rate:
        config = replace(config, rehearsal_rate=rehearsal_rate(targets))
    directions = _prepare(config, material, targets, on_rehearsal)
    if config.rank_budget and directions is not None:
        config = config.with_ranks(share_out(base.model, directions, config.rank_budget, config.frame))
    injection = inject(base.model, config.method(), keep=base.head, directions=directions)
    history = _fit(config, material, injection, on_epoch)
    adapter, skipped = build_adapter(base, injection, config, base.labels), injection.targets.skipped
    injection.remove()
    if base_digest(base.model, base.head) != base.digest:
        raise AssertionError("training changed the frozen base")
    write_adapter(work / ADAPTER_FILE, adapter)
    metrics = _metrics(adapter, history, material, (work / ADAPTER_FILE).stat().st_size)
    run = Run(work, config, base.labels, base.digest, base.preprocessing, metrics)
    write_run(work, run)
    return TrainResult(run, skipped, (base.note,) if base.note else ())


def _prepare(
    config: TrainConfig,
    material: _Material,
    targets: Targets,
    on_rehearsal: Callable[[int, float], None] | None,
) -> dict[str, torch.Tensor] | None:
    """Warms up a new head; what the selection looks at besides the weights, or None."""
    base, data, task = material.base, material.data, material.task
    settings = LoopSettings(config.head_epochs, config.batch_size, seed=config.seed)
    with _divergence(config, base):
        warm_head(base, data, task, settings, config.head_learning_rate)
    if config.selection == UPDATE:
        with _divergence(config, base, "rehearsal_rate"):
            return rehearse(
                base, targets, data, task,
                LoopSettings(config.epochs, config.batch_size, config.weight_decay, seed=config.seed),
                rate=config.rehearsal_rate,
                head_rate=config.head_learning_rate,
                on_epoch=on_rehearsal,
            )  # fmt: skip
    if config.selection != GRADIENT:
        return None
    with _divergence(config, base):
        return task_gradients(
            base.model, targets, data, task, batch_size=config.batch_size, batches=config.gradient_batches,
            seed=config.seed,
        )  # fmt: skip


@contextmanager
def _divergence(config: TrainConfig, base: Base, field: str = "learning_rate") -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        rates = f"{getattr(config, field):g}" + (
            f" (head {config.head_learning_rate:g})" if base.head else ""
        )
        raise ConfigError(
            f"training diverged at the learning rate {rates}: {error}",
            where=field,
            hint="lower it, for example by a factor of 10, or use the orthonormal frame",
        ) from error


def _fit(
    config: TrainConfig,
    material: _Material,
    injection: Injection,
    on_epoch: Callable[[int, float], None] | None,
) -> History:
    head = list(material.base.head_parameters().values())
    for parameter in head:
        parameter.requires_grad_(True)
    cores, saved = injection.trained()
    extras = list(dict.fromkeys(head + saved))  # modules_to_save may name the new head too
    with _divergence(config, material.base):
        return fit(
            material.base.model,
            [(cores, config.learning_rate), (extras, config.head_learning_rate)],
            material.data,
            material.task,
            LoopSettings(config.epochs, config.batch_size, config.weight_decay, seed=config.seed),
            held_out=material.held_out if len(material.held_out) else None,
            on_epoch=on_epoch,
        )


def _accuracies(metric: str, scores: list[float]) -> dict[str, object]:
    """The scores under the names of an accuracy, where they are one."""
    if metric != ACCURACY:
        return {"accuracy": None, "accuracies": []}
    return {"accuracy": scores[-1] if scores else None, "accuracies": scores}


def _metrics(adapter: Adapter, history: History, material: _Material, size: int) -> dict[str, object]:
    metric = material.task.metric
    return {
        "metric": metric.name,
        "score": history.scores[-1] if history.scores else None,
        "scores": history.scores,
        **_accuracies(metric.name, history.scores),
        "losses": history.losses,
        "trained_numbers": adapter.trained_numbers,
        "head_numbers": adapter.extra_numbers,
        "adapter_bytes": size,
        "samples": len(material.data),
        "held_out_samples": len(material.held_out),
        "seconds": history.seconds,
        "step_seconds": history.seconds_per_step,
    }
