"""Sessions of ONNX Runtime with the settings that a phone needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edge_tcur_runtime.engines.engine import require_onnxruntime
from edge_tcur_runtime.errors import IncompatibleError

_ERRORS_ONLY = 3  # ONNX Runtime's log severity


def usable_cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def session_options(threads: int) -> Any:
    """Options that keep peak memory low.

    The arena keeps every freed block and memory patterns allocate the whole step at once; prepacking
    copies each weight into memory of its own, so mapped weights would be held twice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def open_session(path: Path, *, threads: int) -> Any:
    """An inference session on the CPU.

    Raises:
        MissingEngineError: ONNX Runtime is not installed.
        IncompatibleError: this ONNX Runtime cannot load the graph.
    """
    installed = require_onnxruntime()
    import onnxruntime

    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
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
