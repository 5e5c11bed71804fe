"""Settings of a personalisation, declared once; the command's options take their defaults from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_tcur_runtime.errors import ConfigError

Gate = Callable[[], "str | None"]  # says why a run must wait for another time, or None
RESUME = ("auto", "yes", "no")
RECOMPUTE = ("auto", "on", "off")


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of AdamW (Loshchilov and Hutter 2019) with clipping of the global gradient norm.

    Attributes:
        learning_rate: peak learning rate of the cores, in their frame's coordinates.
        head_learning_rate: peak learning rate of trained extras (a head).
        weight_decay: decoupled weight decay.
        max_gradient_norm: gradients are scaled down to this global norm; 0 switches clipping off.
    """

    learning_rate: float = 0.02
    head_learning_rate: float = 0.005
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < 100:
                raise ConfigError(f"{getattr(self, name)}; expected above 0 and below 100", where=name)
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"{self.weight_decay}; expected at least 0", where="weight_decay")


@dataclass(frozen=True)
class PersonalizeSettings:
    """Settings of a personalisation.

    Attributes:
        epochs: passes over the user's data.
        batch_size: samples per update, whatever the micro-batch.
        optimizer: learning rates and the rest.
        holdout: part of the data kept apart to decide whether the new adapter is better.
        budget: peak resident memory of the whole process in bytes; None for no limit.
        engine: ``auto``, ``ort-training``, ``ort-step`` or ``executorch``.
        provider: what runs the graph: ``auto``, or a name of `edge_tcur_runtime.engines.providers`.
        threads: CPU threads; 0 takes all that this process may use.
        seed: of the split and the order of the data.
        recompute: ``on`` runs the step graph that keeps only each block's input (less memory, more time),
            ``off`` the plain one, ``auto`` the former where the latter might not fit the budget.
        last_blocks: train the last blocks alone, with the step graph that was exported for it.
    """

    epochs: int = 20
    batch_size: int = 16
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)
    holdout: float = 0.2
    budget: int | None = None
    engine: str = "auto"
    provider: str = "auto"
    threads: int = 0
    seed: int = 0
    recompute: str = "auto"
    last_blocks: bool = False

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("threads", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{getattr(self, name)}; expected at least {low}", where=name)
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"{self.holdout}; expected 0 or more and less than 1", where="holdout")
        if self.recompute not in RECOMPUTE:
            raise ConfigError(f"{self.recompute!r}; expected {', '.join(RECOMPUTE)}", where="recompute")
        if self.last_blocks and self.recompute == "on":
            raise ConfigError(
                "the graph of the last blocks keeps nothing of the others: there is nothing to recompute",
                where="recompute",
                hint="leave --recompute or --last-blocks out",
            )


@dataclass(frozen=True)
class KeepSettings:
    """How the progress of a run is kept.

    Attributes:
        directory: of its checkpoints, which belong to one run at a time; None keeps nothing.
        seconds: between two checkpoints; 0 saves after every update.
        resume: ``auto`` goes on from a checkpoint of this very run and starts over otherwise, ``yes``
            insists on one, ``no`` starts over.
        gates: looked at between passes; a closed one ends the run as a signal does.
    """

    directory: Path | None = None
    seconds: float = 30.0
    resume: str = "auto"
    gates: Sequence[Gate] = ()

    def __post_init__(self) -> None:
        if self.resume not in RESUME:
            raise ConfigError(f"{self.resume!r}; expected one of {', '.join(RESUME)}", where="resume")
        if not 0 <= self.seconds < math.inf:
            raise ConfigError(f"{self.seconds}; expected 0 or more", where="checkpoint_seconds")
