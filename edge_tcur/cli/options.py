"""Options that several commands of `edge-tcur` have, each declared once."""

from __future__ import annotations

from collections.abc import Callable

import click

from edge_tcur_runtime.cli.framework import COUNT, DIRECTORY, SIZE, Decorated, R, add_options

EXECUTORCH = "executorch"
DEFAULT_TARGETS = ("onnx", "ort-training", "step")
TARGETS = (*DEFAULT_TARGETS, EXECUTORCH)

force_option = click.option("--force", is_flag=True, help="Replace what is at --out.")
run_out_option = click.option(
    "--out", type=DIRECTORY, required=True, metavar="RUN", help="Directory of the run to write."
)


def target_option(text: str) -> Callable[[Decorated[R]], Decorated[R]]:
    """Adds ``--target``; the command receives `targets`, as often as it was said. `text` is its help."""
    return click.option("--target", "targets", type=click.Choice(TARGETS), multiple=True, help=text)


# What a plan is for; `export --dry-run` takes them too.
plan_options = add_options(
    click.option("--device", metavar="NAME", help="A device profile (see edge-tcur devices), or its file."),
    click.option("--provider", metavar="NAME", help="Execution provider whose kernels are looked up."),
    click.option("--batch", type=COUNT, help="Samples of a step that memory is planned for."),
    click.option("--length", type=COUNT, help="Tokens of a sample.  [default: at most 128]"),
    click.option("--budget", type=SIZE, help="Memory that may be used.  [default: the device's for one app]"),
)
