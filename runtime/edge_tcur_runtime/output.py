"""The one output sink of both tools: people read it, or scripts do, or nobody.

In `human` mode results go to stdout as text; in `json` mode stdout carries exactly one JSON
object with `schema_version`; `quiet` prints no result. Notes, progress and logs always go to
stderr, and progress disappears when stderr is no terminal.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum

import click

from edge_tcur_runtime.errors import EdgeError

SCHEMA_VERSION = 1


class Mode(Enum):
    """How results are printed."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Sink:
    """Prints results, notes and errors in one mode."""

    def __init__(self, mode: Mode = Mode.HUMAN) -> None:
        self.mode = mode

    def result(self, payload: Mapping[str, object], human: str) -> None:
        """The command's one result: `payload` as JSON, or `human` as text."""
        if self.mode is Mode.JSON:
            click.echo(json.dumps(plain({"schema_version": SCHEMA_VERSION, **payload}), allow_nan=False))
        elif self.mode is Mode.HUMAN:
            click.echo(human)

    def note(self, text: str) -> None:
        """A line for people, on stderr; silent in quiet mode."""
        if self.mode is not Mode.QUIET:
            click.echo(text, err=True)

    def error(self, error: EdgeError) -> None:
        """An error with its place and hint: text on stderr, and in JSON mode an object on stdout."""
        if self.mode is Mode.JSON:
            click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "error": error.to_dict()}))
        click.secho(f"error: {error}", fg="red", err=True)
        if error.hint:
            click.echo(f"  hint: {error.hint}", err=True)

    @contextmanager
    def steps(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        """A progress bar on stderr, silent where that is no terminal.

        Yields:
            a function of steps done, steps in all, and the loss to show.
        """
        if self.mode is Mode.QUIET or not sys.stderr.isatty():
            yield lambda *_: None
            return
        with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

            def advance(done: int, total: int, loss: float) -> None:
                bar.length = total
                bar.label = f"{label}, loss {loss:.3f}"
                bar.update(done - bar.pos)

            yield advance

    @contextmanager
    def transfer(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar of a transfer on stderr, shown with its first bytes and only on a terminal.

        Yields:
            a function of bytes so far and bytes in all.
        """
        if self.mode is Mode.QUIET or not sys.stderr.isatty():
            yield lambda *_: None
            return
        with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

            def advance(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            yield advance


def plain(value: object) -> object:
    """`value` as JSON has it: a number that is none, or infinite, becomes null."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain text table: first column to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )
