"""Reading the user's data for a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_tcur_runtime.data import Dataset, load_dataset
from edge_tcur_runtime.formats.bundle import Bundle


def load_for(bundle: Bundle, path: Path, columns: Mapping[str, str], *, require_labels: bool) -> Dataset:
    """A data set of the kind and image size that `bundle` takes.

    Raises:
        DataError: see `edge_tcur_runtime.data`.
    """
    spec = bundle.manifest.preprocessing
    image = spec["kind"] == "image"
    return load_dataset(
        path,
        str(spec["kind"]),
        text_column=columns["text_column"],
        label_column=columns["label_column"],
        require_labels=require_labels,
        image_size=(int(spec["height"]), int(spec["width"])) if image else None,
        channels=int(spec["channels"]) if image else None,
    )
