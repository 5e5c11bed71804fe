"""The Protocol of a training engine, and the choice of one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_tcur_runtime.engines.providers import AUTO, CPU, ON_CPU, Placement
from edge_tcur_runtime.errors import IncompatibleError, MissingEngineError, UsageError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle, Manifest, ProgramSpec
from edge_tcur_runtime.installed import OnnxRuntimeInstall, executorch_problem, find_onnxruntime

EXECUTORCH = "executorch"
ENGINES: dict[str, tuple[str, ...]] = {  # name -> roles of the graphs that it needs; preferred ones first
    "ort-training": ("train", "eval", "checkpoint"),
    "ort-step": ("step",),
    EXECUTORCH: (),  # it needs a program, one of `_PROGRAMS`
}
_PROGRAMS = ("train-xnnpack", "train-portable")  # preferred ones first
_TRAINING_PROVIDERS = (AUTO, CPU, "cuda")  # of ``ort-training``; ``ort-step`` runs on any
_EXPORT = {"step_recompute": "--recompute", "step_last": "--last-blocks"}
_INSTALL = {
    "ort-training": "pip install 'edge-tcur-runtime[ort-training]' (Python 3.10 to 3.12, x86-64)",
    "ort-step": "pip install 'edge-tcur-runtime[ort]'",
    EXECUTORCH: "pip install 'edge-tcur-runtime[executorch]' (brings torch)",
}


@dataclass(frozen=True)
class StepResult:
    """Forward and backward of one micro-batch.

    Attributes:
        loss: mean loss over its samples.
        outputs: f32 [samples, ...] outputs of the model; none, f32 [0], from a graph that does not give them
            (of a language model with a large vocabulary, where they would be most of the memory).
        gradients: name of each core and extra -> f32 gradient of the mean loss, in raw coordinates.
        metric: the task's metric over its samples; None where the bundle's graphs do not give it.
    """

    loss: float
    outputs: np.ndarray
    gradients: dict[str, np.ndarray]
    metric: float | None = None


class TrainingEngine(Protocol):
    """Computes loss and gradients over a frozen base; holds no optimiser and no adapter."""

    name: str

    def step(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        """One forward and backward pass.

        Args:
            inputs: model inputs of a micro-batch.
            targets: the task's targets (`edge_tcur_runtime.tasks`), for example int64 labels [samples].
            feeds: factors and extras by graph name (`edge_tcur_runtime.feeds.build_feeds`).
        """
        ...


def choose_engine(
    name: str,
    bundle: Bundle,
    installed: OnnxRuntimeInstall | None,
    adapter: Adapter | None = None,
    provider: str = AUTO,
) -> tuple[str, str]:
    """The engine to use and the reason.

    Args:
        name: ``auto``, or the engine that must be used.
        installed: the ONNX Runtime of this environment.
        adapter: what is to be trained; None leaves its rank out of the choice.
        provider: the execution provider that the engine must run on.

    Raises:
        MissingEngineError: the library is not installed; says how to get it.
        IncompatibleError: the bundle was exported without the engine's graphs, or for another rank, or the
            engine does not run on the provider.
        UsageError: no such engine.
    """
    if name != "auto":
        if name not in ENGINES:
            raise _unknown(name)
        problem = _problem(name, bundle, installed, adapter, provider)
        if problem is not None:
            raise problem
        return name, "asked for"
    problems: list[str] = []
    for candidate in ENGINES:
        problem = _problem(candidate, bundle, installed, adapter, provider)
        if problem is None:
            reasons = "; ".join(problems) or "the default where it is installed"
            return candidate, reasons
        problems.append(f"not {candidate}: {problem.message}")
    missing = installed is None
    kind = MissingEngineError if missing else IncompatibleError
    raise kind(
        "no engine can fine-tune this bundle here: " + "; ".join(problems),
        hint=_INSTALL["ort-training"] if missing else "export it again with --target step",
    )


def _unknown(name: str) -> UsageError:
    return UsageError(f"the engine {name!r} is not known; expected auto or one of {', '.join(ENGINES)}")


def _problem(
    name: str, bundle: Bundle, installed: OnnxRuntimeInstall | None, adapter: Adapter | None, provider: str
) -> MissingEngineError | IncompatibleError | None:
    if name == EXECUTORCH:
        return _executorch_problem(bundle, adapter, provider)
    if installed is None:
        return MissingEngineError("ONNX Runtime is not installed", hint=_INSTALL[name])
    if name == "ort-training" and not installed.training:
        return no_training_interface(installed)
    if name == "ort-training" and provider not in _TRAINING_PROVIDERS:
        return IncompatibleError(f"it does not run on {provider}", hint="use --engine ort-step")
    missing = lacks(name, bundle.manifest)
    if missing:
        return _no_graph(bundle, ", ".join(missing), name)
    if name == "ort-training" and adapter is not None:
        return _other_rank(bundle, adapter)
    return None


def _executorch_problem(
    bundle: Bundle, adapter: Adapter | None, provider: str
) -> MissingEngineError | IncompatibleError | None:
    reason = executorch_problem()
    if reason is not None:
        return MissingEngineError(reason, hint=_INSTALL[EXECUTORCH])
    if provider not in (AUTO, CPU):
        return IncompatibleError(f"it does not run on {provider}", hint="use --engine ort-step")
    if lacks(EXECUTORCH, bundle.manifest):
        return _no_program(bundle)
    return None if adapter is None else _other_rank(bundle, adapter, "program")


def lacks(name: str, manifest: Manifest) -> list[str]:
    """What the engine needs and a bundle does not have: roles of graphs, or the training program."""
    if name == EXECUTORCH:
        return [] if any(program in manifest.programs for program in _PROGRAMS) else ["training program"]
    return [role for role in ENGINES[name] if role not in manifest.graphs]


def _no_program(bundle: Bundle) -> IncompatibleError:
    return IncompatibleError(
        "the bundle has no training program of ExecuTorch",
        where=str(bundle.root),
        hint="export it again with --target executorch",
    )


def require_program(bundle: Bundle) -> ProgramSpec:
    """The training program that ``executorch`` runs, XNNPACK's where there are two.

    Raises:
        IncompatibleError: the bundle was exported without one.
    """
    for name in _PROGRAMS:
        if name in bundle.manifest.programs:
            return bundle.manifest.programs[name]
    raise _no_program(bundle)


def require_executorch() -> None:
    """Checks that ExecuTorch and torch, which its Python interface needs, are installed.

    Raises:
        MissingEngineError: one of them is not.
    """
    reason = executorch_problem()
    if reason is not None:
        raise MissingEngineError(reason, hint=_INSTALL[EXECUTORCH])


def no_training_interface(installed: OnnxRuntimeInstall) -> MissingEngineError:
    """The error of an ONNX Runtime that cannot train."""
    return MissingEngineError(
        f"{installed.distribution} {installed.version} has no training interface",
        hint=_INSTALL["ort-training"],
    )


def _no_graph(bundle: Bundle, roles: str, engine: str) -> IncompatibleError:
    target = f"--target {'step' if engine == 'ort-step' else engine}"
    return IncompatibleError(
        f"the bundle has no {roles} graph",
        where=str(bundle.root),
        hint=f"export it again with {_EXPORT.get(roles, target)}",
    )


def _other_rank(bundle: Bundle, adapter: Adapter, what: str = "graph") -> IncompatibleError | None:
    """The shapes of ONNX Runtime Training's and ExecuTorch's parameters are fixed by the export."""
    for group, factors in adapter.factors.items():
        expected = bundle.manifest.groups[group].rank
        if factors.rank != expected:
            return IncompatibleError(
                f"the adapter has rank {factors.rank}; the bundle's training {what} is for rank {expected}",
                hint="use --engine ort-step, which trains any rank, or export a bundle from that run",
            )
    return None


def require_graph(bundle: Bundle, role: str, engine: str) -> Path:
    """Path of a graph that `engine` needs.

    Raises:
        IncompatibleError: the bundle was exported without it.
    """
    path = bundle.graph(role)
    if path is None:
        raise _no_graph(bundle, role, engine)
    return path


def trained_names(bundle: Bundle) -> list[str]:
    """Names of what an engine gives gradients for: every core and every extra of the bundle."""
    return [f"{group}.core" for group in bundle.manifest.groups] + list(bundle.manifest.extras)


def forward_outputs(bundle: Bundle, names: Collection[str]) -> tuple[str, ...]:
    """Names of what a training graph must give besides gradients: where it gives the metric itself, it may do
    without the model's outputs.

    Args:
        names: of the graph's outputs.
    """
    if bundle.manifest.metric is None:
        return "loss", "logits"
    return ("loss", "metric", "logits") if "logits" in names else ("loss", "metric")


def open_engine(
    name: str, bundle: Bundle, *, threads: int = 0, graph: str = "step", placement: Placement = ON_CPU
) -> TrainingEngine:
    """Loads an engine by its name (as `choose_engine` returned it).

    Args:
        graph: role of the graph that ``ort-step`` runs.
        threads: CPU threads; 0 takes all that this process may use.
        placement: the provider that runs it (`edge_tcur_runtime.engines.selfcheck.choose_provider`).

    Raises:
        UsageError: no such engine.
        MissingEngineError: the library is not installed.
        IncompatibleError: the bundle lacks the graph, or the installed library cannot load it.
    """
    if name not in ENGINES:
        raise _unknown(name)
    if name == "ort-training":
        from edge_tcur_runtime.engines.ort_training import OrtTrainingEngine

        return OrtTrainingEngine(bundle, threads=threads, placement=placement)
    if name == EXECUTORCH:
        from edge_tcur_runtime.engines.executorch import ExecutorchEngine

        return ExecutorchEngine(bundle, threads=threads)
    from edge_tcur_runtime.engines.ort_step import OrtStepEngine

    return OrtStepEngine(bundle, threads=threads, graph=graph, placement=placement)


def require_onnxruntime() -> OnnxRuntimeInstall:
    """The installed ONNX Runtime.

    Raises:
        MissingEngineError: there is none.
    """
    installed = find_onnxruntime()
    if installed is None:
        raise MissingEngineError("ONNX Runtime is not installed", hint=_INSTALL["ort-step"])
    return installed
