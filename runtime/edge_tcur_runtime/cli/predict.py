"""`edge-tcur-device predict`: answers for texts or a data set, and its accuracy where it has labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_tcur_runtime.cli.framework import EXISTING_DIRECTORY, data_options, output_options, store_option
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.output import Sink, table

if TYPE_CHECKING:
    from edge_tcur_runtime.data import Dataset
    from edge_tcur_runtime.predict import Model, Prediction

EPILOG = """\b
Examples:
  edge-tcur-device predict bundle/ --text "where is my card?"
  edge-tcur-device predict bundle/ --data test.csv --adapter bundle --json
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", type=EXISTING_DIRECTORY)
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to answer; repeatable.")
@click.option("--adapter", default="active", show_default=True, metavar="REF",
              help="base, bundle, active, a file, or a name or digest in the store.")  # fmt: skip
@data_options(required=False)
@store_option
@output_options
def predict(
    bundle: Path,
    texts: tuple[str, ...],
    adapter: str,
    data: Path | None,
    columns: dict[str, str],
    store: Path,
    sink: Sink,
) -> None:
    """Answer texts or a data set with BUNDLE and an adapter."""
    from edge_tcur_runtime.cli.references import load_reference
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.predict import Model

    if bool(texts) == (data is not None):
        raise UsageError("give either --text or --data")
    opened = open_bundle(bundle)
    model = Model(opened)
    model.attach(load_reference(adapter, opened, store))
    if data is None:
        _answer(model, list(texts), sink)
    else:
        _answer_data(model, data, columns, sink)


def _answer(model: Model, texts: list[str], sink: Sink) -> None:
    if model.bundle.manifest.preprocessing["kind"] != "text":
        raise UsageError("this bundle answers images", hint="give them with --data")
    found = model.predict(texts)
    rows = [(text, item.label, f"{max(item.scores):.3f}") for text, item in zip(texts, found, strict=True)]
    sink.result(_payload(model, found), table(("text", "label", "score"), rows))


def _answer_data(model: Model, data: Path, columns: dict[str, str], sink: Sink) -> None:
    from edge_tcur_runtime.cli.inputs import load_for
    from edge_tcur_runtime.data import encode_labels
    from edge_tcur_runtime.predict import accuracy_of

    dataset: Dataset = load_for(model.bundle, data, columns, require_labels=False)
    if dataset.labels is not None:
        encode_labels(dataset, model.labels)  # an unknown label ends here, before the work
    found = model.predict(dataset.samples)
    accuracy = None if dataset.labels is None else accuracy_of(found, dataset, model.labels)
    rows = [
        (place, item.label, f"{max(item.scores):.3f}")
        for place, item in list(zip(dataset.places, found, strict=True))[:20]
    ]
    lines = [table(("sample", "label", "score"), rows)]
    if len(found) > len(rows):
        lines.append(f"and {len(found) - len(rows)} more (all of them with --json)")
    if accuracy is not None:
        lines.append(f"accuracy {accuracy:.1%} of {len(found)} samples")
    sink.result({**_payload(model, found), "accuracy": accuracy}, "\n".join(lines))


def _payload(model: Model, found: list[Prediction]) -> dict[str, object]:
    return {
        "labels": list(model.labels),
        "predictions": [{"label": item.label, "scores": list(item.scores)} for item in found],
    }
