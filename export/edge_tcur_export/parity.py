"""Parity: every exported graph against torch, in a fresh process that runs the device's own engines.

The parent writes what torch computed (`Case`) and starts this module again; the child imports the
runtime only, never torch, opens the bundle as a device would and reports relative errors. ExecuTorch's
Python interface needs torch, so its programs run in a process of their own (`program_parity`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import numpy as np
from safetensors.numpy import load_file, save

from edge_tcur_runtime.engines import StepResult
from edge_tcur_runtime.optimizer import AdamW
from edge_tcur_runtime.settings import AdamWSettings

if TYPE_CHECKING:
    from edge_tcur_runtime.formats.bundle import Bundle, Manifest

# Relative to the largest entry of each tensor, fp32.
TOLERANCES = {"outputs": 1e-4, "loss": 1e-4, "gradients": 1e-3, "steps": 1e-3, "metric": 1e-5}
STEPS, RATE = 3, 1e-3  # of the optimiser, after which the loss is compared once more
OPTIMIZER = AdamWSettings(learning_rate=RATE, max_gradient_norm=0)
_PROGRAMS = "edge_tcur_export.program_parity"
INFER, LAST = "infer", "step_last"
_ENGINES = {
    "step": "ort-step",
    "step_recompute": "ort-step",
    LAST: "ort-step",
    "train": "ort-training",
}
_FIXED_RANK = ("train",)
ROLES = (INFER, *_ENGINES)


@dataclass(frozen=True)
class Case:
    """One batch with factors, and what torch computed for it.

    Attributes:
        feeds: every graph input by name, labels included.
        outputs: f32 [batch, classes].
        loss: mean loss.
        gradients: by name of each core and extra.
        later: mean loss on the same batch after `STEPS` steps of `OPTIMIZER`.
    """

    feeds: Mapping[str, np.ndarray]
    outputs: np.ndarray
    loss: float
    gradients: Mapping[str, np.ndarray]
    later: float


class Stepper(Protocol):
    """What is compared: a training engine, or an ExecuTorch program."""

    def step(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        """See `edge_tcur_runtime.engines.TrainingEngine`."""
        ...


@dataclass(frozen=True)
class Failure:
    """Why a target is refused.

    Attributes:
        message: what was wrong.
        quantity: what differs (a key of `TOLERANCES`); None where the target does not run.
        error: by how much, relative to the largest entry.
    """

    message: str
    quantity: str | None = None
    error: float = 0.0


@dataclass(frozen=True)
class Verification:
    """What the comparison of a bundle with torch gave.

    Attributes:
        errors: target (``infer``, ``step``, ``train``, or the name of an ExecuTorch program) that ran ->
            quantity -> largest relative error.
        failures: target -> why it is refused.
        skipped: target -> why it cannot be run on this machine; it was not compared.
    """

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> tuple[str, ...]:
        """Targets that agree with torch."""
        return tuple(target for target in self.errors if target not in self.failures)


def verify_bundle(
    root: Path, cases: Sequence[Case], manifest: Manifest, *, last: Sequence[Case] = ()
) -> Verification:
    """Compares the bundle at `root` with torch, each graph in a fresh process, ExecuTorch's programs in one.

    Where that one process ends badly, each program is tried in a process of its own.

    Args:
        last: what torch computed where the last blocks alone learn, for the graph of these.
    """
    result = Verification()
    with TemporaryDirectory() as work:
        reference = Path(work) / "reference.safetensors"
        for role in ROLES:
            if role in manifest.graphs:
                reference.write_bytes(save(_pack(last if role == LAST else cases)))
                _collect(result, __name__, root, reference, (role,))
        if manifest.programs:
            reference.write_bytes(save(_pack(cases)))
            names = tuple(manifest.programs)
            if not _collect(result, _PROGRAMS, root, reference, names):
                for name in names:
                    _collect(result, _PROGRAMS, root, reference, (name,))
    return result


def _collect(
    result: Verification, module: str, root: Path, reference: Path, targets: tuple[str, ...]
) -> bool:
    """Runs targets in a fresh process and puts what it says into `result`; False where it ended badly."""
    for target in targets:
        result.failures.pop(target, None)
    command = [sys.executable, "-m", module, str(root), str(reference), *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the process ended with {done.returncode} and gave no reason"
        for target in targets:
            result.failures[target] = Failure(f"it does not run: {reason}")
        return False
    found: dict[str, dict[str, float] | str] = json.loads(done.stdout.splitlines()[-1])
    for target, quantities in found.items():
        if isinstance(quantities, str):
            result.skipped[target] = quantities
            continue
        result.errors[target] = quantities
        for quantity, error in quantities.items():
            if not error <= TOLERANCES[quantity] and target not in result.failures:
                result.failures[target] = Failure(
                    f"the {quantity} differ from torch by {error:.2e} relative; "
                    f"the tolerance is {TOLERANCES[quantity]:.0e}",
                    quantity,
                    error,
                )
    return True


def _pack(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    packed: dict[str, np.ndarray] = {}
    for number, case in enumerate(cases):
        packed |= {f"{number}/feed/{name}": np.asarray(v, order="C") for name, v in case.feeds.items()}
        packed |= {f"{number}/grad/{name}": np.asarray(v, order="C") for name, v in case.gradients.items()}
        packed[f"{number}/outputs/"] = np.asarray(case.outputs, order="C")
        packed[f"{number}/loss/"] = np.array([case.loss, case.later])
    return packed


def read_cases(path: Path) -> list[Case]:
    """The cases in the file that the parent wrote."""
    parts: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    for key, value in load_file(path).items():
        number, kind, name = key.split("/", 2)
        parts.setdefault(int(number), {}).setdefault(kind, {})[name] = value
    return [
        Case(
            part["feed"],
            part["outputs"][""],
            float(part["loss"][""][0]),
            part.get("grad", {}),
            float(part["loss"][""][1]),
        )
        for _, part in sorted(parts.items())
    ]


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected entry; infinity where not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    scale = max(float(np.abs(expected).max()), 1e-6)
    return float(np.abs(actual.astype(np.float64) - expected).max()) / scale


def _compare_infer(bundle: Bundle, cases: list[Case]) -> dict[str, float]:
    """The inference graph fed with factors, and fed with nothing against the canary."""
    from edge_tcur_runtime.canary import read_canary
    from edge_tcur_runtime.engines.session import open_session

    graph = bundle.graph("infer")
    assert graph is not None
    session = open_session(graph, threads=1)
    worst = 0.0
    for case in cases:
        feeds = {name: value for name, value in case.feeds.items() if name != "labels"}
        worst = max(worst, distance(session.run(["logits"], feeds)[0], case.outputs))
    canary = read_canary(bundle.root, bundle.manifest)
    assert canary is not None
    assert canary.base is not None
    outputs = canary.part(session.run(["logits"], canary.inputs)[0])
    return {"outputs": max(worst, distance(outputs, canary.base))}


def compare_steps(stepper: Stepper, bundle: Bundle, cases: list[Case]) -> dict[str, float]:
    """Largest relative error of each quantity in `TOLERANCES`; of the outputs where the step gives them."""
    worst: dict[str, float] = {}
    for case in cases:
        inputs = {name: case.feeds[name] for name in bundle.manifest.inputs}
        feeds = {n: v for n, v in case.feeds.items() if n not in inputs and n != "labels"}
        result = stepper.step(inputs, case.feeds["labels"], feeds)
        given = bool(result.outputs.size)  # see `StepResult`
        outputs = result.outputs if given else case.outputs
        found = {
            "loss": _relative(result.loss, case.loss),
            "gradients": max(distance(result.gradients[n], v) for n, v in case.gradients.items()),
            "metric": _metric_error(result.metric, outputs, case.feeds["labels"], bundle),
        }
        if given:
            found["outputs"] = distance(outputs, case.outputs)
        optimizer = AdamW(OPTIMIZER)
        for _ in range(STEPS):
            values = {name: feeds[name].astype(np.float64) for name in case.gradients}
            gradients = {name: result.gradients[name].astype(np.float64) for name in values}
            stepped = optimizer.step(values, gradients, dict.fromkeys(values, RATE))
            feeds |= {name: value.astype(np.float32) for name, value in stepped.items()}
            result = stepper.step(inputs, case.feeds["labels"], feeds)
        found["steps"] = _relative(result.loss, case.later)
        worst |= {name: max(worst.get(name, 0.0), value) for name, value in found.items()}
    return {name: worst[name] for name in TOLERANCES if name in worst}


def _metric_error(metric: float | None, outputs: np.ndarray, targets: np.ndarray, bundle: Bundle) -> float:
    """Against the device's own definition on the same outputs: torch's may have a tie fall elsewhere."""
    from edge_tcur_runtime.tasks import find_device_task

    if metric is None:
        return float("inf")
    return _relative(metric, find_device_task(bundle.manifest.task).score(outputs, targets))


def _relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / max(abs(expected), 1e-6) if np.isfinite(actual) else float("inf")


def has_exported_rank(case: Case, bundle: Bundle) -> bool:
    """Whether what has fixed shapes (ONNX Runtime Training's parameters, ExecuTorch's programs) can take
    the case's cores."""
    return has_rank_of(case, bundle.manifest)


def has_rank_of(case: Case, manifest: Manifest) -> bool:
    """As `has_exported_rank`, of a bundle's manifest."""
    groups = manifest.groups.items()
    return all(case.feeds[f"{name}.core"].shape[1] == group.rank for name, group in groups)


def _work(root: Path, reference: Path, role: str) -> None:
    from edge_tcur_runtime.engines import open_engine
    from edge_tcur_runtime.formats.bundle import open_bundle

    bundle, cases = open_bundle(root), read_cases(reference)
    if role == INFER:
        errors = _compare_infer(bundle, cases)
    else:
        usable = [case for case in cases if role not in _FIXED_RANK or has_exported_rank(case, bundle)]
        engine = open_engine(_ENGINES[role], bundle, threads=1, graph=role)
        errors = compare_steps(engine, bundle, usable)
    sys.stdout.write(json.dumps({role: errors}) + "\n")


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # a device has no torch
    _work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
