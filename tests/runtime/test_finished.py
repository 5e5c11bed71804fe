"""A run that has ended is known for it: killed at any call of its end, it is not trained again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.checkpoint import FINISHED
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.ending import Ending
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.errors import DiskError, EdgeError, IntegrityError
from edge_tcur_runtime.finished import (
    NOTE,
    Finished,
    parse_finished,
    recall_finished,
    record_finished,
    serialize_finished,
)
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.settings import KeepSettings
from edge_tcur_runtime.store import Store

DATA = Path(__file__).parents[1] / "data"
V1, USER, ADAPTER = DATA / "bundle-v1", DATA / "user.npz", DATA / "adapter-v1.safetensors"
INSTALLED = find_onnxruntime()
needs_engine = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")
CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir")
KILLED = 9


class Stopped(BaseException):
    """Before the end of the command."""


@pytest.fixture
def personalize(capsys):
    """The command in this process; two private epochs, which nothing judges: the adapter always takes the
    place of the one that the run started from."""

    def call(store, *more):
        arguments = [
            "personalize", str(V1), "--data", str(USER), "--store", str(store), "--engine", "ort-step",
            "--threads", "1", "--epochs", "2", "--batch-size", "40", "--private", "--json", *more,
        ]  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(device, arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == 0, err
        (line,) = out.splitlines()
        return json.loads(line), err

    return call


def trained(personalize, store, monkeypatch, *more):
    """A run that stands before its end: the `Ending`, and what it is about to put away."""
    found = []

    def stop(self, *arguments):
        found.append((self, arguments))
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Ending, "put_away", stop)
        with pytest.raises(Stopped):
            personalize(store, *more)
    return found[0]


def in_a_copy(source, ending, target):
    shutil.copytree(source, target)
    keep = replace(ending.keep, directory=target / ending.keep.directory.relative_to(source))
    return replace(ending, store=target, keep=keep)


def killed_at(number, ending, arguments):
    """The exit code of a process of its own that ends the run and is killed before call `number`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [number]

    def counted(real):
        def call(*given, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return real(*given, **options)

        return call

    try:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        ending.sink.result = lambda *_: None
        ending.put_away(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


@needs_engine
@pytest.mark.parametrize(("start", "every"), [("active", 1), ("base", 4)])
def test_killed_at_any_call_of_its_end_a_run_is_not_trained_twice(
    tmp_path, personalize, monkeypatch, start, every
):
    """Its private data is spent once, and the same adapter is in use."""
    source = tmp_path / "source"
    ending, arguments = trained(personalize, source, monkeypatch, "--start", start)
    expected, number, notes = arguments[1], 1 - every, 0
    while True:
        number += every
        target = tmp_path / str(number)
        code = killed_at(number, in_a_copy(source, ending, target), arguments)
        assert code in (0, KILLED)
        if code == 0:
            break
        if not any(path.is_file() for path in (target / "checkpoints").rglob("*")):
            continue  # the result had been printed, and nothing is left to know the run by
        result, err = personalize(target, "--start", start)
        assert result["installed"] == expected["installed"], number
        assert result["privacy"] == expected["privacy"]
        assert result["losses"] == expected["losses"]
        store = Store.open(target, create=False)
        assert store.active_digest() == store.resolve("personal") == expected["installed"]
        assert len(store.list()) == 1
        assert not (target / "checkpoints").exists()
        notes += NOTE in err
        assert (NOTE in result["notes"]) == (NOTE in err)
    assert number > 15
    assert notes > 1
    again, _ = personalize(tmp_path / "1")  # asked for anew it trains on
    assert again["installed"] != expected["installed"]
    assert again["privacy"]["total_epsilon"] > expected["privacy"]["total_epsilon"]


@needs_engine
def test_another_run_finds_no_checkpoint_of_one_that_has_ended(tmp_path, personalize, monkeypatch):
    """It is not told that a checkpoint is given up: that adapter is installed."""
    ending, arguments = trained(personalize, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("edge_tcur_runtime.cli.ending.clear_checkpoints", lambda _: None)
        ending.put_away(*arguments)
    assert (ending.keep.directory / FINISHED).is_file()
    result, err = personalize(tmp_path, "--seed", "1")
    assert NOTE not in err
    assert not [note for note in result["notes"] if "given up" in note]
    assert result["installed"] != arguments[1]["installed"]


@needs_engine
@pytest.mark.parametrize("damage", ["record", "adapter", "asked"])
def test_what_did_not_arrive_or_cannot_be_read_goes_on_from_its_checkpoint(
    tmp_path, personalize, monkeypatch, damage
):
    ending, arguments = trained(personalize, tmp_path, monkeypatch, "--start", "base")
    with monkeypatch.context() as patch:
        patch.setattr("edge_tcur_runtime.cli.ending.clear_checkpoints", lambda _: None)
        ending.put_away(*arguments)
    more = ()
    if damage == "record":
        (ending.keep.directory / FINISHED).write_bytes(b"{}")
    elif damage == "adapter":
        (path,) = (tmp_path / "adapters").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
    else:
        more = ("--resume", "no")
    result, err = personalize(tmp_path, "--start", "base", *more)
    assert NOTE not in err
    assert (result["resumed_from"] > 0) == (damage != "asked")
    assert (result["installed"] == arguments[1]["installed"]) == (damage != "asked")  # else other noise
    assert not (tmp_path / "checkpoints").exists()


@needs_engine
def test_checkpoints_that_cannot_be_removed_do_not_hide_the_result(tmp_path, personalize, monkeypatch):
    def fail(_):
        raise DiskError("cannot write", where="here")

    with monkeypatch.context() as patch:
        patch.setattr("edge_tcur_runtime.cli.ending.clear_checkpoints", fail)
        first, err = personalize(tmp_path)
    assert "the checkpoints could not be removed" in err
    second, err = personalize(tmp_path)
    assert NOTE in err
    assert second["installed"] == first["installed"]
    assert not (tmp_path / "checkpoints").exists()


# --- the record -------------------------------------------------------------------------------------------

IDENTITY = {"base": "b", "start": "s", "data": "d"}
TEXTS = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4), TEXTS)
def test_what_is_written_reads_back(result, report):
    """But for numbers that are none, which JSON prints as null too."""
    finished = Finished("sha256:0", IDENTITY, result, report)
    found = parse_finished(raw := serialize_finished(finished), "here")
    assert (found.digest, found.identity, found.report) == ("sha256:0", IDENTITY, report)
    assert serialize_finished(found) == raw


def test_a_changed_byte_is_never_taken():
    raw = serialize_finished(Finished("sha256:0", IDENTITY, {"losses": [0.5]}, "installed"))
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1
        with pytest.raises(EdgeError):
            parse_finished(bytes(changed), "here")
    with pytest.raises(IntegrityError):
        parse_finished(raw.replace(b"0.5", b"0.6"), "here")
    with pytest.raises(EdgeError, match="version 2 is newer"):
        parse_finished(raw.replace(b'"format_version": 1', b'"format_version": 2'), "here")


@pytest.mark.parametrize("start", ["s", "made"])
def test_a_run_is_the_same_from_its_start_and_from_what_it_made(start):
    finished = Finished("made", IDENTITY, {}, "")
    assert finished.is_of({**IDENTITY, "start": start})
    assert not finished.is_of({**IDENTITY, "start": start, "data": "other"})
    assert not finished.is_of({**IDENTITY, "start": "other"})
    assert not Finished("made", {}, {}, "").is_of(IDENTITY)


def test_a_record_alone_is_recalled_and_removed(tmp_path):
    """The checkpoints were removed, and then the process was killed."""
    keep, store = KeepSettings(tmp_path / "checkpoints" / "personal"), Store.open(tmp_path)
    digest = store.install(ADAPTER.read_bytes())
    finished = Finished(digest, IDENTITY, {"losses": [0.5]}, "installed")
    record_finished(keep, finished)
    assert recall_finished(keep, IDENTITY, tmp_path, in_use=True) is None  # installed, not in use yet
    assert recall_finished(keep, IDENTITY, tmp_path, in_use=False) == finished
    assert not keep.directory.exists()
    assert recall_finished(keep, IDENTITY, tmp_path, in_use=False) is None
