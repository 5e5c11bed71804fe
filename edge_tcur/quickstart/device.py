"""The device of the quickstart: `edge-tcur-device` in fresh processes in which torch cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_tcur_runtime.errors import EdgeError

# None in sys.modules makes every import of torch fail, as on a device that does not have it.
_START = "import sys; sys.modules['torch'] = None; from edge_tcur_runtime.cli import main; main()"
_PROBE = """
import sys
sys.modules["torch"] = None
try:
    import torch
except ImportError:
    print("absent")
"""


class DeviceError(EdgeError):
    """A command on the simulated device failed; the message is the device's own."""

    code = "device"


def torch_is_absent() -> bool:
    """Whether the device's processes really cannot import torch."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "absent"


def run_device(*arguments: str | Path, on_line: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Runs ``edge-tcur-device ... --json`` and returns its result.

    Raises:
        DeviceError: it failed; its own error message is passed on.
    """
    command = [sys.executable, "-c", _START, *map(str, arguments), "--json"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if on_line is not None:
        for line in done.stderr.splitlines():
            on_line(line)
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise DeviceError(
            f"'{' '.join(map(str, arguments))}' gave no result: {done.stderr[-400:]}"
        ) from error
    if "error" in document:
        failure = document["error"]
        raise DeviceError(
            f"on the device: {failure['message']}", where=failure["where"], hint=failure["hint"]
        )
    return document
