"""torch's exporters, made quiet."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO, cast

_LOGGERS = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx")


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
