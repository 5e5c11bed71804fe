"""`edge-tcur convert`: an adapter file as ONNX Runtime or ExecuTorch reads it, without code of ours."""

from __future__ import annotations

from pathlib import Path

import click

from edge_tcur_runtime.cli.framework import DIRECTORY, PATH, output_options
from edge_tcur_runtime.errors import OutputExistsError
from edge_tcur_runtime.output import Sink
from edge_tcur_runtime.units import format_size

EPILOG = """\b
Examples:
  edge-tcur convert run/adapter.safetensors --to onnx_adapter --out adapter.onnx_adapter
  edge-tcur convert anna.safetensors --to ptd --bundle bundle/ --out anna.ptd
"""
KINDS = ("onnx_adapter", "ptd")


@click.command("convert", epilog=EPILOG)
@click.argument("adapter", type=PATH)
@click.option("--to", "kind", type=click.Choice(KINDS), required=True, help="Format of the new file.")
@click.option(
    "--bundle", type=DIRECTORY, metavar="BUNDLE", help="Check that ADAPTER fits it; fill up to its rank."
)
@click.option(
    "--out",
    type=PATH,
    required=True,
    metavar="FILE",
    help="File to write.",
)
@click.option("--force", is_flag=True, help="Replace the file at --out.")
@output_options
def convert(adapter: Path, kind: str, bundle: Path | None, out: Path, force: bool, sink: Sink) -> None:
    """Write ADAPTER as a file that maps graph inputs to tensors.

    onnx_adapter is ONNX Runtime's own format (1.20 or newer), ptd is ExecuTorch's.
    """
    from edge_tcur_export.convert import convert_adapter
    from edge_tcur_runtime.atomic import write_atomic
    from edge_tcur_runtime.formats.adapter import read_adapter
    from edge_tcur_runtime.formats.bundle import open_bundle

    if out.exists() and not force:
        raise OutputExistsError(
            "the file exists", where=str(out), hint="choose another --out, or say --force"
        )
    # Of the bundle only the manifest is read, so its files need not be digested.
    manifest = None if bundle is None else open_bundle(bundle, verify=False).manifest
    content = convert_adapter(read_adapter(adapter), kind, manifest)
    write_atomic(out, content, mode=0o600)  # an adapter of a user's data is personal
    payload = {"file": str(out), "format": kind, "bytes": len(content), "adapter": str(adapter)}
    sink.result(payload, f"wrote {out} ({format_size(len(content))})")
