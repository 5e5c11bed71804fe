"""Exit codes, the JSON error object, and help that imports nothing heavy."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import click
import pytest

from edge_tcur_runtime import __version__
from edge_tcur_runtime.cli import COMMANDS, device
from edge_tcur_runtime.cli.framework import (
    EXISTING_FILE,
    HELP_NAMES,
    SIZE,
    LazyGroup,
    output_options,
    run,
    store_option,
)
from edge_tcur_runtime.errors import BudgetError, DataError, EdgeError, IntegrityError
from edge_tcur_runtime.output import Mode, Sink

HEAVY = ("numpy", "onnxruntime", "safetensors", "torch", "edge_tcur_runtime.store")


def tool(action=lambda: None):
    """A tool with one command `act` that runs `action`."""

    @click.group("tool", context_settings=HELP_NAMES)
    def group():
        """A tool."""

    @group.command()
    @click.option("--size", type=SIZE)
    @click.option("--file", type=EXISTING_FILE)
    @output_options
    def act(size, file, sink):
        action()
        sink.result({"size": size}, f"size {size}")

    return group


def outcome(capsys, group, *arguments):
    """Exit code, stdout and stderr of a run."""
    with pytest.raises(SystemExit) as caught:
        run(group, list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def raising(error):
    def action():
        raise error

    return tool(action)


def test_a_result_in_three_modes(capsys):
    assert outcome(capsys, tool(), "act", "--size", "1KiB") == (0, "size 1024\n", "")
    code, out, err = outcome(capsys, tool(), "act", "--size", "1KiB", "--json")
    assert (code, json.loads(out), err) == (0, {"schema_version": 1, "size": 1024}, "")
    assert outcome(capsys, tool(), "act", "--quiet") == (0, "", "")


def test_a_number_that_is_none_is_null_in_json(capsys):
    """Python writes NaN and Infinity, which are no JSON: other readers refuse the whole object."""
    Sink(Mode.JSON).result({"losses": [1.0, float("nan"), (float("-inf"),)], "a": {"b": float("inf")}}, "")
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert found == {"schema_version": 1, "losses": [1.0, None, [None]], "a": {"b": None}}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("bad", where="a.csv:3", hint="fix it"), 3),
        (BudgetError("too little"), 5),
        (IntegrityError("altered"), 6),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 7),
        (OSError(errno.EROFS, "Read-only file system"), 7),
        (click.FileError("x", "gone"), 3),
        (ValueError("boom\nsecond line"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (SystemExit(9), 9),
        (click.exceptions.Exit(4), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_exception_has_its_exit_code_and_no_traceback(capsys, error, code):
    actual, out, err = outcome(capsys, raising(error), "act")
    assert actual == code
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


def test_an_error_shows_its_place_and_hint(capsys):
    _, _, err = outcome(capsys, raising(DataError("bad", where="a.csv:3", hint="fix it")), "act")
    assert err == "error: a.csv:3: bad\n  hint: fix it\n"


def test_an_error_is_one_json_object_with_json(capsys):
    error = DataError("bad", where="a.csv:3", hint="fix it")
    code, out, err = outcome(capsys, raising(error), "act", "--json")
    assert code == 3
    assert json.loads(out) == {"schema_version": 1, "error": error.to_dict()}
    assert "a.csv:3: bad" in err


def test_a_defect_is_ours_and_one_line(capsys):
    code, out, err = outcome(capsys, raising(ValueError("boom\nsecond line")), "act", "--json")
    shown = json.loads(out)["error"]
    assert (code, shown["code"], shown["exit_code"]) == (1, "error", 1)
    assert shown["message"] == "this is a defect of ours: ValueError: boom"
    assert "second line" not in err
    assert "--debug" in err


@pytest.mark.parametrize("error", [ValueError("boom"), EdgeError("known"), BudgetError("too little")])
def test_debug_adds_the_traceback(capsys, error):
    _, _, err = outcome(capsys, raising(error), "act", "--debug")
    assert "Traceback (most recent call last)" in err
    assert "in action" in err


def test_an_interrupt_is_one_line(capsys):
    assert outcome(capsys, raising(KeyboardInterrupt()), "act", "--json") == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("act", "--size", "1MB"), "write a number with a binary unit"),
        (("act", "--file", "/no/such/file"), "does not exist"),
        (("act", "--nope"), "--nope"),
        (("nope",), "nope"),
        (("act", "surplus"), "surplus"),
        (("act", "--json", "--quiet"), "contradict"),
    ],
)
def test_usage_errors_exit_with_2_in_both_modes(capsys, arguments, message):
    code, out, err = outcome(capsys, tool(), *arguments)
    assert code == 2
    assert message in err
    assert (out == "") == ("--json" not in arguments)
    code, out, err = outcome(capsys, tool(), *arguments, "--json")
    shown = json.loads(out)["error"]
    assert (code, shown["code"], shown["exit_code"]) == (2, "usage", 2)
    assert message in shown["message"] + str(shown["hint"])


def test_what_follows_two_dashes_is_no_option(capsys):
    code, out, _ = outcome(capsys, tool(), "act", "--", "--json")
    assert (code, out) == (2, "")


def test_a_size_that_is_an_integer_already_is_kept():
    assert SIZE.convert(7, None, None) == 7


def test_the_sink_has_the_chosen_mode():
    seen = []

    @click.command()
    @output_options
    @store_option
    def command(sink, store):
        seen.append((sink.mode, str(store)))

    for arguments in ([], ["--json"], ["--quiet", "--store", "here"]):
        command.main(arguments, standalone_mode=False)
    assert [mode for mode, _ in seen] == [Mode.HUMAN, Mode.JSON, Mode.QUIET]
    assert seen[2][1] == "here"


def test_the_store_comes_from_the_option_then_the_environment_then_home(monkeypatch, tmp_path):
    @click.command()
    @store_option
    def command(store):
        return str(store)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EDGE_TCUR_STORE", raising=False)
    assert command.main([], standalone_mode=False) == str(tmp_path / ".local/share/edge-tcur")
    monkeypatch.setenv("EDGE_TCUR_STORE", "/from/env")
    assert command.main([], standalone_mode=False) == "/from/env"
    assert command.main(["--store", "/given"], standalone_mode=False) == "/given"


def test_a_lazy_group_imports_a_command_when_it_runs(capsys, tmp_path, monkeypatch):
    (tmp_path / "lazy_one.py").write_text(
        "import click\n@click.command()\ndef one():\n    'Long help.'\n    click.echo('ran')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table = {"one": ("lazy_one", "one", "The first."), "two": ("no_such_module", "two", "The second.")}

    @click.group("lazy", cls=LazyGroup, table=table)
    def lazy():
        """Lazy."""

    @lazy.command()
    def three():
        """The third."""

    code, out, _ = outcome(capsys, lazy, "--help")
    assert code == 0
    listed = [line.split() for line in out.partition("Commands:\n")[2].splitlines()]
    assert listed == [["one", "The", "first."], ["two", "The", "second."], ["three", "The", "third."]]
    assert "lazy_one" not in sys.modules
    assert outcome(capsys, lazy, "one") == (0, "ran\n", "")
    assert outcome(capsys, lazy, "three") == (0, "", "")
    assert outcome(capsys, lazy, "two")[0] == 1
    assert outcome(capsys, lazy, "four")[0] == 2


def test_a_group_without_a_command_shows_its_help(capsys):
    code, out, err = outcome(capsys, device)
    assert code in (0, 2)  # by the version of click
    assert "Commands:" in out + err


# --- the device's tool ---------------------------------------------------------------------------


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120, **options
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["adapters", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom edge_tcur_runtime.cli import device\n"
        "from edge_tcur_runtime.cli.framework import run\n"
        f"try:\n    run(device, {arguments!r})\nfinally:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_the_tool_lists_its_commands_and_examples(capsys):
    code, out, _ = outcome(capsys, device, "--help")
    assert code == 0
    for name, (_, _, short) in COMMANDS.items():
        assert name in out
        assert short in " ".join(out.split())
    assert out.count("  edge-tcur-device ") >= 3


def test_the_version(capsys):
    assert outcome(capsys, device, "--version") == (0, f"edge-tcur-device, version {__version__}\n", "")


def test_python_m_runs_the_tool():
    done = python("-m", "edge_tcur_runtime", "--version")
    assert (done.returncode, done.stdout) == (0, f"edge-tcur-device, version {__version__}\n")


def test_a_full_disk_behind_stdout_is_a_disk_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edge_tcur_runtime", "adapters", "list", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 7
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "edge_tcur_runtime", "--help"],
            stdout=pipe, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")
