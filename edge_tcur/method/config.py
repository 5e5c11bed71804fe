"""What is adapted and how: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from edge_tcur.method.selection import SELECTIONS
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.adapter import FRAMES
from edge_tcur_runtime.formats.schema import nearest

GROUPINGS = ("projection", "shape")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class TCurConfig:
    """Settings of a tCURLoRA adapter.

    Attributes:
        rank: r, rows and columns per group; the core holds n3 * r * r numbers.
        grouping: ``projection`` (one tensor per projection, stacked over the layers) or ``shape``
            (the paper's: every weight of one shape in one tensor).
        selection: rule that picks rows and columns, see `edge_tcur.method.selection`.
        frame: coordinates of training, ``orthonormal`` or ``raw`` (`edge_tcur_runtime.frame`).
        targets: ``all-linear`` or comma-separated name patterns (``*`` and ``?``) of linear modules.
    """

    rank: int = 8
    grouping: str = "projection"
    selection: str = "norm"
    frame: str = "orthonormal"
    targets: str = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank is {self.rank}; expected at least 1", where="rank")
        for field, value, known in (
            ("grouping", self.grouping, GROUPINGS),
            ("selection", self.selection, tuple(SELECTIONS)),
            ("frame", self.frame, FRAMES),
        ):
            if value not in known:
                guess = nearest(value, known)
                raise ConfigError(
                    f"{value!r} is not known; expected one of {', '.join(known)}",
                    where=field,
                    hint=f"did you mean {guess!r}?" if guess else None,
                )
