"""What a run reached: the values that are kept, their scores, and whether they are put in use. Pure.

Which values: with patience those of the epoch with the lowest held-out loss, else those of the last epoch,
where the learning rate has come down to zero. The loss judges epochs, not the metric: on a few samples many
epochs share one metric, and the best of them is the luckiest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_tcur_runtime.reference import ReferenceSet
from edge_tcur_runtime.tasks import DeviceTask, ranks

Score = tuple[float, float]  # metric and mean loss

_FOUR = ("score_before", "loss_before", "score_after", "loss_after")
MIN_HELD_OUT = 8  # samples; the loss of fewer says too little to choose an epoch by


def patience_for(patience: int, held_out: int) -> int:
    """The patience of a run with that many held-out samples; 0 keeps the last epoch's values."""
    return patience if held_out >= MIN_HELD_OUT else 0


def judges(held_out: bool, reference: bool, training: bool = False) -> list[str]:
    """What judges a new adapter, as results name it; an empty list where nothing does."""
    named = (("held-out", held_out), ("reference", reference), ("training", training))
    return [name for name, there in named if there]


def beats(task: DeviceTask, new: Score, old: Score, *, ties: bool = False) -> bool:
    """Whether a metric and loss are better than others on the same samples, with `ties` also as good. A loss
    that is no number beats nothing, and loses to any number."""
    if not math.isfinite(new[1]) or not math.isfinite(old[1]):
        return math.isfinite(new[1])
    first, second = ranks(task, *new), ranks(task, *old)
    return first > second or (ties and first == second)


@dataclass(frozen=True)
class Yardstick:
    """The bundle's reference set with what the start and the kept values score on it (metric and loss), and
    how far these may fall behind; see `ReferenceSet.forgot`."""

    reference: ReferenceSet
    allowed: float
    before: tuple[float, float]
    after: tuple[float, float]

    @property
    def forgot(self) -> bool:
        """Whether the kept values fall behind too far."""
        return self.reference.forgot(self.after, self.allowed)

    def facts(self) -> dict[str, Any]:
        """What a result tells of it."""
        spec = self.reference.spec
        return {
            "samples": spec.samples,
            "measure": spec.measure,
            "allowed": self.allowed,
            "score": spec.score,
            "loss": spec.loss,
            "score_before": self.before[0],
            "loss_before": self.before[1],
            "score_after": self.after[0],
            "loss_after": self.after[1],
            "forgot": self.forgot,
        }


@dataclass
class Outcome:
    """What a run reached so far.

    Attributes:
        task: says which of two scores is better.
        values: trained values to keep (see above).
        before, after: metric and mean loss on the held-out part, of the start and of `values`; None without.
        losses: mean loss of every update.
        scores, held_out_losses: on the held-out part, after every epoch.
        patience: epochs without a lower held-out loss that end the run; 0 keeps the last epoch's values.
        stopped_early: patience ended the run.
        reference_before: metric and loss of the start on the bundle's reference set; None without one.
        yardstick: the verdict on that set, at the end of the run; None without one.
        own: metric and loss on the samples that were trained on, of the start and of `values`, where nothing
            was held out; else None.
        rival: of the adapter in use, where it is another than the start, on the held-out part, or where
            there is none on those samples. unmatched: why it could not be scored.
        guarded: the adapter in use was judged, and a new one that nothing judges must not take its place.
    """

    task: DeviceTask
    values: dict[str, np.ndarray]
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    patience: int = 0
    stopped_early: bool = False
    reference_before: tuple[float, float] | None = None
    yardstick: Yardstick | None = None
    own: tuple[Score, Score] | None = None
    rival: Score | None = None
    unmatched: str | None = None
    guarded: bool = False

    def scored(self, values: dict[str, np.ndarray], score: tuple[float, float]) -> None:
        """Takes the held-out metric and loss of the epoch that left `values`."""
        self.scores.append(score[0])
        self.held_out_losses.append(score[1])
        if self.kept_epoch == len(self.scores):
            self.values, self.after = values, score

    @property
    def kept_epoch(self) -> int:
        """Number (from 1) of the scored epoch whose values are kept: with patience the first of those with
        the lowest loss that is a number, else the last one; 0 before the first."""
        known = [loss if math.isfinite(loss) else math.inf for loss in self.held_out_losses]
        if not self.patience or not known or math.isinf(min(known)):
            return len(known)
        return known.index(min(known)) + 1

    @property
    def stalled(self) -> bool:
        """Whether `patience` epochs went by since the kept one. The start is none of them: at the peak of the
        learning rate a run may be worse than it for some epochs."""
        return 0 < self.patience <= len(self.scores) - self.kept_epoch

    @property
    def improved(self) -> bool | None:
        """A better metric than before, or the same at a lower loss, which must be a number; None where
        nothing was held out."""
        if self.before is None or self.after is None:
            return None
        return beats(self.task, self.after, self.before)

    @property
    def unlearned(self) -> bool:
        """Whether it answers what it was trained on worse than the start did, where nothing else is known."""
        return self.own is not None and not beats(self.task, self.own[1], self.own[0], ties=True)

    @property
    def outdone(self) -> bool:
        """Whether the adapter in use, another than the start, is as good on what was held out; where nothing
        was, whether it is better on what was trained on; or whether it could not be scored."""
        if self.unmatched is not None or self.rival is None:
            return self.unmatched is not None
        if self.after is not None and self.before is not None:
            return not beats(self.task, self.after, self.rival)
        return self.own is not None and not beats(self.task, self.own[1], self.rival, ties=True)

    @property
    def better(self) -> bool:
        """Whether the new adapter is kept, and put in use unless it is `withheld`: better than the start and
        than the adapter in use on what was held out; where nothing was, no worse on what it was trained on;
        and not too far behind on the reference set, if there is one."""
        forgot = self.yardstick is not None and self.yardstick.forgot
        return self.improved is not False and not (forgot or self.unlearned or self.outdone)

    @property
    def judged_by(self) -> list[str]:
        """What judged it: see `judges`."""
        return judges(self.improved is not None, self.yardstick is not None, self.own is not None)

    @property
    def withheld(self) -> str | None:
        """Why the new adapter is kept and not put in use; None where it is."""
        if self.judged_by or not self.guarded:
            return None
        return "nothing judged it, and the one in use was judged"

    @property
    def verdict(self) -> str:
        """Why, in words."""
        forgot = None if self.yardstick is None else self.yardstick.forgot
        if forgot:
            return "it forgot: it falls behind on the bundle's reference set"
        if not self.judged_by:
            return "unjudged: nothing was held out, and the bundle has no reference set"
        beside = "" if forgot is None else ", and holds its ground on the reference set"
        if self.improved is False:
            return "not better on what was held out"
        if self.unlearned:
            return "worse than before on the samples that it was trained on"
        if self.outdone:
            return self.unmatched or "no better than the adapter in use, which is another than the start"
        if self.own is not None:
            return f"nothing was held out to judge it by; no worse on what it was trained on{beside}"
        found = (
            "nothing was held out to judge it by" if self.improved is None else "better on what was held out"
        )
        return f"{found}{beside}"

    def facts(self) -> dict[str, Any]:
        """What a result tells of it: name of the metric, scores and losses."""
        (score_before, loss_before), (score_after, loss_after) = (
            pair or (None, None) for pair in (self.before, self.after)
        )
        return {
            "better": self.better,
            "verdict": self.verdict,
            "judged_by": self.judged_by,
            "withheld": self.withheld,
            "metric": self.task.metric.name,
            "score_before": score_before,
            "score_after": score_after,
            "loss_before": loss_before,
            "loss_after": loss_after,
            "losses": self.losses,
            "scores": self.scores,
            "held_out_losses": self.held_out_losses,
            "kept_epoch": self.kept_epoch if self.scores else None,
            "stopped_early": self.stopped_early,
            "reference": None if self.yardstick is None else self.yardstick.facts(),
            "training": None if self.own is None else dict(zip(_FOUR, sum(self.own, ()), strict=True)),
            "in_use": None if self.rival is None else dict(zip(("score", "loss"), self.rival, strict=True)),
        }
