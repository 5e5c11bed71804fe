"""A power cut during an update, on a loop-mounted ext4: after every block that the kernel wrote.

The disk's image is the one file of a small FUSE file system, served by a process of this test, which logs
every write in its order. The blocks of one update are then replayed one by one: each prefix is what a
power cut at that moment leaves. It is mounted (ext4 replays its journal), the device is started, and the
next update must finish by itself. Needs root, /dev/fuse and loop devices; elsewhere it is skipped.

``EDGE_TCUR_EVERY_BLOCK=1`` tries every block; without it every 12th, and the first and the last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import struct
import subprocess

import pytest

HEADER = struct.Struct("<IIQQIIIHH")  # fuse_in_header
ATTRIBUTES = struct.Struct("<6Q10I")  # fuse_attr
WRITE_HEADER = 40  # bytes of fuse_write_in
LOGGED = struct.Struct("<QI")  # offset and length, before the bytes
SIZE, BLOCK = 8 * 2**20, 1024  # ext4 chooses 1 KiB for so small a disk
NAME = "disk.img"
INIT, LOOKUP, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, OPENDIR = 26, 1, 3, 4, 14, 15, 16, 17, 27
DONE, NO_ANSWER = {18, 20, 25, 29, 34, 38}, {2, 36, 42}


class LoggedDisk:
    """Answers the kernel's requests for the one file, and logs what is written to it."""

    def __init__(self, image, log):
        self.image = os.open(image, os.O_RDWR)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def serve(self, descriptor):
        while True:
            try:
                raw = os.read(descriptor, 2**18)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, opcode, unique, node, *_ = HEADER.unpack_from(raw)
            if opcode in NO_ANSWER:
                continue
            code, answer = self.answer(opcode, node, raw[HEADER.size :])
            os.write(descriptor, struct.pack("<IiQ", 16 + len(answer), code, unique) + answer)

    def answer(self, opcode, node, body):
        offset, length = struct.unpack_from("<QI", body, 8) if opcode in (READ, WRITE) else (0, 0)
        if opcode == INIT:
            return 0, struct.pack("<4I2H2I2H8I", 7, 31, 65536, 0, 12, 9, 131072, 1, 0, 0, *[0] * 8)
        if opcode == LOOKUP and body.rstrip(b"\0") == NAME.encode():
            return 0, struct.pack("<4Q2I", 2, 0, 3600, 3600, 0, 0) + self.attributes(2)
        if opcode in (GETATTR, SETATTR):
            return 0, struct.pack("<Q2I", 3600, 0, 0) + self.attributes(node)
        if opcode in (OPEN, OPENDIR):
            return 0, struct.pack("<Q2I", 0, 0, 0)
        if opcode == READ:
            return 0, os.pread(self.image, length, offset)
        if opcode == WRITE:
            piece = body[WRITE_HEADER : WRITE_HEADER + length]
            os.pwrite(self.image, piece, offset)
            os.write(self.log, LOGGED.pack(offset, length) + piece)
            return 0, struct.pack("<2I", length, 0)
        if opcode == STATFS:
            return 0, struct.pack("<5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
        return (0 if opcode in DONE else -errno.ENOENT if opcode == LOOKUP else -errno.ENOSYS), b""

    def attributes(self, node):
        mode, length = (0o040755, 0) if node == 1 else (0o100600, SIZE)
        return ATTRIBUTES.pack(node, length, length // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@contextlib.contextmanager
def logged(image, place, log):
    """The image as a file in `place`, its writes logged."""
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"disk", os.fsencode(place), b"fuse", 0, options):
        os.close(descriptor)
        pytest.skip(f"no FUSE mounts here: {os.strerror(ctypes.get_errno())}")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            LoggedDisk(image, log).serve(descriptor)
        os._exit(0)
    os.close(descriptor)
    try:
        yield place / NAME
    finally:
        subprocess.run(["umount", place], check=True)
        os.waitpid(child, 0)


@contextlib.contextmanager
def mounted(image, place):
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop mounts here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def blocks(raw):
    """The logged writes as (offset, bytes) of one block each, in their order."""
    place = 0
    while place < len(raw):
        offset, length = LOGGED.unpack_from(raw, place)
        place += LOGGED.size
        for start in range(0, length, BLOCK):
            yield offset + start, raw[place + start : place + min(start + BLOCK, length)]
        place += length


@pytest.mark.timeout(900)
def test_a_power_cut_after_any_block_leaves_old_or_new(simulator, device, adapters, tmp_path):
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    image, log, outer, inner = (tmp_path / name for name in ("image", "log", "outer", "inner"))
    image.write_bytes(bytes(SIZE))
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), image], check=True)
    outer.mkdir()
    inner.mkdir()
    first = simulator.add(adapters[0])
    simulator.publish()
    device.store_path = inner / "store"
    with logged(image, outer, log) as file, mounted(file, inner):
        device.update(simulator)
        os.sync()
        before, begin = image.read_bytes(), log.stat().st_size
        second = simulator.add(adapters[1])
        simulator.publish()
        device.update(simulator)
        end = log.stat().st_size  # what is written later does not count: it was reported as done now
    written = list(blocks(log.read_bytes()[begin:end]))
    assert len(written) > 50
    step = 1 if os.environ.get("EDGE_TCUR_EVERY_BLOCK") else 12
    seen = []
    for count in sorted({*range(0, len(written), step), len(written)}):
        cut = bytearray(before)
        for offset, piece in written[:count]:
            cut[offset : offset + len(piece)] = piece
        (tmp_path / "cut").write_bytes(cut)
        with mounted(tmp_path / "cut", inner):
            assert device.active in (first.digest, second.digest), count
            device.store.load("active")
            seen.append(device.active)
            assert device.update(simulator).active == second.digest, count
    print(f"{len(written)} blocks, {len(seen)} cuts: {seen.count(first.digest)} old, "
          f"{seen.count(second.digest)} new")  # fmt: skip
    assert seen[0] == first.digest
    assert seen[-1] == second.digest  # what was reported as done is on the disk
    assert seen == sorted(seen, key=(first.digest, second.digest).index)  # no way back in between
