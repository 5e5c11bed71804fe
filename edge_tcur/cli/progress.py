"""One progress bar on stderr for long work; silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_tcur_runtime.output import Mode, Sink

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class StageBar:
    """The bar of one piece of work: named stages, and steps within a known total.

    Args:
        progress: rich's display and its one task; None for a bar that nobody sees.
    """

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress, self._task = progress, task

    def stage(self, name: str) -> None:
        """Names what is being done now."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name)

    def advance(self, steps: float = 1, *, detail: str = "") -> None:
        """Moves on by `steps` of the total; `detail` stands beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=steps, detail=detail)


@contextmanager
def stage_bar(sink: Sink, name: str, *, total: float | None = None) -> Iterator[StageBar]:
    """A progress bar on stderr, gone when the block ends.

    Nothing is shown in quiet mode, nor where stderr is no terminal.

    Args:
        name: the first stage.
        total: steps in all; None for a bar that only shows that work goes on.
    """
    if sink.mode is Mode.QUIET or not sys.stderr.isatty():
        yield StageBar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield StageBar(progress, progress.add_task(name, total=total, detail=""))
