"""The command-line tool `edge-tcur-device`. Its commands are imported when they run."""

from __future__ import annotations

from typing import NoReturn

import click

from edge_tcur_runtime import __version__
from edge_tcur_runtime.cli.framework import LazyGroup, run

COMMANDS = {
    "doctor": (
        "edge_tcur_runtime.cli.doctor",
        "doctor",
        "Show what works on this machine, and verify a bundle.",
    ),
    "predict": (
        "edge_tcur_runtime.cli.predict",
        "predict",
        "Predict with a bundle and the active adapter.",
    ),
    "personalize": (
        "edge_tcur_runtime.cli.personalize",
        "personalize",
        "Fine-tune an adapter on your own data under a memory budget.",
    ),
    "adapters": (
        "edge_tcur_runtime.cli.adapters",
        "adapters",
        "Install, list, activate and roll back adapters.",
    ),
    "update": (
        "edge_tcur_runtime.cli.update",
        "update",
        "Fetch, verify and try the newest signed adapter.",
    ),
}

EPILOG = """\b
Examples:
  edge-tcur-device doctor --bundle bundle/
  edge-tcur-device predict bundle/ --text "where is my card?"
  edge-tcur-device adapters install banking.safetensors --name banking
"""


@click.group("edge-tcur-device", cls=LazyGroup, table=COMMANDS, epilog=EPILOG)
@click.version_option(__version__, prog_name="edge-tcur-device")
def device() -> None:
    """Predict, fine-tune and swap tCURLoRA adapters on this device, without torch."""


def main() -> NoReturn:
    """Entry point of `edge-tcur-device`."""
    run(device)
