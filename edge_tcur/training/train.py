"""`train`: from a base and a labelled sample to an adapter in a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edge_tcur import __version__
from edge_tcur.data import PreparedData, prepare
from edge_tcur.method.adapted import Injection, inject
from edge_tcur.method.targets import Targets
from edge_tcur.models import Base, base_digest, load_base
from edge_tcur.settings import TrainConfig
from edge_tcur.tasks import Task, find_task
from edge_tcur.training.loop import History, LoopSettings, fit
from edge_tcur.training.run import ADAPTER_FILE, Run, new_directory, write_run
from edge_tcur_runtime.data import Dataset, check_trainable, label_names, load_dataset, split
from edge_tcur_runtime.errors import ConfigError, OutputExistsError
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, GroupSpec, write_adapter


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
    return load_dataset(
        Path(path),
        task.kind,
        text_column=config.text_column,
        label_column=config.label_column,
        image_size=(int(spec["height"]), int(spec["width"])) if image else None,
        channels=int(spec["channels"]) if image else None,
    )


def read_labels(path: str, task: Task, config: TrainConfig) -> tuple[str, ...]:
    """The class names of training data, before the base is known.

    Raises:
        DataError: unreadable, or nothing can be learnt from it (no samples, one class).
    """
    root = Path(path)
    if task.kind == "image" and root.is_dir():  # a folder's images cannot be read without a size
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


def group_specs(targets: Targets) -> dict[str, GroupSpec]:
    """The groups as an adapter's header names them."""
    return {
        group.name: GroupSpec(tuple(f"{name}.weight" for name in group.modules), group.n1, group.n2)
        for group in targets.groups
    }


def build_adapter(base: Base, injection: Injection, config: TrainConfig, labels: tuple[str, ...]) -> Adapter:
    """The adapter file's content from a trained injection."""
    header = AdapterHeader(
        base_digest=base.digest,
        groups=group_specs(injection.targets),
        task=config.task,
        labels=labels,
        frame=config.frame,
        provenance={"tool": f"edge-tcur {__version__}", "selection": config.selection},
    )
    extras = {name: value.detach().cpu().numpy() for name, value in base.head_parameters().items()}
    return Adapter(header, injection.factors(), extras)


def train(
    config: TrainConfig,
    out: Path,
    *,
    force: bool = False,
    on_epoch: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Trains an adapter and writes a run directory, whole or not at all.

    Args:
        config: every setting. A base that is a directory is saved with its absolute path.
        out: the run directory; must not exist, or be empty, unless `force`.
        on_epoch: called with the epoch (from 1) and its mean loss, for progress.

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
        result = _train_into(config, work, on_epoch)
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
    data, test = (prepare(part, base.labels, base.preprocessing, work) for part in (dataset, held_out))
    return _Material(base, task, data, test)


def _train_into(
    config: TrainConfig, work: Path, on_epoch: Callable[[int, float], None] | None
) -> TrainResult:
    torch.manual_seed(config.seed)
    set_threads(config.threads)
    material = _load(config, work)
    base = material.base
    injection = inject(base.model, config.method(), keep=base.head)
    history = _fit(config, material, injection, on_epoch)
    adapter = build_adapter(base, injection, config, base.labels)
    injection.remove()
    if base_digest(base.model, base.head) != base.digest:
        raise AssertionError("training changed the frozen base")
    write_adapter(work / ADAPTER_FILE, adapter)
    metrics = _metrics(adapter, history, material, (work / ADAPTER_FILE).stat().st_size)
    run = Run(work, config, base.labels, base.digest, base.preprocessing, metrics)
    write_run(work, run)
    return TrainResult(run, injection.targets.skipped, (base.note,) if base.note else ())


def _fit(
    config: TrainConfig,
    material: _Material,
    injection: Injection,
    on_epoch: Callable[[int, float], None] | None,
) -> History:
    head = list(material.base.head_parameters().values())
    for parameter in head:
        parameter.requires_grad_(True)
    try:
        return fit(
            material.base.model,
            [(injection.parameters(), config.learning_rate), (head, config.head_learning_rate)],
            material.data,
            material.task,
            LoopSettings(config.epochs, config.batch_size, config.weight_decay, seed=config.seed),
            held_out=material.held_out if len(material.held_out) else None,
            on_epoch=on_epoch,
        )
    except FloatingPointError as error:
        rates = f"{config.learning_rate:g}" + (f" (head {config.head_learning_rate:g})" if head else "")
        raise ConfigError(
            f"training diverged at the learning rate {rates}: {error}",
            where="learning_rate",
            hint="lower it, for example by a factor of 10, or use the orthonormal frame",
        ) from error


def _metrics(adapter: Adapter, history: History, material: _Material, size: int) -> dict[str, object]:
    return {
        "accuracy": history.accuracies[-1] if history.accuracies else None,
        "accuracies": history.accuracies,
        "losses": history.losses,
        "trained_numbers": adapter.trained_numbers,
        "head_numbers": adapter.extra_numbers,
        "adapter_bytes": size,
        "samples": len(material.data),
        "held_out_samples": len(material.held_out),
        "seconds": history.seconds,
        "step_seconds": history.seconds_per_step,
    }
