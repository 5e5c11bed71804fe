"""The optimisers of every engine, in numpy on the tiny factors, and the learning-rate schedule.

One definition: whichever engine computes the gradients, the update is the same, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_tcur_runtime.settings import AdamWSettings, OptimizerSettings, SGDSettings


def schedule(step: int, total_steps: int, warmup_fraction: float = 0.1) -> float:
    """Factor of the peak learning rate at `step` (from 0): linear warm-up, then linear decay to 0."""
    warmup = max(1, round(total_steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


@dataclass
class Optimizer(ABC):
    """Moves named float64 arrays.

    Attributes:
        settings: learning rates and the rest.
        first, second: its state by parameter name, float64, created at the first step; what it does not
            need stays empty.
        steps: updates that were done.
    """

    settings: OptimizerSettings
    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)
    steps: int = 0

    def step(
        self,
        values: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        rates: Mapping[str, float],
    ) -> dict[str, np.ndarray]:
        """One update, by gradients whose global norm is clipped.

        Args:
            values: parameters by name, float64.
            gradients: gradients by the same names and shapes.
            rates: learning rate of each parameter at this step.

        Returns:
            the new parameters by name; `values` are unchanged.

        Raises:
            FloatingPointError: a gradient is not finite; nothing was updated.
        """
        scale = clipping_scale(gradients, self.settings.max_gradient_norm)
        self.steps += 1
        return {
            name: self._moved(name, value, gradients[name] * scale, rates[name])
            for name, value in values.items()
        }

    @abstractmethod
    def _moved(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        """The new value of one parameter, its state brought up to date."""


def build_optimizer(
    settings: OptimizerSettings,
    first: Mapping[str, np.ndarray] | None = None,
    second: Mapping[str, np.ndarray] | None = None,
    steps: int = 0,
) -> Optimizer:
    """The optimiser that `settings` are of, with the state that it had after `steps` updates."""
    state = dict(first or {}), dict(second or {}), steps
    if isinstance(settings, SGDSettings):
        return SGD(settings, *state)
    assert isinstance(settings, AdamWSettings)
    return AdamW(settings, *state)


@dataclass
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2); `first` and `second` are its moments."""

    settings: AdamWSettings

    def _moved(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        settings = self.settings
        first = self.first.get(name, 0.0) * settings.beta1 + (1 - settings.beta1) * gradient
        second = self.second.get(name, 0.0) * settings.beta2 + (1 - settings.beta2) * gradient**2
        self.first[name], self.second[name] = first, second
        corrected = first / (1 - settings.beta1**self.steps)
        spread = np.sqrt(second / (1 - settings.beta2**self.steps)) + settings.epsilon
        result: np.ndarray = value * (1 - rate * settings.weight_decay) - rate * corrected / spread
        return result


@dataclass
class SGD(Optimizer):
    """Gradient descent with momentum as `torch.optim.SGD` has it: the velocity (`first`) starts as the first
    gradient, and the learning rate multiplies the velocity."""

    settings: SGDSettings

    def _moved(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        velocity = gradient + self.settings.weight_decay * value
        if self.settings.momentum:
            velocity = self.first.get(name, 0.0) * self.settings.momentum + velocity
            self.first[name] = velocity
        return value - rate * velocity


def global_norm(gradients: Mapping[str, np.ndarray]) -> float:
    """Euclidean norm over all arrays together; what is too large to square gives infinity."""
    with np.errstate(over="ignore"):
        return float(np.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients.values())))


def clipping_scale(gradients: Mapping[str, np.ndarray], limit: float) -> float:
    """The factor that brings the global norm of `gradients` down to `limit`; 1 below it, or for a limit of 0.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    norm = global_norm(gradients)
    if not np.isfinite(norm):
        raise FloatingPointError("a gradient is not finite")
    return limit / norm if 0 < limit < norm else 1.0
