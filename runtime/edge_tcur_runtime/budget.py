"""The memory budget: what this process uses, and the guard that keeps it under its limit.

The measure is the peak resident memory of the whole process, VmHWM of ``/proc/self/status``
(``ru_maxrss`` is inherited over fork and exec and would count the parent).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_tcur_runtime.errors import BudgetError
from edge_tcur_runtime.units import format_size

_STATUS = Path("/proc/self/status")
_KEYS = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_backed"}


@dataclass(frozen=True)
class Memory:
    """Memory of this process in bytes.

    Attributes:
        peak: highest resident memory so far.
        resident: resident memory now.
        anonymous: the part of `resident` that only this process holds.
        file_backed: the part that the kernel can drop and read again (mapped weights, libraries).
    """

    peak: int = 0
    resident: int = 0
    anonymous: int = 0
    file_backed: int = 0


def read_memory(status: Path = _STATUS) -> Memory:
    """Memory of this process; zeros where the system does not say (no ``/proc``)."""
    try:
        lines = status.read_text("ascii", errors="replace").splitlines()
    except OSError:
        return Memory()
    fields = ((key, rest.split()) for key, _, rest in (line.partition(":") for line in lines))
    return Memory(
        **{
            _KEYS[key]: int(words[0]) * 1024
            for key, words in fields
            if key in _KEYS and words and words[0].isdecimal()
        }
    )


@dataclass(frozen=True)
class Budget:
    """A limit on the peak resident memory of this process.

    Attributes:
        limit: bytes, or None for no limit.
    """

    limit: int | None = None

    def require(self, needed: int, what: str, spare: int = 0) -> None:
        """Refuses before the work starts.

        Args:
            needed: bytes.
            what: needs them.
            spare: bytes more in the budget that is named, where `needed` differs from process to process.

        Raises:
            BudgetError: `needed` bytes are above the limit; the smallest budget is named.
        """
        if self.limit is not None and needed > self.limit:
            raise BudgetError(
                f"the budget of {format_size(self.limit)} cannot be met: {what} needs about "
                f"{format_size(needed)}",
                hint=f"give at least --budget {-(-(needed + spare) // 2**20)}MiB",
            )

    def check(self, what: str) -> Memory:
        """Compares the peak so far with the limit.

        Raises:
            BudgetError: the limit was crossed, or this system does not tell how much memory is used.
        """
        memory = read_memory()
        if self.limit is not None and memory.peak == 0:
            raise BudgetError(
                "the budget cannot be kept: the memory of this process cannot be measured on this system",
                hint=f"leave --budget out; it needs VmHWM in {_STATUS}",
            )
        if self.limit is not None and memory.peak > self.limit:
            raise BudgetError(
                f"the budget of {format_size(self.limit)} was exceeded {what}: the peak is "
                f"{format_size(memory.peak)}; the run stopped and nothing was installed",
                hint=f"give at least --budget {-(-memory.peak * 11 // 10 // 2**20)}MiB",
            )
        return memory


def choose_micro_batch(batch_size: int, limit: int | None, peak_one: int, peak_two: int) -> int:
    """The largest micro-batch that fits, from the peaks after a step with one and with two samples.

    Memory grows linearly with the samples; a tenth of the growth is kept free.

    Args:
        batch_size: samples per optimiser step, the upper bound.
        limit: bytes, or None for no limit.
        peak_one, peak_two: peak resident bytes after steps of one and two samples.

    Returns:
        `batch_size` halved until it fits, at least 1.
    """
    micro = batch_size
    growth = max(0, peak_two - peak_one)
    while micro > 1 and limit is not None and peak_two + 1.1 * growth * (micro - 2) > limit:
        micro = -(-micro // 2)
    return micro
