"""Whether an execution provider computes as the CPU does, on this device: operator by operator, then a step.

Drivers miscompile. A bundle's ``checks.onnx`` holds one node for each kind of operator in its graphs, each
with inputs and outputs of its own; it is run on the CPU and on the provider, and the outputs are compared.
After that one whole pass of the graph that is to run decides. `edge_tcur_runtime.engines.selfcheck` runs
this in a process of its own, because a driver may also crash.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from edge_tcur_runtime.cores import within
from edge_tcur_runtime.engines.providers import ON_CPU, Placement, Provider, can_pin
from edge_tcur_runtime.engines.session import error_line, open_session
from edge_tcur_runtime.errors import EdgeError, FileFormatError, IncompatibleError
from edge_tcur_runtime.formats.adapter import parse_adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.formats.content import read_content

METADATA = "edge_tcur.checks"  # of ``checks.onnx``; see docs/formats.md
TARGETS = "labels"
_INPUT = "input."  # of the canary's tensors
TOLERANCES = {
    "float16": 2e-2,
    "float32": 1e-3,
    "float64": 1e-6,
}  # of the largest value of an operator's output
STEP_TOLERANCE = 5e-3  # of the largest value of a loss, an output or a gradient
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_ENDS = 1e6  # a range that is wider has two ends and nothing between: a mask
Opener = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """One kind of operator.

    Attributes:
        operator: its type.
        outputs: names of the outputs of its node in ``checks.onnx``.
        nodes: role of a graph -> names of the nodes there that are of this kind.
    """

    operator: str
    outputs: tuple[str, ...]
    nodes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fault:
    """An operator that the provider computes otherwise than the CPU: how, and which nodes of the graphs are
    of this kind."""

    operator: str
    how: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What a self-check found.

    Attributes:
        provider: its name.
        checked: how many kinds of operators were compared; 0 where the bundle has no checks.
        faults: those that are wrong.
        pinned: names of the nodes that must be kept on the CPU.
        problem: why the provider is not trusted; None where it is.
        error: largest difference of the whole pass, relative to the largest value of its quantity.
        seconds_cpu, seconds: one pass on the CPU, and on the provider.
    """

    provider: str
    checked: int = 0
    faults: tuple[Fault, ...] = ()
    pinned: tuple[str, ...] = ()
    problem: str | None = None
    error: float | None = None
    seconds_cpu: float | None = None
    seconds: float | None = None


def examine(
    bundle: Bundle, provider: Provider, roles: tuple[str, ...], threads: int, opener: Opener = open_session
) -> Verdict:
    """Runs the self-check of a provider in this process.

    Args:
        roles: of the graphs that are to run; the first one is run as a whole.
        opener: opens a session, as `open_session`.
    """
    checked, threads = 0, within(threads)
    faults: tuple[Fault, ...] = ()
    try:
        path = bundle.graph("checks")
        if path is not None:
            opened = partial(opener, files=bundle.manifest.files)
            checked, faults = check_operators(path, Placement(provider), roles, threads, opened)
        pinned = tuple(dict.fromkeys(name for fault in faults for name in fault.nodes))
        if pinned and not can_pin(provider, pinned):
            why = (
                "has no way to" if provider.pins is None else f"takes too few names to ({len(pinned)} nodes)"
            )
            return Verdict(
                provider.name, checked, faults, problem=f"{provider.name} {why} keep them on the CPU"
            )
        found = run_pass(bundle, roles[0], Placement(provider, pinned), threads, opener)
        expected = run_pass(bundle, roles[0], ON_CPU, threads, opener)
    except EdgeError as error:
        return Verdict(provider.name, checked, faults, problem=f"it cannot run the graph: {error}")
    return _judge(Verdict(provider.name, checked, faults, pinned), found, expected)


def check_operators(
    path: Path, placement: Placement, roles: tuple[str, ...], threads: int, opener: Opener = open_session
) -> tuple[int, tuple[Fault, ...]]:
    """Compares every kind of operator of the graphs of these roles.

    Returns:
        how many kinds there are, and those that are wrong.

    Raises:
        FileFormatError: `path` is not a file of checks.
    """
    session = opener(path, threads=threads, optimized=False)
    checks, ranges = read_checks(session, path)
    feeds = make_feeds(session, ranges)
    names = [value.name for value in session.get_outputs()]
    expected = dict(zip(names, _run(session, feeds, path), strict=True))
    del session
    session = opener(path, threads=threads, optimized=False, placement=placement)
    found = dict(zip(names, _run(session, feeds, path), strict=True))
    used = [check for check in checks if any(role in check.nodes for role in roles)]
    faults = []
    for check in used:
        how = next(filter(None, (differs(found[name], expected[name]) for name in check.outputs)), None)
        if how is not None:
            nodes = tuple(name for role in roles for name in check.nodes.get(role, ()))
            faults.append(Fault(check.operator, how, nodes))
    return len(used), tuple(faults)


def read_checks(session: Any, path: Path) -> tuple[list[Check], dict[str, tuple[float, float]]]:
    """The checks of a session of ``checks.onnx``, and the range of values of each input that has no default.

    Raises:
        FileFormatError: the graph has no such metadata.
    """
    try:
        document = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
        checks = [
            Check(
                str(entry["operator"]),
                tuple(entry["outputs"]),
                {role: tuple(names) for role, names in entry["nodes"].items()},
            )
            for entry in document["checks"]
        ]
        return checks, {name: (float(low), float(high)) for name, (low, high) in document["ranges"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"not a graph of checks: {error!r}", where=str(path), hint="export the bundle again"
        ) from error


def make_feeds(session: Any, ranges: Mapping[str, tuple[float, float]]) -> dict[str, np.ndarray]:
    """Values of each input from a seeded generator, within its range."""
    generator = np.random.Generator(np.random.PCG64(0))
    feeds = {}
    for value in session.get_inputs():
        low, high = ranges[value.name]
        dtype, shape = np.dtype(_DTYPES[value.type]), tuple(value.shape)
        made: Any
        if dtype.kind != "f":
            made = generator.integers(int(low), int(high) + 1, shape)
        elif high - low > _ENDS:
            made = np.where(generator.random(shape) < 0.5, low, high)
        else:
            made = low + (high - low) * np.asarray(generator.random(shape))
        feeds[value.name] = np.asarray(made, dtype)  # of a scalar too
    return feeds


def differs(found: np.ndarray, expected: np.ndarray) -> str | None:
    """In words, how an operator's output is not the expected one; None where it is.

    Integers and booleans must be equal, numbers within `TOLERANCES`, infinities and NaN in the same places.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{list(found.shape)} for {expected.dtype}{list(expected.shape)}"
    if found.dtype.kind != "f":
        wrong = int((found != expected).sum())
        return f"{wrong} of {found.size} values are wrong" if wrong else None
    error = distance(found, expected)
    if error <= TOLERANCES.get(found.dtype.name, 0.0):
        return None
    return "NaN or infinity" if np.isinf(error) else f"off by {error:.2g} of the largest value"


def distance(found: np.ndarray, expected: np.ndarray, floor: float = 1e-6) -> float:
    """Largest difference relative to the largest finite expected value, or to `floor` where that is larger;
    infinite where one is not finite and the other is not the same."""
    actual, wanted = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if actual.shape != wanted.shape:
        return float("inf")
    finite = np.isfinite(wanted)
    same = (actual == wanted) | (np.isnan(actual) & np.isnan(wanted))
    if not np.all(same | (finite & np.isfinite(actual))):
        return float("inf")
    compared = finite & ~same
    largest = float(np.abs(wanted[finite]).max(initial=0.0))
    return float(np.abs(actual[compared] - wanted[compared]).max(initial=0.0)) / max(largest, floor)


def run_pass(
    bundle: Bundle, role: str, placement: Placement, threads: int, opener: Opener = open_session
) -> tuple[dict[str, np.ndarray], float]:
    """One whole pass of a graph over the canary's inputs, with the bundle's own adapter and targets of zero.

    Returns:
        output name -> value, and the seconds of a second pass: the first one compiles what it runs.
    """
    path = bundle.graph(role)
    if path is None:
        raise FileFormatError(f"the bundle has no {role} graph", where=str(bundle.root))
    in_order, files = role == "step_recompute", bundle.manifest.files
    session = opener(path, threads=threads, files=files, in_order=in_order, placement=placement)
    feeds = _pass_feeds(bundle, session)
    _run(session, feeds, path)
    started = time.perf_counter()
    values = _run(session, feeds, path)
    seconds = time.perf_counter() - started
    return dict(zip((value.name for value in session.get_outputs()), values, strict=True)), seconds


def _run(session: Any, feeds: Mapping[str, np.ndarray], path: Path) -> list[np.ndarray]:
    """All outputs.

    Raises:
        IncompatibleError: ONNX Runtime or a driver refuses; its errors share no class.
    """
    try:
        values: list[np.ndarray] = session.run(None, feeds)
    except Exception as error:
        raise IncompatibleError(error_line(error), where=str(path)) from error
    return values


def _pass_feeds(bundle: Bundle, session: Any) -> dict[str, np.ndarray]:
    canary, adapter = bundle.manifest.canary, bundle.manifest.adapter
    if canary is None or adapter is None:
        raise FileFormatError("the bundle has no canary or no adapter to try", where=str(bundle.root))
    files = bundle.manifest.files
    tensors = safetensors.numpy.load(read_content(bundle.root, files, canary))
    known = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
    known |= parse_adapter(read_content(bundle.root, files, adapter), str(bundle.path(adapter))).feeds()
    values = [*session.get_inputs(), *session.get_overridable_initializers()]
    sizes: dict[str, int] = {}
    for value in values:
        if value.name in known:
            pairs = zip(value.shape, known[value.name].shape, strict=True)
            sizes |= {axis: size for axis, size in pairs if isinstance(axis, str)}
    for value in values:
        if value.name == TARGETS:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in value.shape]
            known[TARGETS] = np.zeros(shape, _DTYPES[value.type])
    return {value.name: known[value.name] for value in values if value.name in known}


def _judge(
    verdict: Verdict,
    found: tuple[dict[str, np.ndarray], float],
    expected: tuple[dict[str, np.ndarray], float],
) -> Verdict:
    # A gradient that is zero but for rounding is compared with the others.
    largest = max(
        (
            float(np.abs(value).max(initial=0.0))
            for name, value in expected[0].items()
            if name.endswith(".grad")
        ),
        default=0.0,
    )
    floors = {name: 1e-3 * largest if name.endswith(".grad") else 0.0 for name in expected[0]}
    errors = {
        name: distance(found[0][name], value, max(1e-6, floors[name])) for name, value in expected[0].items()
    }
    worst = max(errors, key=lambda name: errors[name])
    problem = None
    if not errors[worst] <= STEP_TOLERANCE:
        how = (
            "NaN or infinity"
            if np.isinf(errors[worst])
            else f"off by {errors[worst]:.2g} of the largest value"
        )
        problem = f"{worst!r} of one whole pass is wrong: {how}"
    return Verdict(
        verdict.provider,
        verdict.checked,
        verdict.faults,
        verdict.pinned,
        problem,
        float(min(errors[worst], 1e9)),
        expected[1],
        found[1],
    )


def operator_names(faults: Iterable[Fault]) -> str:
    """The faulty operators in words, each once."""
    return ", ".join(dict.fromkeys(f"{fault.operator} ({fault.how})" for fault in faults))
