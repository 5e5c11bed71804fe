"""`edge-tcur-device predict --data -` and `--stream`: JSON Lines in, one JSON line out for each, at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edge_tcur_runtime.errors import DataError, UsageError
from edge_tcur_runtime.output import Mode, Sink

if TYPE_CHECKING:
    from edge_tcur_runtime.predict import Model

STDIN = Path("-")
_STDIN_NAME = "standard input"
_BATCH = 16  # samples of a file; from standard input one, because the next may wait for its answer


def is_stream(data: Path | None, stream: bool) -> bool:
    """Whether the answers are to be streamed."""
    if stream and data is None:
        raise UsageError("--stream goes with --data", hint="say --data FILE.jsonl, or --data -")
    return stream or data == STDIN


def answer_stream(model: Model, data: Path, text_column: str, batch_size: int | None, sink: Sink) -> None:
    """Answers the lines of a file or of standard input in their order, in bounded memory.

    A line that cannot be used ends the stream, after the answers to those before it.

    Raises:
        UsageError: a bundle of images, or `--quiet`.
        DataError: a file that cannot be read, or a line that cannot be used; it names the line.
    """
    from edge_tcur_runtime.data.text import stream_jsonl

    if model.task.kind != "text":
        raise UsageError(
            "a stream is of texts; this bundle answers images", hint="give them with --data FILE.npz"
        )
    if sink.mode is Mode.QUIET:
        raise UsageError("a stream has nothing but its lines to print", hint="leave --quiet out")
    with _opened(data) as file:
        name = _STDIN_NAME if data == STDIN else str(data)
        lines: list[int] = []

        def texts() -> Iterator[str]:
            for line, text in stream_jsonl(file, name, text_column):
                lines.append(line)
                yield text

        size = batch_size or (1 if data == STDIN else _BATCH)
        for answer in model.stream(texts(), batch_size=size):
            sink.line({"line": lines.pop(0), **answer.to_dict()})


@contextmanager
def _opened(data: Path) -> Iterator[BinaryIO]:
    if data == STDIN:
        yield sys.stdin.buffer
        return
    if data.suffix.lower() != ".jsonl":
        raise DataError("a stream is of JSON Lines", where=str(data), hint="give a .jsonl file, or -")
    try:
        file = data.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}", where=str(data), hint="check the path and its permissions"
        ) from error
    with file:
        yield file
