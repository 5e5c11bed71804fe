"""The device profile: what a target device offers, and where each figure comes from.

A profile is written as TOML by people and read on the workstation, which plans and exports for it.
This module knows the fields and their rules and reads no file: it takes the parsed document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_tcur_runtime.errors import FileFormatError, UsageError
from edge_tcur_runtime.formats.schema import Fields, nearest
from edge_tcur_runtime.units import parse_size

KINDS = ("phone", "jetson", "single-board", "desktop")
ISA = {
    "aarch64": ("neon", "fp16", "dotprod", "bf16", "i8mm", "sve", "sve2", "sme"),
    "x86_64": ("sse4.2", "avx", "avx2", "fma", "f16c", "avx-vnni", "avx512f", "avx512-vnni", "amx"),
}
GPU_APIS = ("vulkan", "metal", "cuda", "opencl", "none")
ENGINES = ("ort-training", "ort-step", "executorch")
PROVIDERS = ("cpu", "xnnpack", "nnapi", "coreml", "webgpu", "qnn", "cuda", "tensorrt", "openvino")
FIGURES = ("arch", "cores", "big_cores", "memory", "app_memory", "isa", "gpu", "engines", "providers")
_KEYS = ("name", "title", "kind", *FIGURES, "sources")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True)
class DeviceProfile:
    """One target device.

    Attributes:
        name: short identifier, lower-case letters, digits and hyphens: ``pixel-8``.
        title: the device's name in full.
        kind: one of `KINDS`.
        arch: instruction set of the 64-bit system it runs, a key of `ISA`.
        cores: CPU cores.
        big_cores: those of them that are fast; all where the cores are alike.
        memory_bytes: memory as sold, in bytes. The system takes a part of it.
        app_memory_bytes: what one app may use without being killed, in bytes; the default budget.
        isa: extensions that every core has and the system exposes, out of `ISA`.
        gpu: programming interfaces of the GPU, out of `GPU_APIS`; ``("none",)`` without one.
        engines: training engines that can be installed there, out of `ENGINES`.
        providers: execution providers of the ONNX Runtime packages for it, out of `PROVIDERS`.
        sources: figure (`FIGURES`) -> where it comes from.
    """

    name: str
    title: str
    kind: str
    arch: str
    cores: int
    big_cores: int
    memory_bytes: int
    app_memory_bytes: int
    isa: tuple[str, ...]
    gpu: tuple[str, ...]
    engines: tuple[str, ...]
    providers: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str) -> DeviceProfile:
        """A profile from a parsed document, whose sizes are strings with binary units.

        Args:
            document: the fields, as a TOML or JSON parser returns them.
            where: the file, for messages.

        Raises:
            FileFormatError: an unknown key or value (with the nearest known one), a missing field, a
                wrong type, a size without a binary unit, or figures that contradict each other.
        """
        fields = Fields(document, where).only(*_KEYS)
        arch = fields.choice("arch", ISA)
        profile = cls(
            name=_name(fields),
            title=fields.text("title"),
            kind=fields.choice("kind", KINDS),
            arch=arch,
            cores=fields.integer("cores", low=1, high=1024),
            big_cores=fields.integer("big_cores", low=1, high=1024),
            memory_bytes=_size(fields, "memory"),
            app_memory_bytes=_size(fields, "app_memory"),
            isa=_subset(fields, "isa", ISA[arch]),
            gpu=_subset(fields, "gpu", GPU_APIS),
            engines=_subset(fields, "engines", ENGINES),
            providers=_subset(fields, "providers", PROVIDERS),
            sources=_sources(fields),
        )
        _check_consistency(profile, where)
        return profile

    def to_dict(self) -> dict[str, object]:
        """The profile as one JSON object; sizes in bytes."""
        return {
            "name": self.name,
            "title": self.title,
            "kind": self.kind,
            "arch": self.arch,
            "cores": self.cores,
            "big_cores": self.big_cores,
            "memory_bytes": self.memory_bytes,
            "app_memory_bytes": self.app_memory_bytes,
            "isa": list(self.isa),
            "gpu": list(self.gpu),
            "engines": list(self.engines),
            "providers": list(self.providers),
            "sources": dict(self.sources),
        }


def _name(fields: Fields) -> str:
    name = fields.text("name")
    if not _NAME.fullmatch(name):
        raise FileFormatError(
            f"the field 'name' is {name!r}; expected lower-case letters, digits and hyphens",
            where=fields.where,
        )
    return name


def _size(fields: Fields, key: str) -> int:
    try:
        size = parse_size(fields.text(key))
    except UsageError as error:
        raise FileFormatError(f"the field {key!r}: {error}", where=fields.where, hint=error.hint) from error
    if size == 0:
        raise FileFormatError(f"the field {key!r} is zero", where=fields.where)
    return size


def _subset(fields: Fields, key: str, known: Iterable[str]) -> tuple[str, ...]:
    values, options = fields.texts(key), tuple(known)
    for value in values:
        if value not in options:
            guess = nearest(value, options)
            raise FileFormatError(
                f"the field {key!r} holds {value!r}; expected some of {', '.join(options)}",
                where=fields.where,
                hint=f"did you mean {guess!r}?" if guess else None,
            )
    if not values or len(set(values)) != len(values):
        raise FileFormatError(f"the field {key!r} is empty or names a value twice", where=fields.where)
    return values


def _sources(fields: Fields) -> dict[str, str]:
    if "sources" not in fields.mapping_keys():
        return {}
    sources = fields.child("sources").only(*FIGURES)
    return {key: sources.text(key) for key in sources.mapping_keys()}


def _check_consistency(profile: DeviceProfile, where: str) -> None:
    if profile.app_memory_bytes > profile.memory_bytes:
        raise FileFormatError(
            f"'app_memory' is {profile.app_memory_bytes} bytes, more than the 'memory' of "
            f"{profile.memory_bytes} bytes",
            where=where,
            hint="app_memory is the part of the memory that one app may use",
        )
    if profile.big_cores > profile.cores:
        raise FileFormatError(
            f"'big_cores' is {profile.big_cores}, more than the {profile.cores} 'cores'", where=where
        )
    if "none" in profile.gpu and len(profile.gpu) > 1:
        raise FileFormatError("'gpu' says \"none\" and names an interface too", where=where)
