"""Settings of a personalisation, declared once; the command's options take their defaults from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_tcur_runtime.errors import ConfigError

Gate = Callable[[], "str | None"]  # says why a run must wait for another time, or None
RESUME = ("auto", "yes", "no")
RECOMPUTE = ("auto", "on", "off")
HOLDOUT = 0.2


@dataclass(frozen=True)
class OptimizerSettings:
    """What every optimiser has.

    Attributes:
        learning_rate: peak learning rate of the cores, in their frame's coordinates.
        head_learning_rate: peak learning rate of trained extras (a head).
        weight_decay: of AdamW decoupled; of SGD added to the gradient.
        max_gradient_norm: gradients are scaled down to this global norm; 0 switches clipping off.
    """

    learning_rate: float
    head_learning_rate: float
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < 100:
                raise ConfigError(f"{getattr(self, name)}; expected above 0 and below 100", where=name)
        for name in ("weight_decay", "max_gradient_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{getattr(self, name)}; expected at least 0", where=name)


@dataclass(frozen=True)
class AdamWSettings(OptimizerSettings):
    """Settings of AdamW (Loshchilov and Hutter 2019); see `OptimizerSettings`."""

    learning_rate: float = 0.02
    head_learning_rate: float = 0.005
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)}; expected 0 or more and less than 1", where=name)
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"{self.epsilon}; expected above 0", where="epsilon")


@dataclass(frozen=True)
class SGDSettings(OptimizerSettings):
    """Settings of gradient descent with momentum; see `OptimizerSettings`.

    Attributes:
        momentum: part of the last velocity that is kept; 0 for none, and no state.
    """

    learning_rate: float = 0.05
    head_learning_rate: float = 0.05
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"{self.momentum}; expected 0 or more and less than 1", where="momentum")


OPTIMIZERS: Mapping[str, type[AdamWSettings] | type[SGDSettings]] = {
    "adamw": AdamWSettings,
    "sgd": SGDSettings,
}


@dataclass(frozen=True)
class PrivacySettings:
    """What DP-SGD is asked for (Abadi et al. 2016); see `edge_tcur_runtime.privacy`.

    Attributes:
        noise_multiplier: standard deviation of the noise over `clip`; None: what `epsilon` asks for, or 1.
        epsilon: what the run may spend; the noise follows from it.
        clip: bound on the norm of each sample's gradient, over cores and head together.
        delta: None takes ``1 / n ** 1.1`` for n training samples.
        noise_seed: of a run that must be repeatable. Who knows it can take the noise away: nothing is
            promised.
    """

    noise_multiplier: float | None = None
    epsilon: float | None = None
    clip: float = 1.0
    delta: float | None = None
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and self.epsilon is not None:
            raise ConfigError("give the noise or the epsilon, not both", where="epsilon")
        for name, high in (("noise_multiplier", 1e4), ("epsilon", 1e4), ("clip", 1e6), ("delta", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 < value < high:
                raise ConfigError(f"{value}; expected above 0 and below {high:g}", where=name)
        if self.noise_seed is not None and not 0 <= self.noise_seed < 2**64:
            raise ConfigError(f"{self.noise_seed}; expected 0 to 2^64 - 1", where="noise_seed")


@dataclass(frozen=True)
class PersonalizeSettings:
    """Settings of a personalisation.

    Attributes:
        epochs: passes over the user's data.
        batch_size: samples per update, whatever the micro-batch.
        optimizer: learning rates and the rest; which optimiser, its class says.
        holdout: part of the data kept apart to decide whether the new adapter is better; None takes 0.2, and
            nothing with `privacy`: held-out samples are looked at without noise.
        patience: epochs without a lower held-out loss that end the run; the values of the epoch with the
            lowest are kept. 0 runs all epochs and keeps the last one's values, and so does a held-out part
            of fewer than `edge_tcur_runtime.outcome.MIN_HELD_OUT` samples.
        forget: how far the new adapter may fall behind on the bundle's reference set: points (0 to 1) of a
            share, part of an error or a loss (`edge_tcur_runtime.reference`).
        budget: peak resident memory of the whole process in bytes; None for no limit.
        engine: ``auto``, ``ort-training``, ``ort-step`` or ``executorch``.
        provider: what runs the graph: ``auto``, or a name of `edge_tcur_runtime.engines.providers`.
        threads: CPU threads; 0 takes all that this process may use, or with a budget what was measured to be
            the fastest that fits it.
        seed: of the split and the order of the data.
        recompute: ``on`` runs the step graph that keeps only each block's input (less memory, more time),
            ``off`` the plain one, ``auto`` the former where the latter might not fit the budget.
        last_blocks: train the last blocks alone, with the step graph that was exported for it.
        allow_last_blocks: consent to that, where nothing else fits the budget.
        privacy: train with differential privacy; None does not.
    """

    epochs: int = 20
    batch_size: int = 16
    optimizer: OptimizerSettings = field(default_factory=AdamWSettings)
    holdout: float | None = None
    patience: int = 5
    forget: float = 0.02
    budget: int | None = None
    engine: str = "auto"
    provider: str = "auto"
    threads: int = 0
    seed: int = 0
    recompute: str = "auto"
    last_blocks: bool = False
    allow_last_blocks: bool = False
    privacy: PrivacySettings | None = None

    def __post_init__(self) -> None:
        lowest = {"epochs": 1, "batch_size": 1, "threads": 0, "seed": 0, "patience": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{getattr(self, name)}; expected at least {low}", where=name)
        if not 0 <= self.held_out_part < 1:
            raise ConfigError(f"{self.holdout}; expected 0 or more and less than 1", where="holdout")
        if not 0 <= self.forget < math.inf:
            raise ConfigError(f"{self.forget}; expected 0 or more", where="forget")
        if self.recompute not in RECOMPUTE:
            raise ConfigError(f"{self.recompute!r}; expected {', '.join(RECOMPUTE)}", where="recompute")
        if self.last_blocks and self.recompute == "on":
            raise ConfigError(
                "the graph of the last blocks keeps nothing of the others: there is nothing to recompute",
                where="recompute",
                hint="leave --recompute or --last-blocks out",
            )

    @property
    def held_out_part(self) -> float:
        """`holdout`, or its default."""
        if self.holdout is not None:
            return self.holdout
        return HOLDOUT if self.privacy is None else 0.0


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
