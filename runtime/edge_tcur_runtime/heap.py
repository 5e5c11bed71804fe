"""The C library's heap, told to give memory back at once."""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
THRESHOLD = 128 * 2**10  # bytes: where glibc begins, before it adapts


def give_back_at_once() -> bool:
    """Makes glibc map each block of 128 KiB and more by itself, so that it is given back when it is freed.

    Left alone, glibc raises that threshold to the largest block that was freed, up to 32 MiB, and keeps what
    lies between blocks in use: the peak of the same steps then differs from run to run.

    Returns:
        whether it could be set: on Linux with glibc only.
    """
    if not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION")
        return bool(library) and bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, THRESHOLD))
    except (OSError, ValueError, AttributeError):  # musl: no such name, or no such function
        return False
