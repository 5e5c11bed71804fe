"""DP-SGD (Abadi et al. 2016): each sample's gradient bounded, the sum drowned in noise, and what that spends.

The randomness, noise and choice of samples alike, is the output of SHAKE-256 under a secret key of 256 bits
and the number of the update: nobody can take it away without the key, and a run that was broken off goes on
with the very same randomness, so that nothing is drawn, or spent, twice. What is promised: docs/privacy.md.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_tcur_runtime.accountant import epsilon, noise_for
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.optimizer import clipping_scale
from edge_tcur_runtime.origin import DELTA, EPSILON, spent_by
from edge_tcur_runtime.settings import PersonalizeSettings, PrivacySettings

_KEY_BYTES = 32
_NOISE_BYTES = 256  # for each number that is trained, while the noise of an update is made
_DRAWS = 4  # normal numbers added up for each one; see `_normal`


@dataclass(frozen=True)
class PrivacyPlan:
    """How much noise a run adds, and what it spends.

    Attributes:
        noise_multiplier, clip, delta: see `PrivacySettings`, resolved.
        samples: n, of the training part.
        rate: probability with which each sample takes part in an update.
        steps: updates of the whole run.
        epsilon: what all of them spend.
        promised: whether the noise is secret; not with a seed.
    """

    noise_multiplier: float
    clip: float
    delta: float
    samples: int
    rate: float
    steps: int
    epsilon: float
    promised: bool

    @property
    def expected(self) -> float:
        """Samples that take part in an update on average."""
        return self.rate * self.samples

    def total(self, start: Mapping[str, str]) -> tuple[float, float]:
        """Epsilon and delta of the new adapter, all runs on the way to it added up: at worst they had the
        same samples. Infinite where one of them was without privacy, or with noise that is no secret.

        Args:
            start: provenance of the adapter that the run starts from.
        """
        earlier, own = spent_by(start), self.epsilon if self.promised else math.inf
        return earlier[0] + own, earlier[1] + self.delta

    def provenance(self, start: Mapping[str, str]) -> dict[str, str]:
        """What the new adapter's provenance says of it."""
        spent = self.total(start)
        return {EPSILON: repr(spent[0]), DELTA: repr(spent[1])}

    def facts(self, start: Mapping[str, str]) -> dict[str, Any]:
        """What a result tells of it; a total without a bound is None."""
        spent = [value if math.isfinite(value) else None for value in self.total(start)]
        names = ("total_epsilon", "total_delta")
        return {**asdict(self), **dict(zip(names, spent, strict=True))}


def steps_per_epoch(samples: int, settings: PersonalizeSettings) -> int:
    """Updates of an epoch: as many as there are batches."""
    return -(-samples // settings.batch_size)


def noise_bytes(numbers: int) -> int:
    """Bytes that making the noise of an update takes, between passes, for so many trained numbers."""
    return _NOISE_BYTES * numbers


def plan_privacy(settings: PersonalizeSettings, samples: int) -> PrivacyPlan | None:
    """The plan of a run over `samples` training samples; None without privacy.

    Raises:
        ConfigError: no amount of noise spends as little as is asked for, or what is given bounds nothing.
    """
    wanted = settings.privacy
    if wanted is None:
        return None
    rate = min(1.0, settings.batch_size / samples)
    steps = settings.epochs * steps_per_epoch(samples, settings)
    delta = wanted.delta or min(0.5, samples**-1.1)
    noise = _noise(wanted, rate, steps, delta)
    spent = epsilon(noise, rate, steps, delta)
    if not math.isfinite(spent):
        raise ConfigError(
            f"{noise:g}: so little noise promises nothing", where="noise_multiplier", hint="1 is common"
        )
    return PrivacyPlan(noise, wanted.clip, delta, samples, rate, steps, spent, wanted.noise_seed is None)


def _noise(wanted: PrivacySettings, rate: float, steps: int, delta: float) -> float:
    if wanted.epsilon is None:
        return wanted.noise_multiplier or 1.0
    try:
        return noise_for(wanted.epsilon, rate, steps, delta)
    except ValueError as error:
        raise ConfigError(
            str(error), where="epsilon", hint="allow more, train fewer epochs, or collect more samples"
        ) from error


def new_key(settings: PrivacySettings) -> str:
    """Key of a run's randomness, in hex: secret, or made from the seed."""
    if settings.noise_seed is None:
        return secrets.token_bytes(_KEY_BYTES).hex()
    return hashlib.sha256(b"edge-tcur noise seed" + settings.noise_seed.to_bytes(8, "little")).hexdigest()


class Mechanism:
    """The subsampled Gaussian mechanism of one run.

    Args:
        plan: see `PrivacyPlan`.
        key: of its randomness, in hex; part of the run's checkpoint.
    """

    def __init__(self, plan: PrivacyPlan, key: str) -> None:
        self.plan, self.key = plan, key

    def chosen(self, step: int) -> np.ndarray:
        """Numbers of the samples of update `step` (from 0), ascending: each takes part on its own, with the
        plan's rate. There may be none."""
        return np.flatnonzero(self._uniform(b"samples", step, self.plan.samples) < self.plan.rate)

    def bounded(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One sample's gradients, scaled down to the plan's norm over all of them together.

        Raises:
            FloatingPointError: they are not finite, and cannot be bounded.
        """
        scale = clipping_scale(gradients, self.plan.clip)
        return {name: gradient * scale for name, gradient in gradients.items()}

    def noised(self, total: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        """The sum of bounded gradients with the noise of update `step`, over the expected number of samples:
        the true number is not for anybody to know."""
        names = sorted(total)
        noise = self._normal(step, sum(total[name].size for name in names))
        noise *= self.plan.noise_multiplier * self.plan.clip
        result, place = {}, 0
        for name in names:
            value = total[name]
            part = noise[place : place + value.size].reshape(value.shape)
            result[name], place = (value + part) / self.plan.expected, place + value.size
        return result

    def _uniform(self, what: bytes, step: int, count: int) -> np.ndarray:
        """float64 in [0, 1), 53 random bits each."""
        seed = bytes.fromhex(self.key) + what + step.to_bytes(8, "little")
        raw = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), "<u8")
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _normal(self, step: int, count: int) -> np.ndarray:
        """Standard normal numbers, each the scaled sum of several by Box and Muller.

        The low bits of a single one betray the value that it was added to (Mironov 2012); to look for the
        ways to a sum of several is out of reach (Holohan and Braghin 2021, as in Opacus' secure mode).
        """
        first, second = self._uniform(b"noise", step, 2 * _DRAWS * count).reshape(2, _DRAWS, count)
        radius = np.sqrt(-2 * np.log1p(-first))
        result: np.ndarray = (radius * np.cos(2 * np.pi * second)).sum(axis=0) / math.sqrt(_DRAWS)
        return result
