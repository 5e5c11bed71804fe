"""Readers of the user's own data, the same on the workstation and on the device.

Text comes from `.csv` and `.jsonl` files, images from `.npz` files and from folders with one
subfolder per class. Every error names the file and the line or image concerned.
"""

from __future__ import annotations

from edge_tcur_runtime.data.dataset import Dataset, Layout, load_dataset, read_dataset
from edge_tcur_runtime.data.encode import (
    check_trainable,
    encode_labels,
    encode_targets,
    label_names,
    split,
)
from edge_tcur_runtime.data.limits import DEFAULT_LIMITS, DataLimits

__all__ = [
    "DEFAULT_LIMITS",
    "DataLimits",
    "Dataset",
    "Layout",
    "check_trainable",
    "encode_labels",
    "encode_targets",
    "label_names",
    "load_dataset",
    "read_dataset",
    "split",
]
