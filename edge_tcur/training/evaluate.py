"""`eval`: a run's adapter, or its bare base, scored on labelled data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from edge_tcur.data import prepare
from edge_tcur.method.adapted import DEFAULT, Injection, inject
from edge_tcur.method.targets import group_specs
from edge_tcur.models import Base, load_base
from edge_tcur.tasks import find_task
from edge_tcur.training.loop import score_model
from edge_tcur.training.run import Run
from edge_tcur.training.train import read_data, set_threads
from edge_tcur_runtime.errors import BaseMismatchError, IncompatibleError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.factors import factor_parts
from edge_tcur_runtime.tasks import ACCURACY


@dataclass(frozen=True)
class EvalResult:
    """The task's metric for the adapter and for the base without it.

    Attributes:
        metric: its name.
        adapter_accuracy, base_accuracy: the scores, 0 to 1, where the metric is accuracy; else None.
    """

    metric: str
    adapter_score: float
    base_score: float
    adapter_accuracy: float | None
    base_accuracy: float | None
    samples: int


def load_run_base(run: Run) -> Base:
    """The base of a run, refused when it is no longer the one that was trained on.

    Raises:
        BaseMismatchError: its digest changed since training; both digests are named.
    """
    base = load_base(
        run.config.base, find_task(run.config.task), run.labels, {"max_length": run.config.max_length}
    )
    if base.digest != run.base_digest:
        raise BaseMismatchError(
            f"the base is now {base.digest}; the adapter was trained on {run.base_digest}",
            where=run.config.base,
            hint="restore the base that was trained on, or train again; a function must return the same "
            "weights at every call",
        )
    return base


def apply_adapter(base: Base, run: Run, adapter: Adapter) -> Injection:
    """Injects an adapter into its base, head included.

    Raises:
        BaseMismatchError: it was made for another base, other groups or another head.
        IncompatibleError: it answers with other labels than the run, or has other axes.
    """
    header = adapter.header
    if header.base_digest != base.digest:
        raise BaseMismatchError(
            f"the adapter was made for the base {header.base_digest}, this one is {base.digest}"
        )
    if header.labels != run.labels:
        raise IncompatibleError(
            f"the adapter's labels are {_listed(header.labels)}; the run's are {_listed(run.labels)}"
        )
    method = run.config.method()
    own = (method.coupling, method.domain, factor_parts(method.frame))
    if (theirs := (header.coupling, header.transform, factor_parts(header.frame))) != own:
        raise IncompatibleError(
            f"the adapter's coupling, transform and factors are {_axes(theirs)}; the run's are {_axes(own)}"
        )
    shapes = {n: tuple(value.shape) for n, value in base.extra_parameters(method.modules_to_save).items()}
    found = {name: value.shape for name, value in adapter.extras.items()}
    if found != shapes:
        raise BaseMismatchError(f"the adapter's head is {found}; the base takes {shapes}")
    injection = inject(base.model, method, keep=base.head, factors=adapter.factors)
    if header.groups != group_specs(injection.targets):
        injection.remove()
        raise BaseMismatchError("the adapter's groups name other weights than the run's settings give")
    with torch.no_grad():
        for name, parameter in (injection.adapters[DEFAULT].saved | base.head_parameters()).items():
            parameter.copy_(torch.from_numpy(adapter.extras[name].copy()))
    return injection


def _axes(values: tuple[str, str, tuple[str, ...]]) -> str:
    return ", ".join((*values[:2], "/".join(values[2])))


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")


def evaluate_run(run: Run, data: Path, *, adapter: Adapter | None = None) -> EvalResult:
    """Scores a run's adapter (or `adapter`, of the same base) and the bare base on `data`.

    Raises:
        DataError, BaseMismatchError: see `load_run_base` and `edge_tcur_runtime.data`.
    """
    set_threads(run.config.threads)
    task = find_task(run.config.task)
    base = load_run_base(run)
    dataset = read_data(str(data), task, run.config, base=base)
    prepared = prepare(dataset, run.labels, run.preprocessing, run.root, task)
    base_score = score_model(base.model, prepared, task)
    apply_adapter(base, run, adapter or run.adapter())
    scores = score_model(base.model, prepared, task), base_score
    accuracies = scores if task.metric.name == ACCURACY else (None, None)
    return EvalResult(
        metric=task.metric.name,
        adapter_score=scores[0],
        base_score=scores[1],
        adapter_accuracy=accuracies[0],
        base_accuracy=accuracies[1],
        samples=len(prepared),
    )
