"""Old-or-new file replacement: a reader sees the old content or the new, never a part.

Write to a temporary file in the same directory, fsync it, rename it over the target, fsync the
directory. After a failed fsync the descriptor is never retried (the kernel may have dropped the
dirty pages): the temporary file is removed and the caller starts over with a new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from edge_tcur_runtime.errors import BadInputError, DiskError

_LOCK_PAUSE = 0.02  # seconds between two tries
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def disk_error(error: OSError, path: Path) -> DiskError:
    """The user-facing form of a failed write to `path`."""
    reason = error.strerror or str(error)
    hint = "free some space and run the command again"
    if error.errno == errno.EROFS:
        hint = "the file system is read-only: mount it writable, or choose another directory"
    elif error.errno not in _DISK_ERRNOS:
        hint = "check that the directory exists and that you may write to it"
    return DiskError(f"cannot write: {reason}", where=str(path), hint=hint)


def fsync_directory(directory: Path) -> None:
    """Makes a rename inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Removes a directory and all in it, where there is one; DiskError where it cannot."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise disk_error(error, folder) from error


@contextlib.contextmanager
def exclusive_lock(path: Path, busy: str, *, seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock file at `path`, made where it is missing; the kernel lets go of it when a process ends.

    Args:
        path: the lock file; it is never removed.
        busy: what to say where another process holds it.
        seconds: how long to wait for that process.

    Raises:
        BadInputError: still held by another one.
        DiskError: it cannot be made, or this file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise disk_error(error, path) from error
    with os.fdopen(descriptor) as file:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    hint = "wait until it has finished"
                    raise BadInputError(busy, where=str(path.parent), hint=hint) from error
                time.sleep(_LOCK_PAUSE)
            except OSError as error:
                raise disk_error(error, path) from error
        yield


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replaces the file at `path` by `content` (bytes), old or new.

    Args:
        path: the target; its directory must exist.
        content: the whole new content.
        mode: permission bits; personal adapters use ``0o600``.

    Raises:
        DiskError: the disk is full, read-only, failing or not writable. `path` is old or new, always
            whole: when only the last fsync of the directory failed, the new content is already there.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, path) from error
