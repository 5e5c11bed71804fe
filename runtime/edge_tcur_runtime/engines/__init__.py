"""Engines: what computes loss and gradients on a device. One file each behind one Protocol."""

from edge_tcur_runtime.engines.engine import (
    ENGINES,
    StepResult,
    TrainingEngine,
    choose_engine,
    open_engine,
)

__all__ = ["ENGINES", "StepResult", "TrainingEngine", "choose_engine", "open_engine"]
