"""What works on this machine: engines, libraries, memory, the store, and whether a bundle is whole.

Nothing heavy is imported here. Which ONNX Runtime is installed is read from its files; its
execution providers are asked for in a child process, so that a library that crashes on this
processor ends the child and not the doctor.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_tcur_runtime import __version__
from edge_tcur_runtime.cgroups import read_limits
from edge_tcur_runtime.cores import usable_cores
from edge_tcur_runtime.errors import EdgeError
from edge_tcur_runtime.installed import (
    OnnxRuntimeInstall,
    executorch_problem,
    find_conflicts,
    find_onnxruntime,
    is_importable,
    version_of,
)
from edge_tcur_runtime.output import table
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.formats.bundle import Bundle

PROBE_SECONDS = 60  # how long importing ONNX Runtime may take on a slow card
_PROBE = (
    "import json; from edge_tcur_runtime.engines.session import import_onnxruntime as load; "
    "print(json.dumps(load().get_available_providers()))"
)
_PROBE_NEWEST = (
    "import json; from edge_tcur_runtime.engines.readable import newest_readable; "
    "found = newest_readable(); print(json.dumps([found.opset, found.ir_version]))"
)
_LIBRARIES = ("numpy", "safetensors", "tokenizers", "pillow", "tuf", "executorch")


# How to get each engine of `edge_tcur_runtime.engines.ENGINES`, which says what graphs it needs.
INSTALL = {
    "ort-training": "pip install 'edge-tcur-runtime[ort-training]'",
    "ort-step": "pip install 'edge-tcur-runtime[ort]'",
    "executorch": "pip install 'edge-tcur-runtime[executorch]' (brings torch)",
}


@dataclass(frozen=True)
class EngineReport:
    """Whether an engine can run here, the reason where it cannot, and the command that installs it."""

    name: str
    available: bool
    reason: str | None
    install: str


@dataclass(frozen=True)
class OrtReport:
    """The installed ONNX Runtime, its execution providers, and why it cannot be imported (or None)."""

    distribution: str
    version: str
    training: bool
    providers: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True)
class MemoryReport:
    """Bytes; None where the system does not say. See `edge_tcur_runtime.cgroups.Limits` for the last two."""

    total: int | None
    available: int | None
    cgroup_limit: int | None
    cgroup_high: int | None = None


@dataclass(frozen=True)
class StoreReport:
    """Where adapters are kept, whether it is there, whether it can be written, free bytes of the disk."""

    path: str
    exists: bool
    writable: bool
    free: int | None


@dataclass(frozen=True)
class BundleReport:
    """A verified bundle: `problem` and `exit_code` say why it is refused; `engines` can fine-tune it.

    `compared` names the graphs and programs that agreed with torch when the bundle was written; None where
    the bundle does not say.
    """

    path: str
    ok: bool
    problem: str | None = None
    exit_code: int = 0
    base_digest: str | None = None
    graphs: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    predict: bool = False
    compared: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ProviderReport:
    """An execution provider: whether this ONNX Runtime brings it, what it runs on, how to get it, and what
    its self-check with the bundle says (None where it was not run)."""

    name: str
    available: bool
    device: str
    install: str
    verdict: str | None


@dataclass(frozen=True)
class Report:
    """Everything `examine` found."""

    version: str
    python: str
    platform: str
    machine: str
    cores: int
    usable_cores: int  # what this process may run on: its affinity, and its control group's quota
    memory: MemoryReport
    onnxruntime: OrtReport | None
    conflicts: tuple[str, ...]  # distributions that overwrite each other's onnxruntime
    engines: tuple[EngineReport, ...]
    libraries: dict[str, str | None]  # optional library -> version, None where missing
    torch_importable: bool
    store: StoreReport
    bundle: BundleReport | None
    providers: tuple[ProviderReport, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values; sizes in bytes."""
        return asdict(self)


def examine(store: Path, bundle: Path | None = None) -> Report:
    """Examines this machine, the place of the store, and a bundle where one is given.

    A bundle that is refused does not raise; `Report.bundle` says why.
    """
    found = find_onnxruntime()
    runtime = None if found is None else _examine_onnxruntime(found)
    engines = tuple(_engine(name, runtime) for name in INSTALL)
    examined = None if bundle is None else examine_bundle(bundle, engines, runtime)
    whole = bundle if examined is not None and examined.ok else None  # providers are checked with one
    return Report(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory=read_memory(),
        onnxruntime=runtime,
        conflicts=tuple(find_conflicts()),
        engines=engines,
        libraries={name: version_of(name) for name in _LIBRARIES},
        torch_importable=is_importable("torch"),
        store=examine_store(store),
        bundle=examined,
        providers=() if runtime is None or whole is None else examine_providers(runtime.providers, whole),
    )


def probe_providers(executable: str = sys.executable) -> tuple[tuple[str, ...], str | None]:
    """Execution providers of the installed ONNX Runtime, asked in a child process.

    Returns:
        The providers, and why they could not be found (None where they could).
    """
    try:
        done = _ask(_PROBE, executable)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"importing onnxruntime could not be tried: {error}"
    if done.returncode < 0:
        return (), f"importing onnxruntime ends the process with signal {-done.returncode}"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        return (), f"importing onnxruntime fails: {last}"
    return tuple(json.loads(lines[-1])), None


def probe_newest(executable: str = sys.executable) -> tuple[int | None, int | None]:
    """The newest opset and IR that the installed ONNX Runtime reads, asked in a child process; None where
    they could not be found."""
    try:
        opset, ir_version = json.loads(_ask(_PROBE_NEWEST, executable).stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None, None
    return opset, ir_version


def _ask(code: str, executable: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
    )


def _examine_onnxruntime(found: OnnxRuntimeInstall) -> OrtReport:
    providers, problem = probe_providers()
    return OrtReport(found.distribution, found.version, found.training, providers, problem)


def _engine(name: str, runtime: OrtReport | None) -> EngineReport:
    reason = None
    if name == "executorch":
        reason = executorch_problem()
    elif runtime is None:
        reason = "ONNX Runtime is not installed"
    elif runtime.problem is not None:
        reason = runtime.problem
    elif name == "ort-training" and not runtime.training:
        reason = f"{runtime.distribution} {runtime.version} has no training interface"
    if reason is not None and name == "ort-training" and not _has_training_wheels():
        reason += "; its wheels are for Python 3.10 to 3.12 on x86-64"
    return EngineReport(name, reason is None, reason, INSTALL[name])


def examine_providers(there: tuple[str, ...], bundle: Path) -> tuple[ProviderReport, ...]:
    """The providers that we know; those that are there check themselves with a (verified) bundle.

    Args:
        there: ONNX Runtime's names of those that it brings.
    """
    from edge_tcur_runtime.engines.providers import CPU, PROVIDERS

    reports = []
    for name, provider in PROVIDERS.items():
        known = provider.ort in there
        verdict = _self_check(bundle, name) if known and name != CPU else None
        reports.append(ProviderReport(name, known, provider.device, provider.package, verdict))
    return tuple(reports)


def _self_check(root: Path, name: str) -> str:
    """What the self-check of a provider says, in words; it runs in a process of its own."""
    from edge_tcur_runtime.engines.providers import PROVIDERS
    from edge_tcur_runtime.engines.selfcheck import asked, check_apart
    from edge_tcur_runtime.formats.bundle import open_bundle

    bundle = open_bundle(root, verify=False)
    roles = tuple(role for role in ("step", "infer") if bundle.graph(role) is not None)
    choice = asked(check_apart(bundle, PROVIDERS[name], roles, 0))
    return "; ".join((choice.reason, *choice.notes))


def _has_training_wheels() -> bool:
    return sys.version_info < (3, 13) and platform.machine().lower() in {"x86_64", "amd64"}


def read_memory(root: Path = Path("/")) -> MemoryReport:
    """Memory of the machine and the tightest cgroup limits of this process, in bytes.

    Args:
        root: where /proc and /sys are found.
    """
    lines = _text(root / "proc/meminfo").splitlines()
    values = {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}
    total, available = (
        int(values[key][0]) * 1024 if key in values else None for key in ("MemTotal", "MemAvailable")
    )
    limits = read_limits(root)
    return MemoryReport(total, available, limits.most, limits.high)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def examine_store(path: Path) -> StoreReport:
    """Whether the store is there and can be written; a missing one is judged by its nearest parent."""
    place = path.absolute()
    while not place.exists() and place.parent != place:
        place = place.parent
    writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = None
    return StoreReport(str(path), path.is_dir(), writable, free)


def examine_bundle(
    path: Path, engines: tuple[EngineReport, ...], runtime: OrtReport | None = None
) -> BundleReport:
    """Verifies every file of a bundle and says which of the available engines can fine-tune it.

    Args:
        runtime: the installed ONNX Runtime, where it is to be asked whether it reads the graphs.
    """
    from edge_tcur_runtime.engines.engine import lacks
    from edge_tcur_runtime.formats.bundle import open_bundle

    try:
        bundle = open_bundle(path)
        manifest = bundle.manifest
        if runtime is not None and runtime.problem is None:
            _require_readable(bundle, runtime)
    except EdgeError as error:
        problem = str(error) if error.hint is None else f"{error} ({error.hint})"
        return BundleReport(str(path), False, problem, int(error.exit_code))
    graphs = set(manifest.graphs)
    usable = [engine.name for engine in engines if engine.available]
    return BundleReport(
        path=str(path),
        ok=True,
        base_digest=manifest.base_digest,
        graphs=tuple(manifest.graphs),
        engines=tuple(name for name in usable if not lacks(name, manifest)),
        predict="infer" in graphs and "ort-step" in usable,
        compared=None if manifest.verified is None else manifest.verified.targets,
    )


def _require_readable(bundle: Bundle, runtime: OrtReport) -> None:
    from edge_tcur_runtime.engines.readable import Stamp, find_unreadable

    graphs = [bundle.path(name) for role, name in bundle.manifest.graphs.items() if role != "checkpoint"]
    library = f"{runtime.distribution} {runtime.version}"
    problem = find_unreadable(bundle, graphs, Stamp(*probe_newest()), library)
    if problem is not None:
        raise problem


def render(report: Report) -> str:
    """The report as text."""
    parts = [_render_machine(report), _render_engines(report)]
    if report.providers:
        parts.append(_render_providers(report.providers))
    if report.bundle is not None:
        parts.append(_render_bundle(report.bundle))
    return "\n\n".join(parts)


def _render_machine(report: Report) -> str:
    memory, store = report.memory, report.store
    state = "writable" if store.writable else "NOT writable"
    runtime, libraries = report.onnxruntime, report.libraries
    rows = {
        "edge-tcur-runtime": report.version,
        "Python": f"{report.python} on {report.platform}",
        "cores": f"{report.usable_cores} of {report.cores}",
        "memory": f"{_size(memory.total)}, available {_size(memory.available)}, "
        f"cgroup limit {_size(memory.cgroup_limit, 'none')}"
        + ("" if memory.cgroup_high is None else f" (slowed down above {_size(memory.cgroup_high)})"),
        "ONNX Runtime": _render_runtime(runtime),
        "libraries": ", ".join(f"{name} {version or 'missing'}" for name, version in libraries.items()),
        "torch": "importable (for executorch alone)"
        if report.torch_importable
        else "not installed (not needed)",
        "store": f"{store.path} ({'there' if store.exists else 'not there yet'}, {state}, "
        f"{_size(store.free)} free)",
    }
    if report.conflicts:
        names = ", ".join(report.conflicts)
        rows["CONFLICT"] = f"{names} overwrite each other: uninstall all of them, then install one"
    width = max(len(key) for key in rows)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in rows.items())


def _render_runtime(runtime: OrtReport | None) -> str:
    if runtime is None:
        return "not installed"
    training = "with training" if runtime.training else "without training"
    return f"{runtime.distribution} {runtime.version}, {training}, " + (
        runtime.problem or ", ".join(runtime.providers)
    )


def _render_engines(report: Report) -> str:
    rows = [
        (engine.name, "yes" if engine.available else f"no: {engine.reason}", engine.install)
        for engine in report.engines
    ]
    return table(("engine", "available", "how to get it"), rows)


def _render_providers(providers: tuple[ProviderReport, ...]) -> str:
    def state(provider: ProviderReport) -> str:
        if not provider.available:
            return f"no: it is in {provider.install}"
        return provider.verdict or "yes"

    return table(
        ("provider", "runs on", "here"),
        [(provider.name, provider.device, state(provider)) for provider in providers],
    )


def _render_bundle(bundle: BundleReport) -> str:
    if not bundle.ok:
        return f"bundle {bundle.path}: REFUSED\n  {bundle.problem}"
    return (
        f"bundle {bundle.path}: whole, every digest matches\n"
        f"  base          {bundle.base_digest}\n"
        f"  graphs        {', '.join(bundle.graphs)}\n"
        f"  compared      {render_compared(bundle.compared)}\n"
        f"  prediction    {'yes' if bundle.predict else 'no'}\n"
        f"  fine-tuning   {', '.join(bundle.engines) or 'no engine here can use it'}"
    )


def render_compared(targets: tuple[str, ...] | None) -> str:
    """Which graphs and programs agreed with torch when a bundle was written, as text."""
    if targets is None:
        return "the bundle does not say what was compared with torch"
    return (
        f"with torch, at export: {', '.join(targets)}" if targets else "NOT compared with torch (--no-verify)"
    )


def _size(size: int | None, unknown: str = "unknown") -> str:
    return unknown if size is None else format_size(size)
