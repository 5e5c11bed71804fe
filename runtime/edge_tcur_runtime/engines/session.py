"""Sessions of ONNX Runtime with the settings that a phone needs."""

from __future__ import annotations

import os
import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from edge_tcur_runtime.engines.engine import require_onnxruntime
from edge_tcur_runtime.errors import IncompatibleError

_TRAINING = "onnxruntime.training"
_ERRORS_ONLY = 3  # ONNX Runtime's log severity


def usable_cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def import_onnxruntime() -> Any:
    """`onnxruntime`, without torch even where torch is installed.

    The training build imports two of its packages on its own, `onnxruntime.training` and its
    `ortmodule`, and both import torch, undeclared, for parts that are not used here (235 MiB of
    resident memory). A bare package with the same path in the place of the first lets the submodules
    that are used be imported directly; None in the place of the second makes its import fail, as it
    does where there is no torch.
    """
    module = f"{_TRAINING}.ortmodule"
    if "onnxruntime" not in sys.modules and _TRAINING not in sys.modules:
        spec = PathFinder.find_spec("onnxruntime")
        folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "training"
        if folder is not None and folder.is_dir():
            package = types.ModuleType(_TRAINING)
            package.__path__ = [str(folder)]
            sys.modules[_TRAINING] = package
            sys.modules[module] = None  # type: ignore[assignment]
    try:
        import onnxruntime
    finally:
        if sys.modules.get(module, ...) is None:
            del sys.modules[module]

    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return onnxruntime


def session_options(threads: int) -> Any:
    """Options that keep peak memory low.

    The arena keeps every freed block and memory patterns allocate the whole step at once; prepacking
    copies each weight into memory of its own, so mapped weights would be held twice; constant folding
    would keep a transposed copy of each weight that the backward pass reads.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    return options


def open_session(path: Path, *, threads: int) -> Any:
    """An inference session on the CPU.

    Raises:
        MissingEngineError: ONNX Runtime is not installed.
        IncompatibleError: this ONNX Runtime cannot load the graph.
    """
    installed = require_onnxruntime()
    onnxruntime = import_onnxruntime()
    try:
        return onnxruntime.InferenceSession(
            str(path), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise _cannot_load(error, path, installed.distribution, installed.version) from error


def _cannot_load(error: Exception, path: Path, distribution: str, version: str) -> IncompatibleError:
    """ONNX Runtime raises classes of its own that share no base but Exception."""
    return IncompatibleError(
        f"{distribution} {version} cannot load the graph: {str(error).splitlines()[0]}",
        where=str(path),
        hint="update ONNX Runtime, or export the bundle again",
    )
