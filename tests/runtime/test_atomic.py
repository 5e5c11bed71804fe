"""Old or new: at every cut of `write_atomic`, and in every disk image that a power cut may leave."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from edge_tcur_runtime.atomic import disk_error, write_atomic
from edge_tcur_runtime.errors import DiskError

CALLS = ("open", "write", "fsync", "replace")
OLD, NEW = b"old content", b"new content, longer than the old one"


class Cut(BaseException):
    """The process is killed: no handler of the code under test runs."""


class Cutter:
    """Fails the n-th call of the named functions of `os`: before it (or after it) takes effect."""

    def __init__(self, monkeypatch, number, error, *, after=False):
        self.count, self.number, self.error, self.after = 0, number, error, after
        self.trace = []
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def call(*arguments, **options):
            self.count += 1
            hit = self.count == self.number
            if hit and not self.after:
                raise self.error
            result = real(*arguments, **options)
            self.trace.append((name, arguments, result))
            if hit:
                raise self.error
            return result

        return call


def calls_of_one_write(path):
    with pytest.MonkeyPatch.context() as patch:
        cutter = Cutter(patch, 0, Cut())
        write_atomic(path, NEW)
    path.write_bytes(OLD)
    return cutter.count


def test_the_order_is_write_sync_rename_sync_directory(tmp_path, monkeypatch):
    cutter = Cutter(monkeypatch, 0, Cut())
    write_atomic(tmp_path / "file", NEW)
    assert [name for name, _, _ in cutter.trace] == ["open", "write", "fsync", "replace", "open", "fsync"]
    assert cutter.trace[0][1][0].parent == tmp_path  # the same file system as the target
    assert cutter.trace[4][1][0] == tmp_path


def test_the_content_and_mode_are_new_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    write_atomic(path, NEW, mode=0o600)
    assert path.read_bytes() == NEW
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_failed_call_leaves_old_or_new_and_no_leftover(tmp_path, code):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    count = calls_of_one_write(path)
    assert count == 6
    for number in range(1, count + 1):
        path.write_bytes(OLD)
        with pytest.MonkeyPatch.context() as patch:
            cutter = Cutter(patch, number, OSError(code, os.strerror(code)))
            with pytest.raises(DiskError, match=os.strerror(code)) as caught:
                write_atomic(path, NEW)
        renamed = any(name == "replace" for name, _, _ in cutter.trace)
        assert path.read_bytes() == (NEW if renamed else OLD)
        assert os.listdir(tmp_path) == ["file"]
        assert caught.value.hint


@pytest.mark.parametrize("after", [False, True])
def test_a_killed_process_leaves_old_or_new(tmp_path, after):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    for number in range(1, calls_of_one_write(path) + 1):
        path.write_bytes(OLD)
        with pytest.MonkeyPatch.context() as patch:
            cutter = Cutter(patch, number, Cut(), after=after)
            with pytest.raises(Cut):
                write_atomic(path, NEW)
        renamed = any(name == "replace" for name, _, _ in cutter.trace)
        assert path.read_bytes() == (NEW if renamed else OLD)
        write_atomic(path, NEW)
        assert path.read_bytes() == NEW


def possible_images(trace):
    """What may lie under the target's name after a power cut that follows the calls of `trace`.

    The model: written data are safe only after an fsync of their file (else any part of them may be
    there, or nothing), a rename only after an fsync of the directory.
    """
    data, synced, renamed, durable = b"", False, False, False
    for name, arguments, result in trace:
        if name == "write":
            data, synced = data + bytes(arguments[1])[:result], False
        elif name == "fsync":
            durable, synced = durable or renamed, True
        elif name == "replace":
            renamed = True
    images = set() if durable else {OLD}
    if renamed:
        images |= {data} if synced else {data, b"", data[: len(data) // 2]}
    return images


def test_a_power_cut_leaves_old_or_new_and_new_after_the_return(tmp_path, monkeypatch):
    cutter = Cutter(monkeypatch, 0, Cut())
    write_atomic(tmp_path / "file", NEW)
    for end in range(len(cutter.trace)):
        assert possible_images(cutter.trace[:end]) <= {OLD, NEW}
    assert possible_images(cutter.trace) == {NEW}


def test_the_model_of_a_power_cut_catches_a_missing_fsync(tmp_path, monkeypatch):
    cutter = Cutter(monkeypatch, 0, Cut())
    write_atomic(tmp_path / "file", NEW)
    first_sync = next(i for i, (name, _, _) in enumerate(cutter.trace) if name == "fsync")
    trace = cutter.trace[:first_sync] + cutter.trace[first_sync + 1 :]
    assert any(not possible_images(trace[:end]) <= {OLD, NEW} for end in range(len(trace)))


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_atomic(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


def test_an_empty_file_can_be_written(tmp_path):
    write_atomic(tmp_path / "file", b"")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_missing_directory_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match="No such file") as caught:
        write_atomic(tmp_path / "missing" / "file", NEW)
    assert caught.value.where == str(tmp_path / "missing" / "file")
    assert "directory exists" in caught.value.hint


def test_a_read_only_file_system_is_not_told_to_free_space(tmp_path):
    error = disk_error(OSError(errno.EROFS, os.strerror(errno.EROFS)), tmp_path)
    assert "read-only" in error.hint
    assert "free some space" not in error.hint
