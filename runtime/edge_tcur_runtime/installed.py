"""Which ONNX Runtime is installed here, found without importing it.

Several distributions own the one module name `onnxruntime` (onnxruntime, onnxruntime-gpu,
onnxruntime-training-cpu, ...). Two of them in one environment overwrite each other's files, so
which of them answers an import is read from the files, and the conflict is reported.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import machinery, metadata
from pathlib import Path

MODULE = "onnxruntime"
_PREFIXES = ("onnxruntime", "ort-nightly")
_BUILD_INFO = re.compile(r"^(package_name|__version__)\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class OnnxRuntimeInstall:
    """The ONNX Runtime that `import onnxruntime` would load.

    Attributes:
        distribution: name of the distribution, e.g. ``"onnxruntime-training-cpu"``.
        version: its version, e.g. ``"1.19.2"``.
        training: whether its training interface is there.
    """

    distribution: str
    version: str
    training: bool


def find_onnxruntime(path: Sequence[str] | None = None) -> OnnxRuntimeInstall | None:
    """The installed ONNX Runtime, or None.

    Args:
        path: directories to look in; `sys.path` where None.
    """
    package = _package_directory(path)
    if package is None:
        return None
    built = _build_info(package)
    name, version = built.get("package_name"), built.get("__version__")
    if not (name and version):  # reading what every distribution says takes tens of milliseconds
        distributions = _distributions(path)
        name = name or next(iter(distributions), MODULE)
        version = version or distributions.get(name, "unknown")
    return OnnxRuntimeInstall(name, version, (package / "training" / "api").is_dir())


def find_conflicts(path: Sequence[str] | None = None) -> list[str]:
    """Names of the distributions that overwrite each other's `onnxruntime`; empty when at most one is there.

    Args:
        path: directories to look in; `sys.path` where None.
    """
    names = sorted(_distributions(path))
    return names if len(names) > 1 else []


def executorch_problem(path: Sequence[str] | None = None) -> str | None:
    """Why ExecuTorch cannot train here, or None; neither it nor torch is imported.

    Args:
        path: directories to look in; `sys.path` where None.
    """
    search = None if path is None else list(path)
    found = machinery.PathFinder.find_spec("executorch", search)
    folders = (found and found.submodule_search_locations) or ()
    if not any((Path(folder) / "extension" / "training").is_dir() for folder in folders):
        return "ExecuTorch is not installed"
    torch = machinery.PathFinder.find_spec("torch", search)
    if torch is None or torch.origin is None:
        return "ExecuTorch's Python interface needs torch, which is not installed"
    return None


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None
    except ValueError:  # a module put into sys.modules without a specification
        return module in sys.modules


def _package_directory(path: Sequence[str] | None) -> Path | None:
    spec = machinery.PathFinder.find_spec(MODULE, None if path is None else list(path))
    # A directory without __init__.py is what an uninstalled package leaves behind.
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _build_info(package: Path) -> dict[str, str]:
    """What the wheel says about itself; with two wheels installed, the one whose files came last."""
    try:
        text = (package / "capi" / "build_and_package_info.py").read_text("utf-8", errors="replace")
    except OSError:
        return {}
    return dict(_BUILD_INFO.findall(text))


def _distributions(path: Sequence[str] | None) -> dict[str, str]:
    """Name -> version of every installed distribution that owns the module."""
    found = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    result = {}
    for distribution in found:
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name.startswith(_PREFIXES) and _owns_module(distribution):
            result[name] = distribution.version
    return result


def _owns_module(distribution: metadata.Distribution) -> bool:
    top_level = distribution.read_text("top_level.txt")
    if top_level is not None:
        return MODULE in top_level.split()
    return any(file.parts[0] == MODULE for file in distribution.files or ())
