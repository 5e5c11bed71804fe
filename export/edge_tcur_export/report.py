"""What an export wrote, and the stages of its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge_tcur_export.executorch import ProgramReport
from edge_tcur_export.held_out import HeldOut
from edge_tcur_export.quantization import QuantizationReport
from edge_tcur_runtime.formats.bundle import Manifest


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        root: the bundle.
        manifest: its manifest.
        parity: target -> largest relative error against torch per quantity; empty when not verified.
        graph_bytes: graph file -> bytes without the base.
        base_bytes: bytes of ``base.bin``.
        adapter_bytes: bytes of the adapter file.
        seconds: of the whole export; `stages`: of each stage.
        executorch: ExecuTorch's programs; empty where they were not asked for.
        quantization: what the precision of the base changed.
        converted: dtype -> how many tensors of the base were converted from it to float32.
        held_out: what is to be said of the samples that the graphs were compared on.
        not_run: target that could not be compared on this machine -> why.
    """

    root: Path
    manifest: Manifest
    parity: Mapping[str, Mapping[str, float]]
    graph_bytes: Mapping[str, int]
    base_bytes: int
    adapter_bytes: int
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    executorch: ProgramReport = field(default_factory=ProgramReport)
    quantization: QuantizationReport = field(default_factory=QuantizationReport)
    not_run: Mapping[str, str] = field(default_factory=dict)
    converted: Mapping[str, int] = field(default_factory=dict)
    held_out: HeldOut = field(default_factory=HeldOut)

    def to_dict(self) -> dict[str, object]:
        """JSON values; sizes in bytes."""
        return {
            "bundle": str(self.root),
            "base_digest": self.manifest.base_digest,
            "parity": {target: dict(errors) for target, errors in self.parity.items()},
            "graph_bytes": dict(self.graph_bytes),
            "base_bytes": self.base_bytes,
            "adapter_bytes": self.adapter_bytes,
            "files": {name: asdict(entry) for name, entry in self.manifest.files.items()},
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "executorch": asdict(self.executorch),
            "quantization": self.quantization.to_dict(),
            "not_run": dict(self.not_run),
            "converted": dict(self.converted),
            "parity_inputs": self.held_out.inputs if self.parity else None,
            "parity_note": self.held_out.note,
        }


class Stages:
    """Names each stage as it begins, and keeps its seconds."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self._on_stage = on_stage
        self._name: str | None = None
        self._since = self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def begin(self, name: str | None) -> None:
        """Ends the stage that runs and begins the next one; None ends the last."""
        now = time.perf_counter()
        if self._name is not None:
            self.seconds[self._name] = now - self._since
        self._name, self._since = name, now
        if name is not None and self._on_stage is not None:
            self._on_stage(name)
