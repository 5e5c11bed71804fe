"""Writing graphs: none of them may hold more than a protobuf file can."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edge_tcur.errors import ExportError

LARGEST = 2**31 - 2**20  # bytes of tensors in one protobuf file (its limit is 2 GiB), some left for the nodes
_SHOWN = 3


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph; what is in `base.bin` stays there.

    Raises:
        ExportError: its own tensors are more than a protobuf file can hold.
    """
    check_size(model, path.name)
    ir.save(model, path)


def check_size(model: ir.Model, name: str) -> None:
    """Refuses a graph whose own tensors are more than a protobuf file can hold.

    Args:
        name: what the error calls it.

    Raises:
        ExportError: with the largest of them.
    """
    sizes = {
        key: value.const_value.nbytes
        for key, value in model.graph.initializers.items()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    }
    total = sum(sizes.values())
    if total > LARGEST:
        largest = sorted(sizes, key=lambda key: -sizes[key])[:_SHOWN]
        raise ExportError(
            f"{name} would hold {total:,} bytes of its own, a graph's file at most {LARGEST:,}; the largest "
            "tensors are " + ", ".join(f"{key} ({sizes[key]:,})" for key in largest),
            hint="these are trained in full: take fewer modules into modules_to_save",
        )
