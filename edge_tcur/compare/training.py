"""One run of a comparison: warm up the head, prepare the method, train, score."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from edge_tcur.compare.methods import Method
from edge_tcur.compare.problems import Problem
from edge_tcur.compare.records import Outcome
from edge_tcur.compare.runner import (
    BATCH_SIZE,
    GRADIENT_BATCHES,
    HEAD_RATE,
    WARM_BATCH,
    WARM_EPOCHS,
    WARM_RATE,
)
from edge_tcur.data import Samples
from edge_tcur.method.selection import UPDATE
from edge_tcur.method.targets import Targets
from edge_tcur.training.gradients import task_gradients
from edge_tcur.training.head import warm_head
from edge_tcur.training.loop import LoopSettings, fit
from edge_tcur.training.rehearsal import rehearsal_rank, rehearse
from edge_tcur_runtime.atomic import write_atomic

_SECONDS = "seconds"


@dataclass(frozen=True)
class OnDevice:
    """Samples whose batches lie on a device."""

    samples: Samples
    device: torch.device

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """See `edge_tcur.data.Samples`."""
        inputs, targets = self.samples.take(indices)
        return {name: value.to(self.device) for name, value in inputs.items()}, targets.to(self.device)


class Run:
    """One run of `method` on `problem`.

    Attributes:
        borrowed: seconds that a rehearsal taken from `kept` had cost when it was made.
    """

    def __init__(self, problem: Problem, rate: float, seed: int, kept: Path, device: torch.device) -> None:
        """Moves the problem's base to the device and warms up its head.

        Args:
            rate: learning rate of the method.
            kept: folder of the rehearsals of this problem at this seed, which methods share.
        """
        self.problem, self.rate, self.seed, self.kept = problem, rate, seed, kept
        self.train, self.validation, self.test = (
            OnDevice(part, device) for part in (problem.train, problem.validation, problem.test)
        )
        self.borrowed, self.began = 0.0, time.perf_counter()
        problem.base.model.to(device)
        settings = LoopSettings(WARM_EPOCHS, WARM_BATCH, seed=seed)
        warm_head(problem.base, self.train, problem.task, settings, WARM_RATE)

    def directions(self, selection: str, targets: Targets) -> dict[str, Tensor]:
        """What `selection` looks at besides the weights."""
        if selection == UPDATE:
            return self._rehearsed(targets)
        return task_gradients(
            self.problem.base.model,
            targets,
            self.train,
            self.problem.task,
            batch_size=BATCH_SIZE,
            batches=GRADIENT_BATCHES,
            seed=self.seed,
        )

    def _rehearsed(self, targets: Targets) -> dict[str, Tensor]:
        """The update learnt in a rehearsal, made once for all methods of this rank."""
        rate = self.problem.rehearsal_rate
        rank = rehearsal_rank(targets)
        name = f"rehearsal-{self.problem.epochs}-r{rank}-{rate:g}-{self.seed}.safetensors"
        path = self.kept / name
        head = self.problem.base.head_parameters()
        if not path.exists():
            self._rehearse(targets, path)
        found = {name: value.to(self.train.device) for name, value in load_file(path).items()}
        self.borrowed = float(found.pop(_SECONDS))
        for name, value in head.items():
            value.data.copy_(found.pop(name))
        return found

    def _rehearse(self, targets: Targets, path: Path) -> None:
        base, began = self.problem.base, time.perf_counter()
        updates = rehearse(
            base,
            targets,
            self.train,
            self.problem.task,
            LoopSettings(self.problem.epochs, BATCH_SIZE, seed=self.seed),
            rate=self.problem.rehearsal_rate,
            head_rate=HEAD_RATE,
        )
        head = {name: value.detach() for name, value in base.head_parameters().items()}
        seconds = torch.tensor(time.perf_counter() - began)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({**updates, **head, _SECONDS: seconds}))

    def fit(self, method: Method) -> Outcome:
        """Prepares, trains and scores; a run that diverges scores zero."""
        problem, base = self.problem, self.problem.base
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's, of methods that it thinks unusual
                prepared = method.prepare(base, self.directions)
        except FloatingPointError:
            return Outcome(0.0, 0.0, 0, 0, 0.0, time.perf_counter() - self.began, 0, 0.0)
        head = list(base.head_parameters().values())
        if not prepared.parameters and not head:
            head = [
                value for name in problem.control for value in base.model.get_submodule(name).parameters()
            ]
        for parameter in head:
            parameter.requires_grad_(True)
        ready = time.perf_counter()
        settings = LoopSettings(problem.epochs, BATCH_SIZE, seed=self.seed)
        try:
            history = fit(
                base.model,
                [(prepared.parameters, self.rate), (head, HEAD_RATE)],
                self.train,
                problem.task,
                settings,
            )
            scores = [problem.score(base.model, part, problem.task) for part in (self.validation, self.test)]
            losses, seconds = history.losses, history.seconds
        except FloatingPointError:
            scores, losses, seconds = [0.0, 0.0], [], time.perf_counter() - ready
        return Outcome(
            validation=scores[0],
            test=scores[1],
            trained_numbers=prepared.trained_numbers,
            shipped_bytes=prepared.shipped_bytes,
            seconds=seconds,
            prepare_seconds=max(ready - self.began, self.borrowed),
            steps=len(losses),
            final_loss=float(np.mean(losses[-20:])) if losses else 0.0,
        )


def train_and_score(
    problem: Problem, method: Method, rate: float, seed: int, kept: Path, device: str = "cpu"
) -> Outcome:
    """Trains `method` on `problem`; see `Run`."""
    torch.manual_seed(seed)
    return Run(problem, rate, seed, kept, torch.device(device)).fit(method)
