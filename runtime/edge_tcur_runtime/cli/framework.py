"""What both command-line tools share: lazy commands, shared options, and the one place of exit codes."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from edge_tcur_runtime.errors import BadInputError, DiskError, EdgeError, UsageError
from edge_tcur_runtime.output import Mode, Sink
from edge_tcur_runtime.units import parse_size

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away, e.g. `| head`
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}

R = TypeVar("R")
Decorated = Callable[..., R]

if TYPE_CHECKING:
    _IntParamType = click.ParamType[int]
else:
    _IntParamType = click.ParamType  # generic only in the newest click


class LazyGroup(click.Group):
    """A group whose command modules are imported only when one of its commands runs.

    Args:
        table: command name -> (module, attribute, short help), in the order of the help text.
            Listing the commands and printing the group's help import no command module.
    """

    def __init__(self, *arguments: Any, table: Mapping[str, tuple[str, str, str]], **attributes: Any) -> None:
        attributes.setdefault("context_settings", HELP_NAMES)
        super().__init__(*arguments, **attributes)
        self._table = dict(table)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the table's order, then those added directly."""
        return [*self._table, *(name for name in super().list_commands(ctx) if name not in self._table)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its module imported now; None where there is no such command."""
        if cmd_name not in self._table:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = self._table[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands with the table's short help."""
        rows = [(name, self._short_help(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _short_help(self, name: str) -> str:
        if name in self._table:
            return self._table[name][2]
        return self.commands[name].get_short_help_str()


class SizeType(_IntParamType):
    """A size in binary units (``256MiB``); the command receives bytes as int."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; anything else is a usage error (exit code 2)."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except UsageError as error:
            self.fail(f"{error}; {error.hint}", param, ctx)


SIZE = SizeType()
COUNT = click.IntRange(min=1)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)


def add_options(*options: Callable[[Any], Any]) -> Callable[[Decorated[R]], Decorated[R]]:
    """Adds options (of `click.option`, or of this function) that stand in this order in the help."""

    def decorate(command: Decorated[R]) -> Decorated[R]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def output_options(command: Decorated[R]) -> Decorated[R]:
    """Adds ``--json``, ``--quiet`` and ``--debug``; the command receives one argument, `sink`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--quiet", is_flag=True, help="Print errors only.")
    @click.option("--debug", is_flag=True, expose_value=False, help="Print a traceback with an error.")
    @functools.wraps(command)
    def with_sink(*arguments: Any, as_json: bool, quiet: bool, **options: Any) -> R:
        if as_json and quiet:
            raise UsageError("--json and --quiet contradict each other", hint="leave one of them out")
        mode = Mode.JSON if as_json else Mode.QUIET if quiet else Mode.HUMAN
        return command(*arguments, sink=Sink(mode), **options)

    return with_sink


def store_option(command: Decorated[R]) -> Decorated[R]:
    """Adds ``--store DIR``; the command receives `store`, a path that need not exist yet."""
    return click.option(
        "--store",
        type=DIRECTORY,
        envvar="EDGE_TCUR_STORE",
        default=lambda: os.path.expanduser("~/.local/share/edge-tcur"),
        show_default="$EDGE_TCUR_STORE, else ~/.local/share/edge-tcur",
        metavar="DIR",
        help="The directory of installed adapters.",
    )(command)


def data_options(*, required: bool) -> Callable[[Decorated[R]], Decorated[R]]:
    """Adds ``--data`` and the names of its columns; the command receives `data` and `columns`."""

    def decorate(command: Decorated[R]) -> Decorated[R]:
        @click.option(
            "--data",
            type=click.Path(path_type=Path),
            required=required,
            metavar="PATH",
            help=".csv, .jsonl, .npz, or a folder of images per class.",
        )
        @click.option("--text-column", default="text", show_default=True, help="Column that holds the text.")
        @click.option(
            "--label-column",
            default="",
            help="Column of the label; of numbers all columns, separated by commas.  "
            "[default: label; of numbers the names of the outputs]",
        )
        @functools.wraps(command)
        def with_data(*arguments: Any, text_column: str, label_column: str, **options: Any) -> R:
            columns = {"text_column": text_column, "label_column": label_column}
            return command(*arguments, columns=columns, **options)

        return with_data

    return decorate


def run(group: click.Command, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a tool and exits; the one place that turns exceptions into exit codes.

    Args:
        group: the tool's command; its name is the name of the program.
        argv: arguments without the program's name; `sys.argv` where None.

    Raises:
        SystemExit: always; the codes are in docs/errors.md.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    try:
        code = _invoke(group, arguments)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        code = BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the one place where anything becomes an exit code
        if "--debug" in options:
            traceback.print_exception(error)
        code = _report(error, Mode.JSON if "--json" in options else Mode.HUMAN)
    sys.exit(code)


def _invoke(group: click.Command, arguments: list[str]) -> int:
    try:
        with group.make_context(group.name, arguments) as context:
            group.invoke(context)
        code = 0
    except click.exceptions.Exit as end:
        code = end.exit_code
    sys.stdout.flush()  # here, where a full disk or a closed pipe still becomes an exit code
    return code


def _report(error: Exception, mode: Mode) -> int:
    """Prints an error and returns the exit code; where even that cannot be written, only the code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # click >= 8.2; its message is the whole help text
        click.echo(str(error), err=True)
        return 2
    shown = _user_error(error)
    try:
        Sink(mode).error(shown)
    except OSError:
        _discard_stdout()
        if mode is Mode.JSON:
            Sink(Mode.HUMAN).error(shown)
    return int(shown.exit_code)


def _user_error(error: Exception) -> EdgeError:
    """The user-facing form of any exception."""
    if isinstance(error, EdgeError):
        return error
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else None
        return UsageError(error.format_message(), hint=f"see '{command} --help'" if command else None)
    if isinstance(error, click.ClickException):
        return BadInputError(error.format_message())
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        where = None if error.filename is None else str(error.filename)
        return DiskError(
            f"cannot write: {error.strerror}", where=where, hint="free some space and run the command again"
        )
    line = next(iter(str(error).splitlines()), "")
    return EdgeError(
        f"this is a defect of ours: {type(error).__name__}: {line}",
        hint="run the same command with --debug and report what it prints",
    )


def _discard_stdout() -> None:
    """Sends what is still buffered to /dev/null, so that the interpreter's last flush is silent."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        return
