"""Failures of torch.export in the user's terms: reason, module, file and line, and the fix that fits."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

import edge_tcur
from edge_tcur.errors import ExportError
from edge_tcur_export.quiet import quiet_torch

EAGER = "write attention out: load the model with attn_implementation='eager'"
_BACKWARD = (
    "an operator has no backward, or one that cannot be decomposed; replace it, "
    "or export for inference alone with --target onnx"
)
_OWN_PREFIX = re.compile(r"^(base\.)?(model\.|model$)")  # what our wrappers put before the base's names
_FILE = re.compile(r'File "([^"]+)", line (\d+)')
_FIXED = re.compile(r"Constraints violated \((\w+)")
_HINTS = (
    (
        re.compile(r"data-dependent|GuardOnDataDependent|control flow", re.IGNORECASE),
        "control flow that depends on tensor values cannot be traced: choose with torch.where instead of if, "
        "and keep shapes free of values (no .item(), no boolean indexing)",
    ),
    (re.compile(r"flash|scaled_dot_product|attention", re.IGNORECASE), EAGER),
    (
        re.compile(r"\.numpy\(\)|FakeTensor|tolist"),
        "stay in torch: values of a tensor are not there while the model is traced",
    ),
)


_DETACHING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


@dataclass(frozen=True)
class Place:
    """Where in the model something happened.

    Attributes:
        line: ``file:line`` of the model's code, or None.
        module: name and class of the module whose forward ran, or None.
    """

    line: str | None = None
    module: str | None = None


def explained(action: Callable[[], ExportedProgram], model: nn.Module) -> ExportedProgram:
    """Traces the forward pass of `model` by `action`, quietly.

    Raises:
        ExportError: it failed; names the reason, the module, and the file and line of the model.
    """
    fixed: list[Place] = []
    names = {id(module): _describe(name, module) for name, module in model.named_modules()}
    try:
        with quiet_torch(), _noting_fixed_sizes(fixed, names):
            return action()
    except Exception as error:
        summary = _summary(error)
        axis = _FIXED.search(str(error))
        place = _innermost(_frames(error), names)
        hint = next((hint for pattern, hint in _HINTS if pattern.search(summary)), None)
        if axis is not None:
            summary, hint = f"the size of {axis[1]} became fixed", _fixed_hint(axis[1])
            place = fixed[-1] if fixed else place
        raise ExportError(
            f"torch.export cannot trace the model: {summary}{_of(place)}",
            where=place.line,
            hint=hint or "use operations of torch that can be traced; --debug shows torch's own report",
        ) from error


def _fixed_hint(axis: str) -> str:
    return (
        f"keep {axis} free: write -1 or x.shape[...] for it, without int(), in reshape, view and expand, "
        "and make tensors of its size in forward"
    )


def explained_backward(action: Callable[[], ExportedProgram], program: ExportedProgram) -> ExportedProgram:
    """Traces the backward pass of a forward program by `action`, quietly.

    Raises:
        ExportError: it failed; names the reason; where the gradient ends, operator and module.
    """
    try:
        with quiet_torch():
            return action()
    except Exception as error:
        end = _end_of_gradient(program)
        reason, place = (
            (_summary(error), Place()) if end is None else (f"{end.target} has no derivative", _at(end))
        )
        raise ExportError(
            f"torch.export cannot trace the backward pass of the model: {reason}{_of(place)}",
            where=place.line,
            hint=_BACKWARD,
        ) from error


def _describe(name: str, module: nn.Module) -> str | None:
    """How a module is called in a message; None for the wrappers around the base."""
    own = _OWN_PREFIX.sub("", name) if _OWN_PREFIX.match(name) else ""
    return f"{own} ({type(module).__name__})" if own else None


def _of(place: Place) -> str:
    return f", in the module {place.module}" if place.module else ""


@contextmanager
def _noting_fixed_sizes(places: list[Place], names: dict[int, str | None]) -> Iterator[None]:
    """Notes where an equation gives a dynamic size one value: torch names the axis alone when it refuses."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    original = ShapeEnv._log_guard

    def noted(self: Any, prefix: str, guard: Any, forcing_spec: bool) -> None:
        if getattr(guard, "is_Equality", False) and len(guard.free_symbols) == 1:
            place = _innermost(_callers(sys._getframe(1)), names)
            if place.line is not None:
                places.append(place)
        original(self, prefix, guard, forcing_spec)

    ShapeEnv._log_guard = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShapeEnv._log_guard = original  # type: ignore[method-assign]


def _frames(error: Exception) -> list[tuple[FrameType, int]]:
    """Frames and lines from the outermost to where the error was raised."""
    result, trace = [], error.__traceback__
    while trace is not None:
        result.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return result


def _callers(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """The same of a call that runs."""
    result = []
    while frame is not None:
        result.append((frame, frame.f_lineno))
        frame = frame.f_back
    return result[::-1]


def _innermost(frames: list[tuple[FrameType, int]], names: dict[int, str | None]) -> Place:
    """The last frame that is neither torch's, nor ours, nor Python's own, and the last module that ran."""
    line = module = None
    for frame, number in frames:
        path = Path(frame.f_code.co_filename)
        if path.is_file() and not _is_machinery(path):
            line = f"{path}:{number}"
        module = names.get(id(frame.f_locals.get("self"))) or module
    return Place(line, module)


def _is_machinery(path: Path) -> bool:
    own = (Path(torch.__file__).parent, Path(edge_tcur.__file__).parent, Path(__file__).parent)
    python = Path(sysconfig.get_path("stdlib"))
    third = ("sympy", "site-packages")
    return any(path.is_relative_to(root) for root in own) or (
        path.is_relative_to(python)
        and (third[1] not in path.relative_to(python).parts or third[0] in path.relative_to(python).parts)
    )


def _summary(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _end_of_gradient(program: ExportedProgram) -> fx.Node | None:
    """The first operator that turns a value with a gradient into a floating-point one without."""
    if program.example_inputs is None:
        return None
    arguments, options = program.example_inputs
    watch = _Watch(program.module())
    try:
        watch.run(*arguments, **options)
    except (RuntimeError, TypeError, ValueError):  # the failure that is being explained matters more
        return watch.end
    return watch.end


class _Watch(fx.Interpreter):
    """Runs a program, and keeps the node where the gradient ends."""

    end: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        value = super().run_node(n)
        stopped = isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad
        if self.end is None and n.op == "call_function" and stopped and n.target not in _DETACHING:
            before = [self.env.get(item) for item in n.all_input_nodes]
            if any(isinstance(item, torch.Tensor) and item.requires_grad for item in before):
                self.end = n
        return value


def _at(node: fx.Node) -> Place:
    """Where in the model a node of a traced program came from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = None
    if stack:
        path, kind = stack[-1]
        own = _OWN_PREFIX.sub("", path)
        module = f"{own} ({kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__})"
    lines = [(Path(path), number) for path, number in _FILE.findall(node.meta.get("stack_trace") or "")]
    own_lines = [f"{path}:{number}" for path, number in lines if path.is_file() and not _is_machinery(path)]
    return Place(own_lines[-1] if own_lines else None, module)
