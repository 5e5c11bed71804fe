"""`edge-tcur combine`: exact arithmetic of adapters that share base, rows and columns."""

from __future__ import annotations

from pathlib import Path

import click

from edge_tcur_runtime.cli.framework import COUNT, output_options
from edge_tcur_runtime.errors import BadInputError, OutputExistsError, UsageError
from edge_tcur_runtime.output import Sink
from edge_tcur_runtime.units import format_size

EPILOG = """\b
Examples:
  edge-tcur combine anna.safetensors ben.safetensors --out mean.safetensors
  edge-tcur combine anna.safetensors=0.7 ben.safetensors=0.3 --out both.safetensors
  edge-tcur combine day.safetensors=1 night.safetensors=-1 --head-of 1 --out difference.safetensors
"""


@click.command("combine", epilog=EPILOG)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Adapter to write."
)
@click.option(
    "--head-of",
    type=COUNT,
    metavar="N",
    help="Take the head of the N-th adapter instead of combining the heads.",
)
@click.option("--force", is_flag=True, help="Replace the file at --out.")
@output_options
def combine(adapters: tuple[str, ...], out: Path, head_of: int | None, force: bool, sink: Sink) -> None:
    """Add, subtract, scale, interpolate or average adapters of one base with the same rows and columns.

    Without weights the mean is taken. The result is exact: an update is linear in the core.
    """
    from edge_tcur.arithmetic import combine as combine_adapters
    from edge_tcur_runtime.formats.adapter import read_adapter, write_adapter

    paths, weights = _parse(adapters)
    if head_of is not None and head_of > len(paths):
        raise UsageError(f"there are {len(paths)} adapters", where="--head-of")
    if out.exists() and not force:
        raise OutputExistsError(
            "the file exists", where=str(out), hint="choose another --out, or say --force"
        )
    loaded = [read_adapter(path) for path in paths]
    result = combine_adapters(loaded, weights, extras_from=None if head_of is None else head_of - 1)
    digest = write_adapter(out, result)
    size = out.stat().st_size
    payload = {
        "adapter": str(out),
        "digest": digest,
        "bytes": size,
        "weights": {str(path): weight for path, weight in zip(paths, weights, strict=True)},
    }
    terms = " + ".join(f"{weight:g} x {path.name}" for path, weight in zip(paths, weights, strict=True))
    sink.result(payload, f"{terms}\nwrote {out} ({format_size(size)})")


def _parse(adapters: tuple[str, ...]) -> tuple[list[Path], list[float]]:
    """Paths and weights; without any weight, those of the mean."""
    paths, weights = [], []
    for text in adapters:
        path, separator, weight = text.rpartition("=")
        if not separator or Path(text).exists():
            paths.append(Path(text))
            continue
        try:
            weights.append(float(weight))
        except ValueError as error:
            raise BadInputError(f"the weight {weight!r} is not a number", where=text) from error
        paths.append(Path(path))
    if not weights:
        return paths, [1 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise UsageError(
            "some adapters have a weight and others have none", hint="give all of them one, or none"
        )
    return paths, weights
