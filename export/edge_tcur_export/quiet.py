"""torch's exporters, made quiet, and their failures explained in the user's terms."""

from __future__ import annotations

import logging
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch.export import ExportedProgram

import edge_tcur
from edge_tcur.errors import ExportError

_LOGGERS = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx")


def explained(action: Callable[[], ExportedProgram], what: str, hint: str) -> ExportedProgram:
    """Does `action`, quietly.

    Raises:
        ExportError: it failed; names the reason, and the file and line of the model where it did.
    """
    try:
        with quiet_torch():
            return action()
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {what}: {_summary(error)}", where=_place(error), hint=hint
        ) from error


class _WithoutGraphs:
    """stderr without the graph that torch prints beside an error. Everything else passes: a progress
    bar may be drawn there at the same time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`; the line end of a dropped graph is dropped too."""
        drop = "def forward(self" in text or (self._dropped and text == "\n")
        self._dropped = drop and text != "\n"
        return len(text) if drop else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """torch warns of its own internals and of torchvision, and prints a graph beside each failure; what
    matters of that to the user is in the exceptions."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(cast("TextIO", _WithoutGraphs(sys.stderr))):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _summary(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _place(error: Exception) -> str | None:
    """File and line of the last frame that is neither torch's, nor ours, nor Python's own."""
    place, trace = None, error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_file() and not _is_machinery(path):
            place = f"{path}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _is_machinery(path: Path) -> bool:
    own = (Path(torch.__file__).parent, Path(edge_tcur.__file__).parent, Path(__file__).parent)
    python = Path(sysconfig.get_path("stdlib"))
    return any(path.is_relative_to(root) for root in own) or (
        path.is_relative_to(python) and "site-packages" not in path.relative_to(python).parts
    )
