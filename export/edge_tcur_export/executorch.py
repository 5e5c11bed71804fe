"""ExecuTorch's programs: inference, and the joint forward and backward, over one base file.

The inference program takes every factor as an input, as the ONNX graph does. The training program holds
cores and extras as parameters of its own (`executorch.extension.training` finds them by name, with their
gradients) and takes the frozen factors as inputs. Frozen weights of all programs lie in `base.ptd`, and
the factors of an adapter in a ``.ptd`` of their own (`tensor_file`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edge_tcur.errors import ExportError
from edge_tcur.models import Base
from edge_tcur.tasks import Task
from edge_tcur_export.decompositions import FLAT, flatten_volumes
from edge_tcur_export.lowering import PORTABLE, VULKAN, XNNPACK, Lowering, import_executorch, left_over
from edge_tcur_export.program_divergence import ProgramSource
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import (
    OUTPUTS,
    TARGETS,
    Example,
    FactorModel,
    GroupFactors,
    free_axes,
    trace_backward,
    trace_program,
)
from edge_tcur_runtime.formats.bundle import BASE_PTD, ProgramSpec

BACKENDS = (PORTABLE, XNNPACK)
# Vulkan: inference alone, and only where it is asked for, since no package of Python's can run it.
ALL_BACKENDS = (*BACKENDS, VULKAN)
INFER, TRAIN = "infer", "train"
_BASE = BASE_PTD.removesuffix(".ptd")
_FROZEN = "base."  # of the frozen tensors in either program, before the name in `FactorModel`
_ALIGNMENT = 128  # bytes, of each tensor in a .ptd file
_SMALLEST = 32  # bytes; a smaller tensor is found in any program by chance
_HINT = "pip install 'edge-tcur[executorch]'"


@dataclass(frozen=True)
class ProgramReport:
    """What was written.

    Attributes:
        programs: for the manifest.
        bytes: file name -> size.
        left_over: program -> operator -> how many of them run outside the backend's delegates; of the
            portable programs, which have no delegates, empty.
        packed: program -> bytes of frozen tensors that it holds copies of, beside those in `base.ptd`.
    """

    programs: dict[str, ProgramSpec] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    left_over: dict[str, dict[str, int]] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)


class InferProgram(nn.Module):
    """``forward(inputs, factors, extras) -> outputs``."""

    def __init__(self, base: FactorModel) -> None:
        super().__init__()
        self.base = base

    def forward(
        self, inputs: dict[str, Tensor], factors: dict[str, GroupFactors], extras: dict[str, Tensor]
    ) -> Tensor:
        """See `FactorModel.outputs`."""
        return self.base.outputs(inputs, factors, extras)


class TrainProgram(nn.Module):
    """``forward(inputs, targets, frozen) -> (loss, outputs, metric)``: cores and extras are parameters.

    Args:
        base: the frozen base and its adapted layers.
        values: core or extra by its name in the graphs -> start value f32.
        extras: names of the extras among them.
    """

    def __init__(self, base: FactorModel, values: Mapping[str, np.ndarray], extras: Sequence[str]) -> None:
        super().__init__()
        self.base = base
        self.trained = nn.Module()
        self._extras = tuple(extras)
        for name, value in values.items():
            *path, leaf = name.split(".")
            module = self.trained
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(torch.from_numpy(np.array(value, np.float32))))

    def forward(
        self, inputs: dict[str, Tensor], targets: Tensor, frozen: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FactorModel.forward`."""
        trained = dict(self.trained.named_parameters())
        factors = {group: (trained[f"{group}.core"], *parts) for group, parts in frozen.items()}
        extras = {name: trained[name] for name in self._extras}
        result: tuple[Tensor, Tensor, Tensor] = self.base(inputs, targets, factors, extras)
        return result


def require_executorch(where: str = "--target executorch") -> None:
    """Checks that ExecuTorch is installed; `where` is what needs it.

    Raises:
        ExportError: it is not; says how to get it.
    """
    if importlib.util.find_spec("executorch") is None:
        raise ExportError("ExecuTorch is not installed", where=where, hint=_HINT)


class ProgramWriter:
    """Writes the programs of one bundle, and the base file that they share.

    Args:
        model: the base and its adapted layers.
        example: arguments at the ranks of the run; its sizes lie within the limits.
        values: start values of the training program (`TrainProgram`).
        limits: largest ``batch``, and ``sequence`` where the base has one.
        directory: the bundle being written.
    """

    def __init__(
        self,
        model: FactorModel,
        base: Base,
        task: Task,
        example: Example,
        *,
        values: Mapping[str, np.ndarray],
        limits: Mapping[str, int],
        directory: Path,
    ) -> None:
        self._model, self._base, self._task, self._example = model, base, task, example
        self._values, self._limits, self._directory = values, limits, directory
        self._tensors: dict[str, Tensor] = {}
        self.report = ProgramReport()
        self.sources: dict[str, ProgramSource] = {}  # program -> what it was lowered from

    def write(self, backends: Sequence[str], on_program: Callable[[str], None]) -> ProgramReport:
        """Writes all programs for each of `backends`, then the base file.

        Raises:
            ExportError: ExecuTorch cannot take the model.
        """
        example, named = self._example, self._example.named()
        frozen = [name for name in named if name not in {*example.inputs, TARGETS, *example.trained()}]
        inputs = {
            INFER: tuple(name for name in named if name != TARGETS),
            TRAIN: (*example.inputs, TARGETS, *frozen),
        }
        outputs = {INFER: ("logits",), TRAIN: OUTPUTS}
        makers = {INFER: self._trace_infer, TRAIN: self._trace_train}
        for kind, make in makers.items():
            lowering: Lowering | None = None
            for backend in backends:
                if backend == VULKAN and kind != INFER:
                    continue
                on_program(f"writing ExecuTorch's programs ({kind}, {backend})")
                name = f"{kind}-{backend}"
                lowering = lowering or Lowering(make())
                file, memory = self._write(lowering, name, backend)
                self.report.programs[name] = ProgramSpec(
                    file, inputs[kind], outputs[kind], dict(self._limits), memory
                )
                self.sources[name] = ProgramSource(lowering.program, inputs[kind], outputs[kind], backend)
        content = tensor_file({name: value.numpy() for name, value in sorted(self._tensors.items())})
        (self._directory / BASE_PTD).write_bytes(content)
        self.report.bytes[BASE_PTD] = len(content)
        return self.report

    def _shapes(self) -> tuple[dict[str, Any], dict[int, Any]]:
        """Dynamic shapes of the model's inputs and of the targets."""
        dynamic = free_axes(self._base, self._limits)
        inputs = {name: dynamic(spec.shape) for name, spec in self._base.inputs.items()}
        return inputs, dynamic(self._task.target_axes(self._base.inputs, self._base.labels))

    def _trace_infer(self) -> ExportedProgram:
        example, (inputs, _) = self._example, self._shapes()
        shapes: tuple[Any, ...] = (
            inputs,
            {group: ({}, {}, {}) for group in example.factors},
            {n: {} for n in example.extras},
        )
        with torch.no_grad():
            arguments = (example.inputs, example.factors, example.extras)
            return flatten_volumes(trace_program(InferProgram(self._model), arguments, shapes))

    def _trace_train(self) -> ExportedProgram:
        example, (inputs, targets) = self._example, self._shapes()
        program = TrainProgram(self._model, self._values, tuple(example.extras))
        frozen = {group: parts[1:] for group, parts in example.factors.items()}
        shapes: tuple[Any, ...] = (inputs, targets, {group: ({}, {}) for group in frozen})
        forward = trace_program(program, (example.inputs, example.targets, frozen), shapes)
        return trace_backward(forward, FLAT)

    def _write(self, lowering: Lowering, name: str, backend: str) -> tuple[str, int]:
        """Writes one program; its file's name and the bytes that it reserves."""
        exir = import_executorch()
        with quiet_torch():
            try:
                edge = lowering.lower(backend)
                if backend != PORTABLE:
                    self.report.left_over[name] = left_over(edge.exported_program())
                frozen = self._frozen(edge.exported_program())
                config = exir.ExecutorchBackendConfig(external_constants=lambda node: frozen.get(node.name))
                program = edge.to_executorch(config=config)
            except Exception as error:
                reason = _reason(error)
                raise ExportError(
                    f"ExecuTorch cannot take the {name} program: {reason}",
                    hint="export for ONNX alone (--target onnx --target step); --debug shows all of it",
                ) from error
        file = f"{name.removesuffix('-portable')}.pte"
        (self._directory / file).write_bytes(program.buffer)
        self.report.bytes[file] = len(program.buffer)
        if backend == VULKAN:
            self.report.packed[name] = self._packed(program.buffer)
        plan = program.executorch_program.execution_plan[0]
        return file, sum(plan.non_const_buffer_sizes)

    def _packed(self, program: bytes) -> int:
        """Bytes of the frozen tensors that a program holds copies of, as they are or transposed."""
        found = 0
        for value in {value.data_ptr(): value for value in self._model.buffers()}.values():
            forms = (value, value.T.contiguous()) if value.ndim == 2 else (value,)
            if value.nbytes > _SMALLEST and any(form.numpy().tobytes() in program for form in forms):
                found += value.nbytes
        return found

    def _frozen(self, program: ExportedProgram) -> dict[str, str]:
        """Placeholders of frozen tensors -> the file that they go into; keeps the tensors for it.

        The scalars of a graph are tensors too, under names that count them: two programs may have other
        values under one name, so they stay in the programs.
        """
        found = {}
        for placeholder, target in program.graph_signature.inputs_to_buffers.items():
            if not target.startswith(_FROZEN):
                continue
            value = program.state_dict.get(target, program.constants.get(target))
            assert isinstance(value, Tensor)
            self._tensors[target] = value
            found[placeholder] = _BASE
        return found


def _reason(error: Exception) -> str:
    """The last line of the first failure: ExecuTorch's messages may hold whole graphs."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return f"{lines[-1]:.300}"


def tensor_file(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a ``.ptd`` file: ExecuTorch's FlatTensor format, for `base.ptd` and for factors.

    Args:
        tensors: by name: float32, int32, int64, int8, uint8 or bool, in C order.
    """
    import_executorch()
    with quiet_torch():
        from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
        from executorch.exir.schema import ScalarType
        from executorch.exir.tensor_layout import TensorLayout
        from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

        kinds = {
            "float32": ScalarType.FLOAT, "int32": ScalarType.INT, "int64": ScalarType.LONG,
            "int8": ScalarType.CHAR, "uint8": ScalarType.BYTE, "bool": ScalarType.BOOL,
        }  # fmt: skip
        buffers: dict[bytes, int] = {}  # one tensor may be held in several shapes
        entries = {}
        for name, value in tensors.items():
            layout = TensorLayout(kinds[value.dtype.name], list(value.shape), list(range(value.ndim)))
            place = buffers.setdefault(np.ascontiguousarray(value).tobytes(), len(buffers))
            entries[name] = DataEntry(place, _ALIGNMENT, layout)
        return bytes(FlatTensorSerializer().serialize(DataPayload(list(buffers), entries)))
