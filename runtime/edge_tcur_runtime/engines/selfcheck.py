"""Which execution provider runs a graph: one is trusted only after a self-check on this device.

The check (`edge_tcur_runtime.engines.checks`) runs in a process of its own: a driver that crashes or hangs
ends that process, and what it takes of memory is given back. Its verdict may be kept in a file for a week.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_tcur_runtime.atomic import write_atomic
from edge_tcur_runtime.engines.checks import Fault, Verdict, examine, operator_names
from edge_tcur_runtime.engines.engine import EXECUTORCH, require_onnxruntime
from edge_tcur_runtime.engines.providers import (
    AUTO,
    CPU,
    ON_CPU,
    PROVIDERS,
    Placement,
    Provider,
    available,
    find_provider,
    require_provider,
)
from edge_tcur_runtime.engines.session import import_onnxruntime
from edge_tcur_runtime.errors import DiskError, IncompatibleError, MissingEngineError, UsageError
from edge_tcur_runtime.formats.bundle import Bundle, open_bundle
from edge_tcur_runtime.settings import PersonalizeSettings

CHECK_SECONDS = 600  # a software driver compiles for a minute; one that hangs is given up
FASTER = 0.9  # of the CPU's time: what is not clearly faster is not worth a driver
KEPT_SECONDS = 7 * 24 * 3600  # a driver may be updated without a word
VERDICTS = "selfcheck.json"  # in the store
_KEPT = 32  # verdicts in the file
_DRIVERS = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES", "CUDA_VISIBLE_DEVICES", "WEBGPU_BACKEND")
Checker = Callable[[Bundle, Provider, tuple[str, ...], int], Verdict]


@dataclass(frozen=True)
class Choice:
    """Where a graph runs, why, and what a user should know of providers that are not trusted as a whole."""

    placement: Placement
    reason: str
    notes: tuple[str, ...] = ()


def choose_provider(
    name: str,
    bundle: Bundle,
    roles: tuple[str, ...],
    *,
    threads: int = 0,
    cache: Path | None = None,
    check: Checker | None = None,
) -> Choice:
    """The provider to use and the reason. One that fails its self-check is not used, whoever asked for it.

    Args:
        name: ``auto``, or the provider that is wanted.
        roles: of the graphs that are to run; those that the bundle lacks are passed over.
        cache: file of verdicts; None checks each time.
        check: runs a self-check; None runs it in a process of its own.

    Raises:
        UsageError: no such provider.
        MissingEngineError: ONNX Runtime is not installed, or has no such provider: names the package.
    """
    if name != AUTO:
        find_provider(name)
    if name == CPU:
        return Choice(ON_CPU, "asked for")
    onnxruntime, installed = import_onnxruntime(), require_onnxruntime()
    roles = tuple(role for role in dict.fromkeys(roles) if bundle.graph(role) is not None)

    def verdict_of(provider: Provider) -> Verdict:
        return cached_check(bundle, provider, roles, threads, cache, check or check_apart)

    if name != AUTO:
        return asked(verdict_of(require_provider(name, onnxruntime, installed)))
    candidates = [PROVIDERS[found] for found in available(onnxruntime) if found != CPU]
    candidates = [provider for provider in candidates if not provider.slow_start]
    if not candidates:
        return Choice(ON_CPU, f"the only provider of {installed.distribution} {installed.version}")
    return best([verdict_of(provider) for provider in candidates])


def choose_for_training(engine: str, graph: str, bundle: Bundle, settings: PersonalizeSettings) -> Choice:
    """The provider of a personalisation with `engine` and the graph of role `graph`; see `choose_provider`.

    With a budget ``auto`` stays on the CPU: what a driver takes of this process's memory cannot be foreseen.

    Raises:
        IncompatibleError: the bundle has no step graph to check ONNX Runtime Training's provider with.
    """
    name = settings.provider
    if engine == EXECUTORCH and name in (AUTO, CPU):
        return Choice(ON_CPU, "executorch runs on the CPU alone")
    if name == AUTO and engine != "ort-step":
        return Choice(ON_CPU, f"{engine} runs elsewhere only where --provider says so")
    if name == AUTO and settings.budget is not None:
        return Choice(
            ON_CPU, "what a GPU's driver takes of the budget cannot be foreseen; --provider asks for one"
        )
    roles = (graph, "step") if engine == "ort-step" else ("step",)
    if name != CPU and all(bundle.graph(role) is None for role in roles):
        raise IncompatibleError(
            f"the bundle has no step graph to check {name} with", hint="export it again with --target step"
        )
    return choose_provider(name, bundle, roles, threads=settings.threads)


def choose_again(engine: str, graph: str, bundle: Bundle, settings: PersonalizeSettings) -> Choice:
    """As `choose_for_training`, for a run that goes on: on the provider that the settings name, and no other,
    with which it would end with other bits.

    Raises:
        IncompatibleError: that provider is not there any more, or is not trusted now.
    """
    name, why = settings.provider, ""
    try:
        chosen = choose_for_training(engine, graph, bundle, settings)
    except (MissingEngineError, UsageError) as error:
        chosen, why = Choice(ON_CPU, ""), error.message
    if chosen.placement.provider.name != name:
        raise IncompatibleError(
            f"the checkpoint's run went on {name}, which cannot be used now: {why or chosen.reason}",
            hint="go on where it can, or start over with --resume no",
        )
    return replace(
        chosen, reason="the checkpoint's run went on it" + ("" if name == CPU else f"; {chosen.reason}")
    )


def asked(verdict: Verdict) -> Choice:
    """The choice where one provider was asked for."""
    if verdict.problem is not None:
        return Choice(ON_CPU, f"not {verdict.provider}: {verdict.problem}", notes_of(verdict))
    return Choice(placement_of(verdict), agreement(verdict), notes_of(verdict))


def best(verdicts: list[Verdict]) -> Choice:
    """The first provider that is trusted and clearly faster than the CPU, or the CPU."""
    reasons: list[str] = []
    notes: tuple[str, ...] = ()
    for verdict in verdicts:
        notes += notes_of(verdict)
        if verdict.problem is not None:
            reasons.append(f"not {verdict.provider}: {verdict.problem}")
        elif (verdict.seconds or 0.0) > FASTER * (verdict.seconds_cpu or 0.0):
            reasons.append(f"not {verdict.provider}: not faster ({_times(verdict)})")
        else:
            return Choice(placement_of(verdict), f"{agreement(verdict)}; {_times(verdict)}", notes)
    return Choice(ON_CPU, "; ".join(reasons), notes)


def placement_of(verdict: Verdict) -> Placement:
    """Where a trusted provider runs what."""
    return Placement(PROVIDERS[verdict.provider], verdict.pinned)


def agreement(verdict: Verdict) -> str:
    """What agreed with the CPU, in words."""
    right = verdict.checked - len(verdict.faults)
    operators = f"{right} of {verdict.checked} kinds of operators" if verdict.checked else "no operator alone"
    return f"self-check: {operators} and one whole pass agree with the CPU's"


def notes_of(verdict: Verdict) -> tuple[str, ...]:
    """What a user should know: which operators are wrong and what was done, or what could not be checked."""
    if verdict.faults:
        done = (
            f"{len(verdict.pinned)} nodes of them run on the CPU"
            if verdict.problem is None
            else "it is not used"
        )
        return (
            f"{verdict.provider} computes wrongly on this device: {operator_names(verdict.faults)}; {done}",
        )
    if not verdict.checked and verdict.problem is None:
        return (f"the bundle has no checks of single operators for {verdict.provider}; export it again",)
    return ()


def _times(verdict: Verdict) -> str:
    return f"a pass takes {verdict.seconds or 0.0:.3g} s, on the CPU {verdict.seconds_cpu or 0.0:.3g} s"


def check_apart(bundle: Bundle, provider: Provider, roles: tuple[str, ...], threads: int) -> Verdict:
    """The self-check in a process of its own; one that crashes or hangs is a verdict too."""
    command = [sys.executable, "-m", __name__, str(bundle.root), provider.name, ",".join(roles), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Verdict(provider.name, problem=f"the self-check did not end within {CHECK_SECONDS} s")
    if done.returncode < 0:
        return Verdict(provider.name, problem=f"it ends the process with signal {-done.returncode}")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        return Verdict(provider.name, problem=f"the self-check fails: {last}")
    return parse_verdict(json.loads(lines[-1]))


def parse_verdict(document: Mapping[str, Any]) -> Verdict:
    """A verdict from the JSON form of its fields."""
    faults = tuple(
        Fault(entry["operator"], entry["how"], tuple(entry["nodes"])) for entry in document["faults"]
    )
    return Verdict(**{**document, "faults": faults, "pinned": tuple(document["pinned"])})


def cached_check(
    bundle: Bundle,
    provider: Provider,
    roles: tuple[str, ...],
    threads: int,
    cache: Path | None,
    check: Checker,
) -> Verdict:
    """A verdict that is known for this device, library, provider and bundle, or a new one."""
    if cache is None:
        return check(bundle, provider, roles, threads)
    key, known = verdict_key(bundle, provider, roles), _read(cache)
    entry = known.get(key)
    if entry is not None and 0 <= time.time() - entry["time"] < KEPT_SECONDS:
        return parse_verdict(entry["verdict"])
    verdict = check(bundle, provider, roles, threads)
    known[key] = {"time": time.time(), "verdict": asdict(verdict)}
    newest = sorted(known.items(), key=lambda item: -float(item[1]["time"]))[:_KEPT]
    with contextlib.suppress(DiskError):  # it is only a memory: a read-only store checks each time
        write_atomic(cache, json.dumps(dict(newest)).encode())
    return verdict


def verdict_key(bundle: Bundle, provider: Provider, roles: tuple[str, ...]) -> str:
    """What a verdict holds for. The driver's own version is not to be had in Python on every system: the
    kernel's stands for it, and a verdict lives for `KEPT_SECONDS`."""
    installed, manifest = require_onnxruntime(), bundle.manifest
    facts = [
        (provider.name, sorted(provider.options.items())),
        (installed.distribution, installed.version),
        (platform.platform(), platform.node(), [os.environ.get(name) for name in _DRIVERS]),
        [(role, manifest.files[manifest.graphs[role]].sha256) for role in roles],
        manifest.base_digest,
        manifest.files[manifest.graphs["checks"]].sha256 if "checks" in manifest.graphs else None,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(cache: Path) -> dict[str, Any]:
    """The verdicts of a file; none where it is missing or damaged."""
    try:
        known = json.loads(cache.read_bytes())
        for entry in known.values():
            parse_verdict(entry["verdict"])
            float(entry["time"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(known)


def _work(root: str, name: str, roles: str, threads: str) -> None:
    bundle = open_bundle(Path(root), verify=False)  # the parent has
    verdict = examine(bundle, PROVIDERS[name], tuple(roles.split(",")), int(threads))
    sys.stdout.write(json.dumps(asdict(verdict)) + "\n")


if __name__ == "__main__":
    _work(*sys.argv[1:])
