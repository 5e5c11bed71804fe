"""Kills a real `edge-tcur-device update` at every system call that changes a disk.

``python tests/benchmarks/update_kill.py``: strace injects SIGKILL at the n-th call of each kind. After every
kill the store must answer with the old or the new adapter, and the next update must end on the new one by
itself. Prints one line for each kind of call.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from edge_tcur_runtime.formats.adapter import Adapter, parse_adapter, serialize_adapter
from edge_tcur_runtime.store import Store

DATA = Path(__file__).parents[1] / "data"
KINDS = ("write", "fsync", "rename", "unlink", "symlink", "mkdir", "ftruncate", "flock")


def tool(module: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "EDGE_TCUR_PASSPHRASE": "correct horse", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main(work: Path) -> int:
    repo, bundle, store = work / "repo", work / "bundle", work / "store"
    shutil.copytree(DATA / "bundle-v1", bundle)
    tool("edge_tcur", "publish", "init", repo)
    tool("edge_tcur", "publish", "trust", bundle, "--repo", repo)
    adapter = parse_adapter((DATA / "adapter-v1.safetensors").read_bytes())
    update = ("update", bundle, "--store", store, "--url", repo, "--quiet")
    digests = []
    for number in range(2):
        scaled = {
            n: f.with_core((f.core * (1 + number / 1000)).astype(np.float32))
            for n, f in adapter.factors.items()
        }
        (work / "a.safetensors").write_bytes(
            serialize_adapter(Adapter(adapter.header, scaled, adapter.extras))
        )
        added = tool("edge_tcur", "publish", "add", work / "a.safetensors", "--repo", repo, "--base", bundle)
        assert added.returncode == 0, added.stderr
        if number == 0:
            done = tool("edge_tcur_runtime", *update)
            assert done.returncode == 0, done.stderr
            digests.append(Store.open(store).active_digest())
            shutil.copytree(store, work / "saved", symlinks=True)
    trace = work / "trace"
    kinds = ",".join(KINDS)
    done = tool(
        "edge_tcur_runtime", *update, prefix=("strace", "-f", "-o", str(trace), "-e", f"trace={kinds}")
    )
    assert done.returncode == 0, done.stderr
    digests.append(Store.open(store).active_digest())
    assert digests[0] != digests[1]
    lines = trace.read_text().splitlines()
    total = 0
    for kind in KINDS:
        count = sum(1 for line in lines if re.search(rf"\b{kind}\(", line))
        after = {"old": 0, "new": 0}
        for number in range(1, count + 1):
            shutil.rmtree(store)
            shutil.copytree(work / "saved", store, symlinks=True)
            inject = ("strace", "-f", "-o", "/dev/null", "-e", f"inject={kind}:signal=SIGKILL:when={number}")
            tool("edge_tcur_runtime", *update, prefix=inject)
            active = Store.open(store).active_digest()
            assert active in digests, (kind, number, active)
            Store.open(store).load("active")
            after["old" if active == digests[0] else "new"] += 1
            done = tool("edge_tcur_runtime", *update)
            assert done.returncode == 0, (kind, number, done.stderr)
            assert Store.open(store).active_digest() == digests[1], (kind, number)
        total += count
        print(f"{kind}: {count} kills, {after['old']} old, {after['new']} new, all recovered", flush=True)
    print(f"{total} kills")
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder)))
