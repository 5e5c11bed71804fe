"""The trained numbers of an adapter in the coordinates of its frame. Pure but for reading the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, Bundle, Manifest
from edge_tcur_runtime.formats.factors import Factors
from edge_tcur_runtime.formats.weights import read_columns_and_rows
from edge_tcur_runtime.frame import Frame, build_frame


@dataclass(frozen=True)
class Coordinates:
    """Maps an adapter's factors to the arrays that an optimiser moves, and back.

    Attributes:
        start: the adapter that training starts from; its rows and columns stay.
        frames: group -> frame.
        still: graph name -> mask of what keeps the start's bits whatever an optimiser does (weight decay):
            slices of a core, bool [n3], or a whole extra, bool [].
    """

    start: Adapter
    frames: Mapping[str, Frame]
    still: Mapping[str, np.ndarray] = field(default_factory=dict)

    def initial(self) -> dict[str, np.ndarray]:
        """Trained values float64 by graph name: cores in the frame, extras as they are."""
        values = {
            f"{group}.core": self.frames[group].from_raw(factors.core)
            for group, factors in self.start.factors.items()
        }
        return values | {name: value.astype(np.float64) for name, value in self.start.extras.items()}

    def raw(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Graph feeds f32 of trained values: cores in raw coordinates, extras.

        What float32 cannot hold comes out as infinity or NaN, without a warning.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            result = {
                name: (self._frame(name).to_raw(value) if self.is_core(name) else value).astype(np.float32)
                for name, value in values.items()
            }
        for name, still in self.still.items():
            result[name][still] = self._start(name)[still]
        return result

    def pull_back(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Gradients float64 of the trained values from gradients in raw coordinates."""
        return {
            name: self._frame(name).pull_back(value) if self.is_core(name) else value.astype(np.float64)
            for name, value in gradients.items()
        }

    def adapter(self, values: Mapping[str, np.ndarray], provenance: Mapping[str, str]) -> Adapter:
        """The adapter with these trained values."""
        raw = self.raw(values)
        factors = {group: old.with_core(raw[f"{group}.core"]) for group, old in self.start.factors.items()}
        extras = {name: raw[name] for name in self.start.extras}
        return Adapter(replace(self.start.header, provenance=dict(provenance)), factors, extras)

    def is_core(self, name: str) -> bool:
        """Whether a graph name is a core's (and not an extra's)."""
        return name not in self.start.extras

    def _start(self, name: str) -> np.ndarray:
        if not self.is_core(name):
            return self.start.extras[name]
        return self.start.factors[name.removesuffix(".core")].core

    def _frame(self, name: str) -> Frame:
        return self.frames[name.removesuffix(".core")]


def still_parts(manifest: Manifest) -> dict[str, np.ndarray]:
    """`Coordinates.still` of a run that trains the last blocks alone."""
    learning = manifest.last_blocks
    assert learning is not None  # the graph is there, and they come together
    result = {}
    for name, group in manifest.groups.items():
        mask = np.ones(len(group.parameters), bool)
        mask[list(learning.slices[name])] = False
        result[f"{name}.core"] = mask
    return result | {name: np.array(True) for name in manifest.extras if name not in learning.extras}


def read_coordinates(bundle: Bundle, start: Adapter) -> Coordinates:
    """Coordinates in the frame that `start` names, computed from the base's rows and columns."""
    frames, header, path = {}, start.header, bundle.path(BASE_FILE)
    for group, factors in start.factors.items():
        if not isinstance(factors, Factors):  # sketches are unit vectors: nothing to even out
            frames[group] = Frame("identity", factors.blocks, header.alpha)
            continue
        places = [bundle.manifest.tensors[name] for name in bundle.manifest.groups[group].parameters]
        size = len(places) // factors.blocks
        parts = [
            read_columns_and_rows(path, place, factors.rows[slice_ // size], factors.cols[slice_ // size])
            for slice_, place in enumerate(places)
        ]
        columns, rows = (np.stack(part) for part in zip(*parts, strict=True))
        frames[group] = build_frame(
            header.frame,
            columns,
            rows,
            transform=header.transform,
            blocks=factors.blocks,
            alpha=header.alpha,
        )
    return Coordinates(start, frames)
