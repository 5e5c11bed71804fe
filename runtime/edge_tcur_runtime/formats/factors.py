"""The factors of a group: a trained core between frozen rows and columns, or frozen sketches.

The pure part of the adapter format: what the tensors of one group are, and which values are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_tcur_runtime.errors import BadInputError, FileFormatError
from edge_tcur_runtime.formats.ternary import is_valid, pack, packed_size, unit_vectors, unpack

COUPLINGS = ("none", "layer", "all")
SKETCH = "sketch"
FRAMES = ("raw", "orthonormal", SKETCH)
INDEX_PARTS = ("rows", "cols")
SKETCH_PARTS = ("left", "right")
FACTOR_PARTS = ("core", *INDEX_PARTS, *SKETCH_PARTS)
_PIECE = 2**16  # numbers that are checked at a time


@dataclass(frozen=True)
class GroupSpec:
    """The weights that share one core.

    Attributes:
        parameters: names of the base's weights in slice order, n3 of them.
        n1: rows (output features) of each weight.
        n2: columns (input features) of each weight.
    """

    parameters: tuple[str, ...]
    n1: int
    n2: int


@dataclass(frozen=True)
class Factors:
    """The factors of one group.

    Attributes:
        core: f32 [n3, r, r], the trained numbers.
        rows: i32 [b, r], in each block strictly increasing row indices below n1.
        cols: i32 [b, r], the same of columns, below n2.
    """

    core: np.ndarray
    rows: np.ndarray
    cols: np.ndarray

    @property
    def rank(self) -> int:
        """r, the number of rows and columns."""
        return int(self.core.shape[-1])

    @property
    def blocks(self) -> int:
        """b, the number of blocks of slices that share rows and columns."""
        return len(self.rows)

    def stored(self) -> dict[str, np.ndarray]:
        """The tensors of the adapter file."""
        return {"core": self.core, "rows": self.rows, "cols": self.cols}

    def feeds(self) -> dict[str, np.ndarray]:
        """The inputs of the graphs."""
        return self.stored()

    def with_core(self, core: np.ndarray) -> Factors:
        """The same frozen factors around another core f32 [n3, r, r]."""
        return replace(self, core=core)


@dataclass(frozen=True)
class SketchFactors:
    """The factors of one group in the ``sketch`` frame: ternary vectors, used at unit length.

    They stay packed as in the file (`edge_tcur_runtime.formats.ternary`) until they are used: as int8 they
    would take four times the file, and reading one is bounded.

    Attributes:
        core: f32 [n3, r, r], the trained numbers.
        packed_left: uint8 [n3, packed_size(n1 r)], the entries of `left`.
        packed_right: uint8 [n3, packed_size(r n2)], the entries of `right`.
        n1, n2: rows and columns of each weight.
    """

    core: np.ndarray
    packed_left: np.ndarray
    packed_right: np.ndarray
    n1: int
    n2: int

    @classmethod
    def pack(cls, core: np.ndarray, left: np.ndarray, right: np.ndarray) -> SketchFactors:
        """Factors of vectors left int8 [n3, n1, r] and right int8 [n3, r, n2], entries -1, 0, 1.

        Raises:
            FileFormatError: other shapes or dtypes. BadInputError: other entries.
        """
        shapes, dtypes = (left.shape, right.shape), (left.dtype, right.dtype)
        if not core.ndim == left.ndim == right.ndim == 3 or (
            shapes != ((len(core), left.shape[1], core.shape[2]), (*core.shape[:2], right.shape[2]))
        ):
            raise FileFormatError(f"the sketches have the shapes {shapes}; the core has {core.shape}")
        if set(dtypes) != {np.dtype(np.int8)}:
            raise FileFormatError(f"the sketches have dtypes {dtypes[0]} and {dtypes[1]}; expected int8")
        if any(part.size and (part.min() < -1 or part.max() > 1) for part in (left, right)):
            raise BadInputError("the sketches hold something else than -1, 0 and 1")
        packed_left, packed_right = (pack(value.reshape(len(value), -1)) for value in (left, right))
        return cls(core, packed_left, packed_right, left.shape[1], right.shape[2])

    @property
    def rank(self) -> int:
        """r, the number of vectors on each side."""
        return int(self.core.shape[-1])

    @property
    def blocks(self) -> int:
        """b: every slice has vectors of its own."""
        return len(self.core)

    @property
    def left(self) -> np.ndarray:
        """int8 [n3, n1, r], entries -1, 0, 1; unpacked anew each time."""
        return unpack(self.packed_left, self.n1 * self.rank).reshape(-1, self.n1, self.rank)

    @property
    def right(self) -> np.ndarray:
        """int8 [n3, r, n2], entries -1, 0, 1; unpacked anew each time."""
        return unpack(self.packed_right, self.rank * self.n2).reshape(-1, self.rank, self.n2)

    def stored(self) -> dict[str, np.ndarray]:
        """The tensors of the adapter file."""
        return {"core": self.core, "left": self.packed_left, "right": self.packed_right}

    def feeds(self) -> dict[str, np.ndarray]:
        """The inputs of the graphs: core, and f32 unit vectors left [n3, n1, r] and right [n3, r, n2]."""
        left, right = self.vectors()
        return {"core": self.core, "left": left, "right": right}

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors left f32 [n3, n1, r] and right f32 [n3, r, n2]."""
        return unit_vectors(self.left, axis=1), unit_vectors(self.right, axis=2)

    def with_core(self, core: np.ndarray) -> SketchFactors:
        """The same frozen factors around another core f32 [n3, r, r]."""
        return replace(self, core=core)


AnyFactors = Factors | SketchFactors  # a group has either


def factor_parts(frame: str) -> tuple[str, ...]:
    """Names of a group's factors in the file and in the graphs: the core and the frozen ones."""
    return ("core", *(SKETCH_PARTS if frame == SKETCH else INDEX_PARTS))


def read_factors(parts: Mapping[str, np.ndarray], spec: GroupSpec, where: str) -> AnyFactors:
    """Verified factors from the tensors of one group.

    Args:
        parts: the tensors by part name (`factor_parts`).
        spec: the group's weights.
        where: file and group, for messages.

    Raises:
        FileFormatError: a dtype or shape that the format does not have.
        BadInputError: values out of range.
    """
    factors: AnyFactors
    if set(parts) == {"core", *INDEX_PARTS}:
        factors = Factors(parts["core"], parts["rows"], parts["cols"])
    else:
        factors = SketchFactors(parts["core"], parts["left"], parts["right"], spec.n1, spec.n2)
    check_factors(factors, spec, where)
    return factors


def check_factors(factors: AnyFactors, spec: GroupSpec, where: str) -> None:
    """Refuses factors that the format does not allow; see `read_factors`."""
    rank = _check_core(factors.core, spec, where)
    if isinstance(factors, SketchFactors):
        _check_sketches(factors, spec, rank, where)
    else:
        _check_indices(factors, spec, rank, where)


def _check_sketches(factors: SketchFactors, spec: GroupSpec, rank: int, where: str) -> None:
    if (factors.n1, factors.n2) != (spec.n1, spec.n2):
        raise FileFormatError(
            f"the sketches are of weights [{factors.n1}, {factors.n2}], not [{spec.n1}, {spec.n2}]",
            where=where,
        )
    sides = (("left", factors.packed_left, spec.n1 * rank), ("right", factors.packed_right, rank * spec.n2))
    for name, packed, count in sides:
        expected = (len(spec.parameters), packed_size(count))
        if packed.shape != expected or packed.dtype != np.uint8:
            raise FileFormatError(
                f"{name} has shape {packed.shape} and dtype {packed.dtype}; expected uint8 {list(expected)}",
                where=where,
            )
        if not is_valid(packed, count):
            raise BadInputError(f"{name} holds something else than -1, 0 and 1", where=where)


def _check_indices(factors: Factors, spec: GroupSpec, rank: int, where: str) -> None:
    blocks = len(factors.rows) if factors.rows.ndim == 2 else 0
    if not blocks or len(factors.core) % blocks:
        raise FileFormatError(
            f"rows have shape {factors.rows.shape}; expected [b, {rank}] with b dividing {len(factors.core)}",
            where=where,
        )
    for name, indices, size in (("rows", factors.rows, spec.n1), ("cols", factors.cols, spec.n2)):
        if indices.shape != (blocks, rank) or indices.dtype != np.int32:
            raise FileFormatError(
                f"{name} have shape {indices.shape} and dtype {indices.dtype}; "
                f"expected int32 [{blocks}, {rank}]",
                where=where,
            )
        # Compared, not subtracted: the difference of two int32 may wrap around and look like an increase.
        rising = indices[:, 1:] > indices[:, :-1]
        if (indices[:, 0] < 0).any() or (indices[:, -1] >= size).any() or not rising.all():
            raise BadInputError(
                f"{name} must be strictly increasing indices from 0 to {size - 1}", where=where
            )


def all_finite(value: np.ndarray) -> bool:
    """Whether a float array holds no NaN and no infinity; takes little memory, however large it is."""
    flat = value.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + _PIECE]).all()) for start in range(0, flat.size, _PIECE))


def _check_core(core: np.ndarray, spec: GroupSpec, where: str) -> int:
    n3, rank = len(spec.parameters), int(core.shape[-1]) if core.ndim == 3 else 0
    if rank < 1 or core.shape != (n3, rank, rank) or core.dtype != np.float32:
        raise FileFormatError(
            f"the core has shape {core.shape} and dtype {core.dtype}; "
            f"expected float32 [{n3}, r, r] with r of at least 1",
            where=where,
        )
    if not all_finite(core):
        raise BadInputError("the core holds NaN or infinity", where=where)
    return rank
