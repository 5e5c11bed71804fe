"""`edge-tcur-device predict`: answers for texts or a data set, and their score where it has targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edge_tcur_runtime.cli.framework import (
    EXISTING_DIRECTORY,
    PATH,
    data_options,
    output_options,
    store_option,
)
from edge_tcur_runtime.cli.stream import answer_stream, is_stream
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.output import Sink, table

if TYPE_CHECKING:
    from edge_tcur_runtime.formats.bundle import Bundle
    from edge_tcur_runtime.predict import Model
    from edge_tcur_runtime.tasks import Answer, Mask

_SHOWN = 20  # samples in the table; JSON has all of them
EPILOG = """\b
Examples:
  edge-tcur-device predict bundle/ --text "where is my card?"
  edge-tcur-device predict bundle/ --data test.csv --adapter bundle --json
  edge-tcur-device predict bundle/ --data scans.npz --masks answers.npz
  edge-tcur-device predict bundle/ --data large.jsonl --stream > answers.jsonl
  echo '{"text": "where is my card?"}' | edge-tcur-device predict bundle/ --data -
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", type=EXISTING_DIRECTORY)
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to answer; repeatable.")
@click.option("--adapter", default="active", show_default=True, metavar="REF",
              help="base, bundle, active, a file, or a name or digest in the store.")  # fmt: skip
@click.option("--masks", type=PATH, metavar="FILE",
              help="Of a segmentation: write the masks to this .npz file.")  # fmt: skip
@click.option(
    "--provider", default="auto", show_default=True, help="What runs the graph: auto, cpu, webgpu, ..."
)
@click.option("--prepack", is_flag=True,
              help="Hold the weights packed for the processor as well: single answers come up to 1.5 x "
              "sooner, for as much memory again as the weights take.")  # fmt: skip
@click.option("--stream", is_flag=True,
              help="Answer a .jsonl file line by line in bounded memory, as --data - (standard input) does: "
              "a JSON line for each sample, at once. Labels in the data are not compared.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), metavar="N",
              help="Samples of a stream answered at once.  [default: 16; from standard input 1]")  # fmt: skip
@data_options(required=False)
@store_option
@output_options
def predict(
    bundle: Path,
    texts: tuple[str, ...],
    adapter: str,
    masks: Path | None,
    data: Path | None,
    columns: dict[str, str],
    store: Path,
    sink: Sink,
    **running: Any,
) -> None:
    """Answer texts or a data set with BUNDLE and an adapter."""
    from edge_tcur_runtime.formats.bundle import open_bundle

    if bool(texts) == (data is not None):
        raise UsageError("give either --text or --data")
    streamed = is_stream(data, running["stream"])
    if running["batch_size"] is not None and not streamed:
        raise UsageError("--batch-size is of a stream", hint="say --stream, or leave it out")
    opened = open_bundle(bundle)
    model = _model(opened, running["provider"], store, sink, prepack=running["prepack"])
    _check_masks(model, masks)
    name, used = _load(model, adapter, store, sink)
    with model.adapter(name):
        if data is None:
            _answer(model, list(texts), used, sink)
        elif streamed:
            answer_stream(model, data, columns["text_column"], running["batch_size"], sink)
        else:
            _answer_data(model, data, columns, masks, used, sink)


def _load(model: Model, ref: str, store: Path, sink: Sink) -> tuple[str | None, dict[str, object]]:
    """Loads what `ref` names; under which name (None is the base), and what the result tells of it.

    Where the adapter in use does not work, what comes before it answers. One that was asked for by its name
    must work.
    """
    from edge_tcur_runtime.cli.references import load_reference
    from edge_tcur_runtime.origin import content_digest
    from edge_tcur_runtime.store import Store
    from edge_tcur_runtime.trial import serve_with

    if ref == "active" and store.is_dir():
        found = serve_with(Store.open(store, create=False), model)
        for note in found.notes:
            sink.note(note)
        passed = [asdict(one) for one in found.passed_over]
        return found.digest, {"adapter": found.digest, "passed_over": passed}
    chosen = load_reference(ref, model.bundle, store)
    if chosen is None:
        return None, {"adapter": None, "passed_over": []}
    digest = content_digest(chosen)
    model.load(digest, chosen)
    return digest, {"adapter": digest, "passed_over": []}


def _model(bundle: Bundle, provider: str, store: Path, sink: Sink, *, prepack: bool) -> Model:
    """The model on the provider that is chosen; verdicts of self-checks are kept in the store."""
    from edge_tcur_runtime.engines.selfcheck import VERDICTS, choose_provider
    from edge_tcur_runtime.predict import Model

    cache = store / VERDICTS if store.is_dir() else None
    chosen = choose_provider(provider, bundle, ("infer",), cache=cache)
    for note in chosen.notes:
        sink.note(note)
    if provider not in ("auto", "cpu") or chosen.placement.provider.name != "cpu":
        sink.note(f"provider {chosen.placement.provider.name}: {chosen.reason}")
    return Model(bundle, placement=chosen.placement, prepack=prepack)


def _check_masks(model: Model, masks: Path | None) -> None:
    """Refuses a wrong option before the work."""
    if masks is None:
        return
    if model.task.reads != "masks":
        raise UsageError(f"--masks is for a segmentation; this bundle's task is {model.task.name}")
    if masks.suffix != ".npz" or not masks.parent.is_dir():
        raise UsageError(
            f"{masks} is not a .npz file in a directory that exists", where="--masks", hint="say masks.npz"
        )


def _answer(model: Model, texts: list[str], used: dict[str, object], sink: Sink) -> None:
    if model.task.kind != "text":
        raise UsageError("this bundle answers images", hint="give them with --data")
    found = model.predict(texts)
    sink.result(_payload(model, found) | used, _table(model, "text", texts, found))


def _answer_data(
    model: Model,
    data: Path,
    columns: dict[str, str],
    masks: Path | None,
    used: dict[str, object],
    sink: Sink,
) -> None:
    from edge_tcur_runtime.cli.inputs import load_for
    from edge_tcur_runtime.tasks import ACCURACY

    dataset = load_for(model.bundle, data, columns, require_labels=False)
    score = None
    if dataset.has_targets:
        found, score = model.evaluate(dataset)
    else:
        found = model.predict(dataset.samples)
    lines, metric = [_table(model, "sample", dataset.places[:_SHOWN], found[:_SHOWN])], model.task.metric
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more (all of them with --json)")
    if score is not None:
        lines.append(f"{metric.name} {metric.format(score)} of {len(found)} samples")
    if masks is not None:
        _write_masks(masks, cast("Sequence[Mask]", found))
        lines.append(f"wrote {masks}")
    accuracy = score if metric.name == ACCURACY else None
    payload = {**_payload(model, found), **used, "metric": metric.name, "score": score, "accuracy": accuracy}
    sink.result(payload | ({"masks": str(masks)} if masks else {}), "\n".join(lines))


def _write_masks(path: Path, answers: Sequence[Mask]) -> None:
    """Writes ``masks`` [n, *size] old-or-new, in the smallest unsigned dtype that holds the classes."""
    import io

    import numpy as np

    from edge_tcur_runtime.atomic import write_atomic

    masks = np.stack([answer.mask for answer in answers])
    content = io.BytesIO()
    np.savez_compressed(content, masks=masks.astype(np.min_scalar_type(int(masks.max()))))
    write_atomic(path, content.getvalue())


def _table(model: Model, title: str, names: Sequence[str], answers: Sequence[Answer]) -> str:
    rows = [(name, *answer.cells()) for name, answer in zip(names, answers, strict=True)]
    return table((title, *model.task.columns), rows)


def _payload(model: Model, found: Sequence[Answer]) -> dict[str, object]:
    return {
        "task": model.task.name,
        "labels": list(model.labels),
        "predictions": [answer.to_dict() for answer in found],
    }
