"""What a check costs a device without `cryptography`: ``python tests/benchmarks/update_cost.py``.

Prints seconds of an update and of an unchanged check (the health check apart), peak resident memory of the
process, and the size of the libraries of the extra `ota`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
DEVICE = """
import sys, time
from pathlib import Path

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cryptography":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
from edge_tcur_runtime.update.run import UpdateSettings, run_update
bundle, store, repo = map(Path, sys.argv[1:])
for what in ("update", "unchanged check", "unchanged check"):
    begin = time.perf_counter()
    result = run_update(bundle, store, UpdateSettings(url=str(repo)), health=lambda *_: "")
    print(f"{what}: {time.perf_counter() - begin:.3f} s, {result.requests} requests, {result.received} bytes")
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(f"peak resident memory: {int(peak.split()[1]) / 1024:.1f} MiB")
"""


def main(work: Path) -> None:
    environment = {**os.environ, "EDGE_TCUR_PASSPHRASE": "correct horse"}
    repo, bundle = str(work / "repo"), str(work / "bundle")
    shutil.copytree(DATA / "bundle-v1", bundle)
    adapter = str(DATA / "adapter-v1.safetensors")
    for command in (
        ["init", repo],
        ["trust", bundle, "--repo", repo],
        ["add", adapter, "--repo", repo, "--base", bundle],
    ):
        tool = [sys.executable, "-m", "edge_tcur", "publish", *command, "--quiet"]
        subprocess.run(tool, env=environment, check=True)
    subprocess.run([sys.executable, "-c", DEVICE, bundle, str(work / "store"), repo], check=True)
    sizes = {
        name: sum(Path(file.locate()).stat().st_size for file in files(name) or () if file.suffix != ".pyc")
        for name in ("tuf", "securesystemslib", "urllib3")
    }
    print(", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in sizes.items()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
