"""Reading the user's data for a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_tcur_runtime.data import Dataset, load_dataset
from edge_tcur_runtime.formats.bundle import MANIFEST, Bundle
from edge_tcur_runtime.formats.schema import Fields


def load_for(bundle: Bundle, path: Path, columns: Mapping[str, str], *, require_labels: bool) -> Dataset:
    """A data set of the kind and image size that `bundle` takes.

    Raises:
        DataError: see `edge_tcur_runtime.data`.
        FileFormatError: the manifest does not say what the bundle takes.
    """
    spec = Fields(bundle.manifest.preprocessing, f"{bundle.path(MANIFEST)}: preprocessing")
    kind = spec.choice("kind", ("image", "text"))
    image = kind == "image"
    return load_dataset(
        path,
        kind,
        text_column=columns["text_column"],
        label_column=columns["label_column"],
        require_labels=require_labels,
        image_size=(spec.integer("height", low=1), spec.integer("width", low=1)) if image else None,
        channels=spec.integer("channels", low=1) if image else None,
    )
