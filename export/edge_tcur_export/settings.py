"""What an export is asked for: targets, and the settings of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edge_tcur.models import Base
from edge_tcur.training.run import Run
from edge_tcur_export.executorch import ALL_BACKENDS, BACKENDS
from edge_tcur_export.trace import EXAMPLE_LENGTH
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.formats.bundle import ADAMW, OPTIMIZERS
from edge_tcur_runtime.formats.weights import FP32, PRECISIONS

TARGETS = ("onnx", "step", "ort-training")
EXECUTORCH = "executorch"
ALL_TARGETS = (*TARGETS, EXECUTORCH)
_LONGEST = 128  # tokens that ExecuTorch's programs reserve memory for unless told otherwise


@dataclass(frozen=True)
class ProgramSettings:
    """What the target ``executorch`` is given.

    Attributes:
        backends: out of `ALL_BACKENDS`.
        max_batch: samples that memory is reserved for; 0: the batch size of the run.
        max_length: tokens that memory is reserved for; 0: the base's, at most 128.
    """

    backends: tuple[str, ...] = BACKENDS
    max_batch: int = 0
    max_length: int = 0

    def limits(self, run: Run, base: Base, *, batch: int) -> dict[str, int]:
        """Largest size of each dynamic axis, none below that of the example that is traced.

        Args:
            batch: of the example.

        Raises:
            UsageError: an unknown backend, or a limit below the example's or above the base's.
        """
        unknown = set(self.backends) - set(ALL_BACKENDS)
        if unknown or not self.backends:
            raise UsageError(
                f"the backends are {', '.join(self.backends)}; expected {', '.join(ALL_BACKENDS)}"
            )
        limits = {"batch": self.max_batch or max(batch, run.config.batch_size)}
        if limits["batch"] < batch:
            raise UsageError(f"--max-batch {self.max_batch}: expected at least {batch}")
        if "max_length" in base.preprocessing:
            longest = int(base.preprocessing["max_length"])
            limits["sequence"] = self.max_length or min(longest, _LONGEST)
            if not min(EXAMPLE_LENGTH, longest) <= limits["sequence"] <= longest:
                raise UsageError(f"--max-length {self.max_length}: expected {EXAMPLE_LENGTH} to {longest}")
        return limits


@dataclass(frozen=True)
class ReferenceSettings:
    """The reference set of a bundle (`edge_tcur_export.reference`).

    Attributes:
        data: file or folder of labelled samples, read as the run's data were; None takes the samples that the
            run held out.
        samples: how many at most.
    """

    data: Path | None = None
    samples: int = 64

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--reference-samples {self.samples}: expected at least 1")


@dataclass(frozen=True)
class ExportSettings:
    """What `export_run` is asked for.

    Attributes:
        targets: out of `ALL_TARGETS`; the inference graph (``onnx``) is always written.
        device: name of a device profile, or the path of one; recorded, and its memory compared.
        verify: compare every graph with torch in a fresh process before the bundle appears.
        programs: of the target ``executorch``.
        optimizer: what ``optimizer.onnx`` of the target ``ort-training`` does, out of `OPTIMIZERS`. Native
            apps use it; our runtime has its own.
        precision: of the base's large weights, out of `PRECISIONS`.
        recompute: write a second step graph that trades time for memory (`recompute`).
        last_blocks: K: write a step graph in which the last K blocks alone learn (`last_blocks`); 0: none.
        reference: samples on which a device's adapter must not fall behind; None: none.
    """

    targets: tuple[str, ...] = TARGETS
    device: str | None = None
    verify: bool = True
    programs: ProgramSettings = field(default_factory=ProgramSettings)
    optimizer: str = ADAMW
    precision: str = FP32
    recompute: bool = False
    last_blocks: int = 0
    reference: ReferenceSettings | None = None

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(ALL_TARGETS)
        if unknown:
            raise UsageError(f"unknown target {unknown.pop()!r}; expected {', '.join(ALL_TARGETS)}")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"unknown optimizer {self.optimizer!r}; expected {', '.join(OPTIMIZERS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"the precision is {self.precision!r}; expected {', '.join(PRECISIONS)}")
        if self.precision != FP32 and EXECUTORCH in self.targets:
            raise UsageError(
                f"ExecuTorch's programs have a float32 base; --precision {self.precision} is for ONNX's",
                hint="export two bundles, one with --target executorch alone",
            )
        if self.last_blocks < 0:
            raise UsageError(f"--last-blocks {self.last_blocks}: expected at least 1")
        for option, value in (("--recompute", self.recompute), ("--last-blocks", self.last_blocks)):
            if value and "step" not in self.targets:
                raise UsageError(f"{option} is for the step graph", hint="add --target step")
