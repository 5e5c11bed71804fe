"""The command-line tool `edge-tcur`. Its commands are imported when they run."""

from __future__ import annotations

from typing import NoReturn

import click

from edge_tcur import __version__
from edge_tcur_runtime.cli.framework import LazyGroup, run

COMMANDS = {
    "quickstart": (
        "edge_tcur.cli.quickstart",
        "quickstart",
        "See the whole path, from a base to a personal adapter, on bundled data.",
    ),
    "train": (
        "edge_tcur.cli.train",
        "train",
        "Train an adapter of a base on your labelled data.",
    ),
    "eval": (
        "edge_tcur.cli.eval",
        "evaluate",
        "Score an adapter, and its base without it, on labelled data.",
    ),
    "export": (
        "edge_tcur.cli.export",
        "export",
        "Export base and factors separately, as a bundle for devices.",
    ),
    "plan": (
        "edge_tcur.cli.plan",
        "plan",
        "Say what an export would write, need and lack.",
    ),
    "convert": (
        "edge_tcur.cli.convert",
        "convert",
        "Write an adapter as ONNX Runtime or ExecuTorch reads it.",
    ),
    "inspect": (
        "edge_tcur.cli.inspect",
        "inspect",
        "Show what is in an adapter file, a run or a bundle.",
    ),
    "combine": (
        "edge_tcur.cli.combine",
        "combine",
        "Add, scale or average adapters of one base.",
    ),
    "merge": (
        "edge_tcur.cli.rework",
        "merge",
        "Write a base with an adapter in its weights, or undo that.",
    ),
    "migrate": (
        "edge_tcur.cli.rework",
        "migrate",
        "Bring an adapter to a new version of its base.",
    ),
    "reduce": (
        "edge_tcur.cli.rework",
        "reduce",
        "Give an adapter a lower rank.",
    ),
    "compare": (
        "edge_tcur.cli.compare",
        "compare",
        "Measure methods against each other: table, plot and records.",
    ),
    "publish": (
        "edge_tcur.cli.publish",
        "publish",
        "Publish signed adapters over the air, as a static directory.",
    ),
    "devices": (
        "edge_tcur.cli.devices",
        "devices",
        "List the device profiles, or show one.",
    ),
}

EPILOG = """\b
Examples:
  edge-tcur quickstart
  edge-tcur train --base all-MiniLM-L6-v2 --data intents.csv --out run/
  edge-tcur export run/ --out bundle/
"""


@click.group("edge-tcur", cls=LazyGroup, table=COMMANDS, epilog=EPILOG)
@click.version_option(__version__, prog_name="edge-tcur")
def edge_tcur() -> None:
    """Train tCURLoRA adapters and export them for devices that fine-tune them without torch."""


def main() -> NoReturn:
    """Entry point of `edge-tcur`."""
    run(edge_tcur)
