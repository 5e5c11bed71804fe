"""From the start of a process to its first answer: ``python tests/benchmarks/start.py BUNDLE``.

Each round is a fresh process that imports the runtime, opens the bundle (every file's digest is computed),
loads the model (session, tokenizer, canary of the base) and the bundle's adapter (with its canary), and
answers one sample. Both processes read one clock, so the start of the interpreter is counted. Printed are
medians of what each part takes, and of the whole with its range and processor time; then the time of an
answer later on, and the peak of memory. ``--prepack`` is that of `Model`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PARTS = ("interpreter", "import", "open bundle", "model", "adapter", "answer")
LATER = 30  # answers after the first one
TEXT = "turn the lights off in the kitchen, please"


def run_child(root: Path, began: float, prepack: bool) -> None:
    """Prints the seconds of each part as JSON."""
    marks = [began, time.monotonic()]
    from edge_tcur_runtime.budget import read_memory
    from edge_tcur_runtime.engines.session import import_onnxruntime
    from edge_tcur_runtime.formats.adapter import read_adapter
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.predict import Model

    import_onnxruntime()
    marks.append(time.monotonic())
    bundle = open_bundle(root)
    marks.append(time.monotonic())
    model = Model(bundle, prepack=prepack)
    marks.append(time.monotonic())
    model.load("own", read_adapter(bundle.path(bundle.manifest.adapter or "")))
    marks.append(time.monotonic())
    sample = [TEXT] if model.task.kind == "text" else _picture(bundle.manifest.preprocessing)
    later = []
    with model.adapter("own"):
        model.predict(sample)
        marks.append(time.monotonic())
        processor = time.process_time()
        for _ in range(LATER):
            started = time.monotonic()
            model.predict(sample)
            later.append(time.monotonic() - started)
    parts = [after - before for before, after in pairwise(marks)]
    found = {"parts": parts, "processor": processor, "later": median(later), "peak": read_memory().peak}
    sys.stdout.write(json.dumps(found) + "\n")


def _picture(spec: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    sides = [spec[name] for name in ("depth", "height", "width") if name in spec]
    return np.zeros((1, *sides, *([spec["channels"]] if spec["channels"] > 1 else [])), np.uint8)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prepack", action="store_true", help="hold the weights packed as well")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.bundle, options.child, options.prepack)
        return
    found = []
    for _ in range(options.rounds + 1):
        command = [sys.executable, __file__, str(options.bundle), "--child", str(time.monotonic())]
        command += ["--prepack"] * options.prepack
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    found = found[1:]  # the first one reads the files from the disk
    for place, part in enumerate(PARTS):
        sys.stdout.write(f"{part:16}{median(one['parts'][place] for one in found):8.3f} s\n")
    totals = [sum(one["parts"]) for one in found]
    sys.stdout.write(f"{'all':16}{median(totals):8.3f} s   from {min(totals):.3f} to {max(totals):.3f} s\n")
    sys.stdout.write(f"{'processor':16}{median(one['processor'] for one in found):8.3f} s\n")
    sys.stdout.write(f"{'later answers':16}{median(one['later'] for one in found) * 1e3:8.1f} ms\n")
    sys.stdout.write(f"{'peak':16}{median(one['peak'] for one in found) / 2**20:8.1f} MiB\n")


if __name__ == "__main__":
    main()
