"""An adapter file as other runtimes read it: ``.onnx_adapter`` (ONNX Runtime) and ``.ptd`` (ExecuTorch)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_tcur_export.onnx_adapter import adapter_file
from edge_tcur_runtime.errors import IncompatibleError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Manifest
from edge_tcur_runtime.formats.factors import INDEX_PARTS

ONNX_ADAPTER, PTD = "onnx_adapter", "ptd"
KINDS = (ONNX_ADAPTER, PTD)
# Axes of each part that are as long as the rank.
_RANK_AXES = {"core": (1, 2), **dict.fromkeys(INDEX_PARTS, (1,)), "left": (2,), "right": (1,)}


def convert_adapter(adapter: Adapter, kind: str, manifest: Manifest | None = None) -> bytes:
    """The bytes of a file that holds what the graphs are fed, under the names of the graphs' inputs.

    Args:
        kind: ``onnx_adapter`` for `infer.onnx` and `step.onnx`, which take any rank, or ``ptd`` for
            ExecuTorch's programs.
        manifest: of the bundle that the file is for. The adapter must fit it, and with ``ptd`` a rank below
            the programs' is filled up with zeros around the core. None: whatever the adapter holds.

    Raises:
        UsageError: no such kind.
        BaseMismatchError, IncompatibleError: the adapter does not fit the bundle, its rank is above that of
            the programs, or ExecuTorch is not installed.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown format {kind!r}; expected {', '.join(KINDS)}")
    feeds = adapter.feeds() if manifest is None else build_feeds(manifest, adapter)
    if kind == ONNX_ADAPTER:
        return adapter_file(feeds)
    from edge_tcur_export.executorch import require_executorch, tensor_file

    require_executorch("--to ptd")
    return tensor_file(feeds if manifest is None else fill_rank(manifest, feeds))


def fill_rank(manifest: Manifest, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds at the ranks of the bundle: zeros around each core, where row and column 0 then stand.

    Raises:
        IncompatibleError: a group has a higher rank than the bundle's.
    """
    result = dict(feeds)
    for group, spec in manifest.groups.items():
        rank = feeds[f"{group}.core"].shape[-1]
        if rank > spec.rank:
            raise IncompatibleError(
                f"the group {group} has rank {rank}; the bundle's programs are for rank {spec.rank}",
                hint="export a bundle from the run of this adapter, or lower its rank with edge-tcur reduce",
            )
        for part in manifest.parts:
            value, axes = feeds[f"{group}.{part}"], _RANK_AXES[part]
            widths = [(0, spec.rank - rank if axis in axes else 0) for axis in range(value.ndim)]
            result[f"{group}.{part}"] = np.pad(value, widths)
    return result
