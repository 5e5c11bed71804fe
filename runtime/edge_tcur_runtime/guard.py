"""The guard between passes: a pass that would cross the limit is made smaller before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edge_tcur_runtime.budget import Memory
from edge_tcur_runtime.planner import Footprint
from edge_tcur_runtime.units import format_size

_SLACK = 2**20  # bytes that two readings of the same state may differ by


@dataclass
class Guard:
    """Knows what passes take and how much is left.

    Attributes:
        limit: bytes, the peak resident memory of this process.
        footprint: of the graph that runs; its factor is raised where a pass took more.
        notes: what was done, for people.
    """

    limit: int
    footprint: Footprint
    notes: list[str] = field(default_factory=list)
    _proven: int = 0  # the highest prediction of a pass that stayed below the limit

    def allow(self, samples: int, length: int, memory: Memory) -> int:
        """How many of `samples` may go into the next pass; at least 1.

        Args:
            memory: of this process now.
        """
        room = max(self.limit, self._proven) - memory.resident
        if self.footprint.growth(samples, length) <= room:
            return samples
        fewer = max(1, self.footprint.largest(samples, length, room))
        if fewer < samples:
            tokens = f" of {length} tokens" if length else ""
            self.notes.append(
                f"memory came near the budget ({format_size(memory.resident)} held): passes{tokens} have at "
                f"most {fewer} samples from here on, not {samples}"
            )
        return fewer

    def saw(self, samples: int, length: int, before: Memory, after: Memory) -> None:
        """Learns from a pass: what it took, where it set a new peak, and that it stayed below the limit."""
        if after.peak > self.limit:
            return
        predicted = before.resident + self.footprint.growth(samples, length)
        self._proven = max(self._proven, predicted - _SLACK)
        if after.peak > before.peak:
            factor = taken(before, after) / max(1, self.footprint.values(samples, length))
            if factor > self.footprint.factor:
                self.footprint = replace(self.footprint, factor=factor)


def taken(before: Memory, after: Memory) -> int:
    """Bytes that a pass took to its peak, less those of the base that it was the first to read."""
    return after.peak - before.resident - max(0, after.file_backed - before.file_backed)
