"""One run of a comparison: warm up the head, prepare the method, train, score."""

from __future__ import annotations

import time
import warnings

import numpy as np
import torch
from torch import Tensor

from edge_tcur.compare.methods import Method
from edge_tcur.compare.problems import Problem
from edge_tcur.compare.runner import (
    BATCH_SIZE,
    GRADIENT_BATCHES,
    HEAD_RATE,
    WARM_BATCH,
    WARM_EPOCHS,
    WARM_RATE,
    Outcome,
)
from edge_tcur.method.targets import Targets
from edge_tcur.training.gradients import task_gradients
from edge_tcur.training.head import warm_head
from edge_tcur.training.loop import LoopSettings, fit


def train_and_score(problem: Problem, method: Method, rate: float, seed: int) -> Outcome:
    """Trains `method` on `problem`; a run that diverges scores zero."""
    torch.manual_seed(seed)
    base, task = problem.base, problem.task
    began = time.perf_counter()
    warm_head(base, problem.train, task, LoopSettings(WARM_EPOCHS, WARM_BATCH, seed=seed), WARM_RATE)

    def gradients(targets: Targets) -> dict[str, Tensor]:
        return task_gradients(
            base.model,
            targets,
            problem.train,
            task,
            batch_size=BATCH_SIZE,
            batches=GRADIENT_BATCHES,
            seed=seed,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of methods that it thinks unusual
        prepared = method.prepare(base, gradients)
    head = list(base.head_parameters().values())
    if not prepared.parameters and not head:
        head = [value for name in problem.control for value in base.model.get_submodule(name).parameters()]
    for parameter in head:
        parameter.requires_grad_(True)
    ready = time.perf_counter()
    settings = LoopSettings(problem.epochs, BATCH_SIZE, seed=seed)
    try:
        history = fit(
            base.model, [(prepared.parameters, rate), (head, HEAD_RATE)], problem.train, task, settings
        )
        scores = [problem.score(base.model, part, task) for part in (problem.validation, problem.test)]
        losses, seconds = history.losses, history.seconds
    except FloatingPointError:
        scores, losses, seconds = [0.0, 0.0], [], time.perf_counter() - ready
    return Outcome(
        validation=scores[0],
        test=scores[1],
        trained_numbers=prepared.trained_numbers,
        shipped_bytes=prepared.shipped_bytes,
        seconds=seconds,
        prepare_seconds=ready - began,
        steps=len(losses),
        final_loss=float(np.mean(losses[-20:])) if losses else 0.0,
    )
