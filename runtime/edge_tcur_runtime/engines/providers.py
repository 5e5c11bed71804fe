"""Execution providers of ONNX Runtime: the table of those we know, and which are here.

A provider is what runs the operators of a graph: the CPU's kernels, a GPU's, a phone's accelerator. What a
provider has no kernel for runs on the CPU. See docs/providers.md for what was run and what was not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_tcur_runtime.errors import IncompatibleError, MissingEngineError, UsageError
from edge_tcur_runtime.installed import OnnxRuntimeInstall, is_importable

AUTO, CPU = "auto", "cpu"
# A session takes no longer value, and WebGPU reads the names of pinned nodes from one (ONNX Runtime 1.27).
MAX_PINNED_CHARACTERS = 8192
_ONNXRUNTIME = "https://onnxruntime.ai/docs/execution-providers"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: ours, as in ``--provider``.
        ort: ONNX Runtime's.
        device: what it runs on, in words.
        package: distribution that brings it.
        options: given to it. `why` says what for, `source` where they are documented.
        pins: entry of the session's configuration that keeps nodes on the CPU by name, if any.
        plugin: module that brings it to a stock ONNX Runtime as a library of its own.
        slow_start: it builds an engine for minutes; ``auto`` passes it by.
    """

    name: str
    ort: str
    device: str
    package: str
    options: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    source: str = ""
    pins: str | None = None
    plugin: str | None = None
    slow_start: bool = False


_TABLE = (
    Provider(CPU, "CPUExecutionProvider", "CPU", "onnxruntime"),
    Provider(
        "cuda",
        "CUDAExecutionProvider",
        "NVIDIA GPU",
        "onnxruntime-gpu",
        {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        "TF32 keeps 10 bits of a factor, too few for gradients; memory grows by what is asked for",
        f"{_ONNXRUNTIME}/CUDA-ExecutionProvider.html",
    ),
    Provider(
        "tensorrt",
        "TensorrtExecutionProvider",
        "NVIDIA GPU",
        "onnxruntime-gpu",
        {"trt_fp16_enable": "0"},
        "float32 throughout",
        f"{_ONNXRUNTIME}/TensorRT-ExecutionProvider.html",
        slow_start=True,
    ),
    Provider(
        "coreml",
        "CoreMLExecutionProvider",
        "Apple GPU and CPU",
        "onnxruntime",
        {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"},
        "an ML Program knows more operators; the Neural Engine computes in float16, too coarse for gradients",
        f"{_ONNXRUNTIME}/CoreML-ExecutionProvider.html",
    ),
    Provider(
        "webgpu",
        "WebGpuExecutionProvider",
        "any GPU with Vulkan, Metal or Direct3D 12",
        "onnxruntime-webgpu",
        source=f"{_ONNXRUNTIME}/WebGPU-ExecutionProvider.html",
        pins="ep.webgpuexecutionprovider.forceCpuNodeNames",
        plugin="onnxruntime_ep_webgpu",
    ),
    Provider(
        "openvino",
        "OpenVINOExecutionProvider",
        "Intel CPU",
        "onnxruntime-openvino",
        {"device_type": "CPU", "precision": "FP32"},
        "the precision that gradients need, on processors with bfloat16 too",
        f"{_ONNXRUNTIME}/OpenVINO-ExecutionProvider.html",
    ),
    Provider(
        "xnnpack",
        "XnnpackExecutionProvider",
        "ARM and x86 CPU",
        "onnxruntime built with --use_xnnpack",
        why="the number of threads is the session's",
        source=f"{_ONNXRUNTIME}/Xnnpack-ExecutionProvider.html",
    ),
)
PROVIDERS = {
    provider.name: provider for provider in _TABLE
}  # after the CPU, in the order in which auto tries


@dataclass(frozen=True)
class Placement:
    """Where a session runs: a provider, and the names of nodes that are kept on the CPU.

    Where nodes are pinned, ONNX Runtime's optimiser is off: what it fuses has other names, and an operator
    that is wrong would go on unseen inside.
    """

    provider: Provider = PROVIDERS[CPU]
    pinned: tuple[str, ...] = ()


ON_CPU = Placement()


def find_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PROVIDERS:
        raise UsageError(
            f"the provider {name!r} is not known; expected {AUTO} or one of {', '.join(PROVIDERS)}"
        )
    return PROVIDERS[name]


def available(onnxruntime: Any) -> tuple[str, ...]:
    """Names of the providers that this ONNX Runtime brings or that a plugin adds, in the table's order."""
    there = set(onnxruntime.get_available_providers())
    return tuple(
        provider.name for provider in _TABLE if provider.ort in there or _plugs_in(onnxruntime, provider)
    )


def require_provider(name: str, onnxruntime: Any, installed: OnnxRuntimeInstall) -> Provider:
    """The provider of that name, which is here.

    Raises:
        UsageError: no such provider.
        MissingEngineError: not in this build of ONNX Runtime; names the package that brings it.
    """
    provider = find_provider(name)
    found = available(onnxruntime)
    if name not in found:
        also = f", or pip install {provider.plugin.replace('_', '-')}" if provider.plugin else ""
        raise MissingEngineError(
            f"{installed.distribution} {installed.version} has no provider {name!r}, only {', '.join(found)}",
            hint=f"uninstall {installed.distribution}, then install {provider.package}{also}",
        )
    return provider


def session_providers(onnxruntime: Any, options: Any, placement: Placement) -> dict[str, Any]:
    """Sets a placement up in the options of a session.

    Returns:
        the arguments of `InferenceSession` that name the providers.

    Raises:
        IncompatibleError: nodes are pinned that the provider cannot pin, or a plugin finds no device.
    """
    provider = placement.provider
    if provider.name == CPU:
        return {"providers": [provider.ort]}
    if placement.pinned:
        _pin(onnxruntime, options, placement)
    own = dict(provider.options)
    if provider.name == "xnnpack":  # its documentation: threads of its own, none of them spinning
        own["intra_op_num_threads"] = str(options.intra_op_num_threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider.ort not in onnxruntime.get_available_providers():
        _plug_in(onnxruntime, options, provider, own)
        return {}
    return {"providers": [(provider.ort, own), PROVIDERS[CPU].ort]}


def can_pin(provider: Provider, names: tuple[str, ...]) -> bool:
    """Whether the provider can keep the nodes of these names on the CPU."""
    return provider.pins is not None and len("\n".join(names)) <= MAX_PINNED_CHARACTERS


def _pin(onnxruntime: Any, options: Any, placement: Placement) -> None:
    provider = placement.provider
    if provider.pins is None or not can_pin(provider, placement.pinned):
        raise IncompatibleError(f"{provider.name} cannot keep {len(placement.pinned)} nodes on the CPU")
    # Python gives WebGPU its options through the session's configuration alone; a dictionary beside the
    # provider's name is read by nobody (onnxruntime-webgpu 1.27.0).
    options.add_session_config_entry(provider.pins, "\n".join(placement.pinned))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def _plugs_in(onnxruntime: Any, provider: Provider) -> bool:
    """Whether a library for this provider is installed that a stock ONNX Runtime (1.24.4 and later) loads."""
    return (
        provider.plugin is not None
        and hasattr(onnxruntime, "register_execution_provider_library")
        and is_importable(provider.plugin)
    )


def _plug_in(onnxruntime: Any, options: Any, provider: Provider, own: Mapping[str, str]) -> None:
    """Registers a plugin's library, once a process, and gives its first device to the session."""
    assert provider.plugin is not None
    library = importlib.import_module(provider.plugin)

    def devices() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.ort]

    if not devices():
        onnxruntime.register_execution_provider_library(provider.name, library.get_library_path())
    found = devices()
    if not found:
        raise IncompatibleError(
            f"{provider.plugin} finds no device of {provider.name} here",
            hint="install the GPU's driver, or use --provider cpu",
        )
    options.add_provider_for_devices(found[:1], dict(own))
