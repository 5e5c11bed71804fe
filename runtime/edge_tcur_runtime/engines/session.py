"""ONNX Runtime: importing it without torch, and sessions with the settings that a phone needs."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from edge_tcur_runtime.cores import usable_cores
from edge_tcur_runtime.engines.engine import require_onnxruntime
from edge_tcur_runtime.engines.providers import ON_CPU, Placement, session_providers
from edge_tcur_runtime.engines.verified import Files, graph_source, require_session_unchanged
from edge_tcur_runtime.errors import ConfigError, IncompatibleError, MissingEngineError

_NOTHING = 4  # ONNX Runtime's log severity: its errors are raised, and shown once
_TRAINING = "onnxruntime.training"
_LONGEST_REASON = 240  # characters of ONNX Runtime's message that are shown
_STATUS = re.compile(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", re.DOTALL)
_SOURCE = re.compile(r"\S*/?\w+\.cc:\d+ ")  # where in ONNX Runtime's sources the error came up


def import_onnxruntime() -> Any:
    """`onnxruntime`, without torch even where torch is installed.

    The training build imports two of its packages on its own, `onnxruntime.training` and its
    `ortmodule`, and both import torch, undeclared, for parts that are not used here (230 MiB of
    resident memory). A bare package with the same path in the place of the first lets the submodules
    that are used be imported directly; None in the place of the second makes its import fail, as it
    does where there is no torch.

    Raises:
        MissingEngineError: not installed, or it cannot be imported on this machine.
    """
    installed = require_onnxruntime()
    module = f"{_TRAINING}.ortmodule"
    if _TRAINING not in sys.modules:
        spec = PathFinder.find_spec("onnxruntime")
        folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "training"
        if folder is not None and folder.is_dir():
            package = types.ModuleType(_TRAINING)
            package.__path__ = [str(folder)]
            sys.modules[_TRAINING] = package
            sys.modules[module] = None  # type: ignore[assignment]
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingEngineError(
            f"{installed.distribution} {installed.version} cannot be imported: {error_line(error)}",
            hint="install it again; 'edge-tcur-device doctor' shows what is there",
        ) from error
    finally:
        if sys.modules.get(module, ...) is None:
            del sys.modules[module]
    onnxruntime.set_default_logger_severity(_NOTHING)
    return onnxruntime


def session_options(threads: int, *, prepack: bool = False) -> Any:
    """Options that keep peak memory low.

    The arena keeps every freed block and memory patterns allocate the whole step at once; prepacking
    copies each weight into memory of its own, so mapped weights would be held twice; constant folding
    would keep a transposed copy of each weight that the backward pass reads.

    Args:
        threads: of the session, as many as are given; 0 takes all cores that this process may use.
        prepack: hold each weight of a product packed as well. Otherwise each product packs it anew, which of
            few samples takes more time than the product.

    Raises:
        ConfigError: a negative number of threads.
    """
    if threads < 0:
        raise ConfigError(f"{threads}; expected 0 or more", where="threads")
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = _NOTHING
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    return options


def open_session(
    path: Path,
    *,
    threads: int,
    files: Files | None = None,
    in_order: bool = False,
    placement: Placement = ON_CPU,
    optimized: bool = True,
    prepack: bool = False,
) -> Any:
    """An inference session, on the CPU where nothing else is said.

    Args:
        files: entries of the bundle's manifest, which what is opened must still match; None where the graph
            is of no bundle.
        in_order: run the nodes in the order of the file, and free each value after its last reader. ONNX
            Runtime's own order walks back from the last output, which puts off all gradients but one and may
            keep what is to be computed again.
        placement: the provider that runs it.
        optimized: False runs every node as it is in the file.
        prepack: see `session_options`.

    Raises:
        MissingEngineError: ONNX Runtime is not installed.
        IncompatibleError: this ONNX Runtime cannot load the graph, or the provider does not start.
        IntegrityError: the graph or the base is not what the manifest says.
    """
    onnxruntime, options = import_onnxruntime(), session_options(threads, prepack=prepack)
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        # ONNX Runtime's reuse keeps a freed buffer for a later value of its size, to the last such value: of
        # each size as many stay as were ever alive at once.
        options.enable_mem_reuse = False
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = session_providers(onnxruntime, options, placement)
    source = str(path) if files is None else graph_source(path, files, options)
    try:
        session = onnxruntime.InferenceSession(source, options, **providers)
    except Exception as error:
        raise cannot_load(error, path) from error
    if files is not None:
        require_session_unchanged(path, files, source)
    _require_started(session, placement)
    return session


def _require_started(session: Any, placement: Placement) -> None:
    """Refuses a session whose provider did not start: ONNX Runtime's Python goes on with the CPU then, and
    would again after a run that failed."""
    session.disable_fallback()
    if placement.provider.ort not in session.get_providers():
        raise IncompatibleError(
            f"the provider {placement.provider.name!r} does not start here",
            hint="install the device's driver, or use --provider cpu",
        )


def cannot_load(error: Exception, path: Path) -> IncompatibleError:
    """The error of a graph that the installed library refuses.

    ONNX Runtime raises classes of its own that share no base but Exception.
    """
    installed = require_onnxruntime()
    return IncompatibleError(
        f"{installed.distribution} {installed.version} cannot load the graph: {error_line(error)}",
        where=str(path),
        hint="update ONNX Runtime, or export the bundle again",
    )


def error_line(error: Exception) -> str:
    """One line of ONNX Runtime's message: the reason, without the sources' paths and signatures."""
    text = _SOURCE.sub("", _STATUS.sub("", str(error)))
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else f"...{line[-_LONGEST_REASON:]}"


def require_names(path: Path, kind: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Refuses a graph that lacks one of the `expected` names.

    Args:
        path: the graph.
        kind: what the names are, ``"input"`` or ``"output"``.

    Raises:
        IncompatibleError: it is another graph than its role in the bundle says.
    """
    there = set(found)
    for name in expected:
        if name not in there:
            raise IncompatibleError(
                f"the graph has no {kind} {name!r}", where=str(path), hint="export the bundle again"
            )
