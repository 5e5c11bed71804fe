"""The optimiser of every engine, in numpy on the tiny factors, and the learning-rate schedule.

One definition: whichever engine computes the gradients, the update is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_tcur_runtime.settings import AdamWSettings


def schedule(step: int, total_steps: int, warmup_fraction: float = 0.1) -> float:
    """Factor of the peak learning rate at `step` (from 0): linear warm-up, then linear decay to 0."""
    warmup = max(1, round(total_steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


@dataclass
class AdamW:
    """AdamW over named float64 arrays.

    Attributes:
        settings: see `AdamWSettings`.
        first, second: moments by parameter name, float64, created at the first step.
        steps: updates done.
    """

    settings: AdamWSettings
    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)
    steps: int = 0

    def step(
        self,
        values: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        rates: Mapping[str, float],
    ) -> dict[str, np.ndarray]:
        """One update.

        Args:
            values: parameters by name, float64.
            gradients: gradients by the same names and shapes.
            rates: learning rate of each parameter at this step.

        Returns:
            the new parameters by name; `values` are unchanged.

        Raises:
            FloatingPointError: a gradient is not finite; nothing was updated.
        """
        settings = self.settings
        with np.errstate(over="ignore"):  # what is too large to square is not finite below
            norm = float(np.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients.values())))
        if not np.isfinite(norm):
            raise FloatingPointError("a gradient is not finite")
        limit = settings.max_gradient_norm
        scale = limit / norm if 0 < limit < norm else 1.0
        self.steps += 1
        result = {}
        for name, value in values.items():
            gradient = gradients[name] * scale
            first = self.first.get(name, 0.0) * settings.beta1 + (1 - settings.beta1) * gradient
            second = self.second.get(name, 0.0) * settings.beta2 + (1 - settings.beta2) * gradient**2
            self.first[name], self.second[name] = first, second
            corrected = first / (1 - settings.beta1**self.steps)
            spread = np.sqrt(second / (1 - settings.beta2**self.steps)) + settings.epsilon
            rate = rates[name]
            result[name] = value * (1 - rate * settings.weight_decay) - rate * corrected / spread
        return result
