"""Reading the user's data for a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_tcur_runtime.data import Dataset, Layout, read_dataset
from edge_tcur_runtime.data.targets import LABEL, VALUES
from edge_tcur_runtime.formats.bundle import MANIFEST, Bundle
from edge_tcur_runtime.formats.schema import Fields
from edge_tcur_runtime.tasks import DeviceTask, find_device_task


def load_for(bundle: Bundle, path: Path, columns: Mapping[str, str], *, require_labels: bool) -> Dataset:
    """A data set of the kind, image size and targets that `bundle` takes.

    Args:
        columns: ``text_column``, and ``label_column``, which may be empty: then it follows from the task.

    Raises:
        DataError: see `edge_tcur_runtime.data`.
        FileFormatError: the manifest does not say what the bundle takes.
    """
    spec = Fields(bundle.manifest.preprocessing, f"{bundle.path(MANIFEST)}: preprocessing")
    task = find_device_task(bundle.manifest.task)
    kind = spec.choice("kind", (task.kind,))
    sides = [name for name in ("depth", "height", "width") if name in spec.mapping_keys()]
    image = kind == "image"
    layout = Layout(
        kind,
        task.reads,
        text_column=columns["text_column"],
        label_column=columns["label_column"] or _default_columns(task, bundle.manifest.labels),
        require_labels=require_labels,
        image_size=tuple(spec.integer(name, low=1) for name in sides) if image else None,
        channels=spec.integer("channels", low=1) if image else None,
    )
    return read_dataset(path, layout)


def _default_columns(task: DeviceTask, labels: Sequence[str]) -> str:
    """The column of a label is ``label``; numbers lie in the columns that the outputs are named after."""
    return ",".join(labels) if task.reads == VALUES else LABEL
