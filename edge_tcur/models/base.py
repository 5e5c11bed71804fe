"""A base model with all that training and export need to know of it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur.errors import BaseModelError
from edge_tcur.method.targets import saved_parameters
from edge_tcur.method.views import foreign_kind
from edge_tcur.tasks import Task
from edge_tcur_runtime.errors import BadInputError, EdgeError
from edge_tcur_runtime.formats.bundle import InputSpec
from edge_tcur_runtime.formats.digest import digest_state
from edge_tcur_runtime.preprocess import build_preprocessor, image_size


@dataclass
class Base:
    """A loaded base.

    Attributes:
        model: module whose ``forward(**inputs)`` returns the outputs as one tensor.
        reference: what it was loaded from; loads the same base again.
        inputs: input name -> dtype and shape with named dynamic axes, in order.
        preprocessing: the manifest's ``preprocessing`` object for these inputs.
        head: names of new modules that are trained in all rows; empty where the base brings its own head.
        tokenizer: content of ``tokenizer.json``, or None.
        labels: class names in the order of the outputs.
        note: something that the user should know about how it was loaded, or empty.
        digest: canonical digest of the base's tensors, the head left out.
    """

    model: nn.Module
    reference: str
    inputs: dict[str, InputSpec]
    preprocessing: dict[str, Any]
    head: tuple[str, ...] = ()
    tokenizer: str | None = None
    labels: tuple[str, ...] = ()
    note: str = ""
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.digest = base_digest(self.model, self.head)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the new head by name."""
        return {name: value for name, value in self.model.named_parameters() if _below(name, self.head)}

    def extra_parameters(self, modules_to_save: Collection[str]) -> dict[str, nn.Parameter]:
        """What an adapter carries besides its cores: the new head, and modules trained in full.

        Args:
            modules_to_save: names (`TCurConfig.modules_to_save`).
        """
        return saved_parameters(self.model, modules_to_save) | self.head_parameters()


def _below(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    value = tensor.detach().cpu().contiguous()
    if value.dtype is torch.bfloat16:  # numpy has no bfloat16: its bits, as uint16
        value = value.view(torch.uint16)
    return value.numpy()


def base_digest(model: nn.Module, head: tuple[str, ...] = ()) -> str:
    """``sha256:<hex>`` over the model's parameters and persistent buffers, modules in `head` left out.

    Raises:
        BadInputError: one of them is no plain tensor; its bytes have no order that a digest could go by.
    """
    state = {name: value for name, value in model.state_dict().items() if not _below(name, head)}
    for name, value in state.items():
        if (kind := foreign_kind(value)) is not None:
            raise BadInputError(
                f"it is a {kind}, not a plain tensor",
                where=name,
                hint="take the model before it was quantised; edge_tcur.method.quantized.quantize_linears "
                "makes an int8 base that can be adapted",
            )
    return digest_state({name: _to_numpy(value) for name, value in state.items()})


def load_base(reference: str, task: Task, labels: tuple[str, ...], options: dict[str, Any]) -> Base:
    """Loads a base.

    Args:
        reference: a Hugging Face directory or hub id, or ``package.module:function``.
        task: decides which kind of model is loaded.
        labels: class names; the model answers with one output for each, in this order unless
            the base brings a head that names the same classes in another (see `Base.labels`).
        options: ``max_length`` for text; for functions also ``preprocessing``.

    Raises:
        BaseModelError: it cannot be loaded, or does not fit the task.
        NetworkError: a hub id, and the hub cannot be reached.
    """
    # torch's fused transformer layer reads its linear weights itself and would pass updates by.
    torch.backends.mha.set_fastpath_enabled(False)
    if ":" in reference and not Path(reference).exists():
        return _load_function(reference, task, labels, options)
    from edge_tcur.models.huggingface import load_huggingface

    return load_huggingface(reference, task, labels, options)


class LogitsOnly(nn.Module):
    """A module's outputs as one tensor: itself, its ``logits`` attribute or its first element."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Tensor:
        """Outputs of the wrapped module, for example [batch, classes]."""
        output = self.module(**inputs)
        if isinstance(output, Tensor):
            return output
        logits = getattr(output, "logits", None)
        return logits if isinstance(logits, Tensor) else output[0]


def _load_function(reference: str, task: Task, labels: tuple[str, ...], options: dict[str, Any]) -> Base:
    if task.kind != "image":
        raise BaseModelError(
            f"a function gives a picture model; the task takes {task.kind}",
            where=reference,
            hint="use a task for pictures, such as --task image-classification, or a Hugging Face directory",
        )
    model = _call_function(reference)
    preprocessing = getattr(model, "preprocessing", None) or options.get("preprocessing")
    if not isinstance(preprocessing, dict) or preprocessing.get("kind") != "image":
        raise BaseModelError(
            "the module says nothing of its inputs",
            where=reference,
            hint="set module.preprocessing = {'kind': 'image', 'input': 'pixel_values', 'height': ..., "
            "'width': ..., 'channels': ..., 'scale': ..., 'mean': [...], 'std': [...]}; of volumes "
            "'depth' too",
        )
    inputs = image_inputs(preprocessing, reference)
    wrapped = LogitsOnly(model)
    check_outputs(wrapped, inputs, task, labels, reference)
    return Base(wrapped, reference, inputs, preprocessing, labels=labels)


def _call_function(reference: str) -> nn.Module:
    """The module that ``package.module:function`` returns."""
    module_name, _, function_name = reference.partition(":")
    hint = "write package.module:function, importable from the current directory or installed"
    with _current_directory_on_path():
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except Exception as error:
            raise BaseModelError(
                f"cannot import the function: {error}", where=reference, hint=hint
            ) from error
        try:
            model = function()
        except Exception as error:
            raise BaseModelError(
                f"the function failed: {type(error).__name__}: {error}", where=reference
            ) from error
    if not isinstance(model, nn.Module):
        raise BaseModelError(
            f"the function returned {type(model).__name__}; expected a torch.nn.Module", where=reference
        )
    return model


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """An installed command, unlike ``python -m``, does not look for modules where it is called."""
    here = os.getcwd()
    missing = here not in sys.path and "" not in sys.path
    if missing:
        sys.path.append(here)
    try:
        yield
    finally:
        if missing:
            sys.path.remove(here)


def image_inputs(preprocessing: dict[str, Any], reference: str) -> dict[str, InputSpec]:
    """The one input of a picture model, float32 [batch, channels, height, width], of volumes [batch,
    channels, depth, height, width].

    Raises:
        BaseModelError: the preprocessing lacks a field, or has one that is not valid.
    """
    try:
        build_preprocessor(preprocessing, Path())
    except EdgeError as error:
        raise BaseModelError(
            f"its preprocessing is not valid: {error.message}", where=reference, hint=error.hint
        ) from error
    shape = ("batch", preprocessing["channels"], *image_size(preprocessing))
    return {preprocessing["input"]: InputSpec("float32", shape)}


def example_inputs(inputs: dict[str, InputSpec], sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the given sizes of the dynamic axes; integers are 0 or 1 (valid everywhere)."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, spec in inputs.items():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        if spec.dtype == "float32":
            result[name] = torch.randn(shape, generator=generator)
        else:
            result[name] = torch.ones(shape, dtype=torch.int64)
    return result


def check_outputs(
    model: nn.Module,
    inputs: dict[str, InputSpec],
    task: Task,
    labels: tuple[str, ...],
    reference: str,
    *,
    sequence: int = 8,
) -> None:
    """Runs the model once, on two samples (of text: of `sequence` tokens), and compares the shape of its
    outputs with what the task says of these labels.

    Raises:
        BaseModelError: it fails on its inputs, or answers in another shape.
    """
    model.eval()
    sizes = {"batch": 2, "sequence": sequence}
    try:
        with torch.no_grad():
            output = model(**example_inputs(inputs, sizes))
    except Exception as error:
        shapes = {name: ["batch", *spec.shape[1:]] for name, spec in inputs.items()}
        reason = next(iter(str(error).splitlines()), "")
        raise BaseModelError(
            f"the model fails on inputs of the shapes {shapes}: {type(error).__name__}: {reason}",
            where=reference,
        ) from error
    axes = [sizes.get(str(axis), axis) for axis in task.output_axes(inputs, labels)]
    shape: tuple[int, ...] | str = (
        tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    )
    fits = len(shape) == len(axes) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(axes, shape, strict=False)
    )
    if not fits:
        raise BaseModelError(
            f"two samples gave {shape}; expected ({', '.join(map(str, axes))})"
            + (f", one output for each of the {len(labels)} labels" if labels else ""),
            where=reference,
            hint=f"the task {task.name} is for models of such outputs",
        )
