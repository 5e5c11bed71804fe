"""The training loop of the workstation, and the run directory it writes.

The names below are imported when they are used, so that the settings (`edge_tcur.training.config`)
can be read without torch, for the help of `edge-tcur train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_tcur.training.config import TrainConfig
    from edge_tcur.training.evaluate import EvalResult, evaluate_run
    from edge_tcur.training.job import TrainResult, train
    from edge_tcur.training.run import Run, open_run

__all__ = ["EvalResult", "Run", "TrainConfig", "TrainResult", "evaluate_run", "open_run", "train"]

# No submodule may have the name of a function here: importing it would hide the function.
_HOMES = {
    "EvalResult": "evaluate",
    "Run": "run",
    "TrainConfig": "config",
    "TrainResult": "job",
    "evaluate_run": "evaluate",
    "open_run": "run",
    "train": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
