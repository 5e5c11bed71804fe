"""The training loop of the workstation, and the run directory it writes."""

from edge_tcur.training.config import TrainConfig
from edge_tcur.training.evaluate import EvalResult, evaluate_run
from edge_tcur.training.run import Run, open_run
from edge_tcur.training.train import TrainResult, train

__all__ = ["EvalResult", "Run", "TrainConfig", "TrainResult", "evaluate_run", "open_run", "train"]
