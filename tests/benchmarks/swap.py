"""What a change of adapter takes, and whether anybody notices: ``python tests/benchmarks/swap.py BUNDLE``.

With ``--run RUN`` the bundle is exported from a run first. Eight adapters like the bundle's own, with cores
of their own, are written to files. Three kinds of swaps are timed, each from one adapter to another:

- from its file: the file is opened and read, header, digest, schema and values and its fit to the bundle are
  checked, and what the model feeds is replaced (`read_adapter` and `Model.attach`)
- by name: ``with model.adapter(name)``; the adapter was verified and its canary run when it was loaded
- load: from its file as above, and one run of the model on the bundle's canary (`Model.load`)

The first is the swap "including verification". Then eight threads answer requests without a pause while one
more swaps from files, and again with an adapter of their own each, by name. An answer that is not, bit for
bit, that of one of the adapters (by name: of its own) is a mixture. While all cores are busy the clock says
mostly how long the operating system kept a thread waiting, so the swap's own processor time is printed too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edge_tcur_runtime.feeds import check_fit
from edge_tcur_runtime.formats.adapter import (
    MAX_FILE_BYTES,
    parse_adapter,
    read_adapter,
    read_bounded,
    write_adapter,
)
from edge_tcur_runtime.formats.bundle import Bundle, open_bundle
from edge_tcur_runtime.predict import Model

ADAPTERS = 8
THREADS = 8


def write_adapters(bundle: Bundle, folder: Path) -> list[Path]:
    """Files of adapters whose cores are unlike each other's."""
    own = read_adapter(bundle.path(bundle.manifest.adapter or ""))
    paths = []
    for seed in range(ADAPTERS):
        generator = np.random.default_rng(seed)
        factors = {
            name: part.with_core(generator.normal(scale=0.2, size=part.core.shape).astype(np.float32))
            for name, part in own.factors.items()
        }
        paths.append(folder / f"{seed}.safetensors")
        write_adapter(paths[-1], replace(own, factors=factors))
    return paths


def timed(
    swap: Callable[[int], object], count: int, clock: Callable[[], float] = time.perf_counter
) -> np.ndarray:
    """Seconds of each of `count` swaps."""
    seconds = np.empty(count)
    for number in range(count):
        began = clock()
        swap(number)
        seconds[number] = clock() - began
    return seconds


def report(what: str, seconds: np.ndarray) -> None:
    """Prints the median, the 99th percentile and the slowest, in milliseconds."""
    median, slow, slowest = (float(np.percentile(seconds, part)) * 1e3 for part in (50, 99, 100))
    line = f"p50 {median:8.3f} ms   p99 {slow:8.3f} ms   slowest {slowest:8.3f} ms"
    sys.stdout.write(f"{what:44}{line}   ({len(seconds)})\n")


def time_swaps(model: Model, paths: list[Path], count: int) -> None:
    """Prints the three kinds of swaps, and the parts of the first."""
    manifest, raws = model.bundle.manifest, [path.read_bytes() for path in paths]
    adapters = [read_adapter(path) for path in paths]
    for number, adapter in enumerate(adapters):
        model.load(str(number), adapter)

    def by_name(number: int) -> None:
        with model.adapter(str(number % ADAPTERS)):
            pass

    ways: Mapping[str, Callable[[int], object]] = {
        "from its file": lambda number: model.attach(read_adapter(paths[number % ADAPTERS])),
        "  reading": lambda number: read_bounded(paths[number % ADAPTERS], MAX_FILE_BYTES),
        "  header, digest, schema and values": lambda number: parse_adapter(raws[number % ADAPTERS]),
        "  fit to the bundle": lambda number: check_fit(manifest, adapters[number % ADAPTERS]),
        "by name": by_name,
        "load (with a canary)": lambda number: model.load("new", read_adapter(paths[number % ADAPTERS])),
    }
    for what, swap in ways.items():
        timed(swap, 20)
        report(what, timed(swap, count if "canary" not in what else min(count, 200)))


def known_answers(model: Model, paths: list[Path], inputs: Mapping[str, np.ndarray]) -> list[bytes]:
    """What each adapter answers, bit for bit."""
    known = []
    for path in paths:
        model.attach(read_adapter(path))
        known.append(model.outputs(inputs).tobytes())
    assert len(set(known)) == len(known)
    return known


@dataclass
class Requests:
    """What eight threads saw: how many requests, how many failed, how many answers were no adapter's."""

    asked: int = 0
    failed: int = 0
    mixed: int = 0


def answer(
    model: Model, inputs: Mapping[str, np.ndarray], name: str | None, known: set[bytes], stop: threading.Event
) -> Requests:
    """Requests of one thread until it is stopped."""
    found = Requests()
    while not stop.is_set():
        found.asked += 1
        try:
            with nullcontext() if name is None else model.adapter(name):
                found.mixed += model.outputs(inputs).tobytes() not in known
        except Exception:  # noqa: BLE001
            found.failed += 1
    return found


def under_load(model: Model, paths: list[Path], inputs: Mapping[str, np.ndarray], seconds: float) -> None:
    """Prints requests, failures and mixtures of eight threads, and what the swaps took meanwhile."""
    known = known_answers(model, paths, inputs)
    for by_name in (False, True):
        stop = threading.Event()
        spent: dict[str, list[np.ndarray]] = {"clock": [], "processor": []}
        clocks = {"clock": time.perf_counter, "processor": time.thread_time}
        with ThreadPoolExecutor(THREADS) as pool:
            tasks = []
            for n in range(THREADS):
                mine = {known[n]} if by_name else set(known)
                tasks.append(pool.submit(answer, model, inputs, str(n) if by_name else None, mine, stop))
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for kind, clock in clocks.items():
                    spent[kind].append(timed(lambda n: model.attach(read_adapter(paths[n])), ADAPTERS, clock))
                    time.sleep(0.002)
            stop.set()
        results = [task.result() for task in tasks]
        asked, failed, mixed = (
            sum(getattr(one, name) for one in results) for name in ("asked", "failed", "mixed")
        )
        what = "each with its own, by name" if by_name else "one adapter for all"
        sys.stdout.write(f"{THREADS} threads, {what}: {asked} requests, {failed} failed, {mixed} mixed\n")
        for kind, values in spent.items():
            report(f"  from its file, meanwhile, {kind}", np.concatenate(values))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--run", type=Path, help="a run to export first")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part under load")
    options = parser.parse_args()
    with TemporaryDirectory() as work:
        root = options.bundle
        if options.run is not None:
            root = Path(work) / "bundle"
            command = [sys.executable, "-m", "edge_tcur", "export", str(options.run), "--out", str(root)]
            subprocess.run([*command, "--target", "onnx", "--quiet"], check=True)
        if root is None:
            parser.error("say a bundle, or --run")
        bundle = open_bundle(root)
        paths = write_adapters(bundle, Path(work))
        ranks = sorted({group.rank for group in bundle.manifest.groups.values()})
        sys.stdout.write(f"adapters of {paths[0].stat().st_size} bytes, rank {ranks}\n")
        model = Model(bundle, threads=1)
        time_swaps(model, paths, options.count)
        sizes = {"batch": 1, "sequence": 8}
        inputs = {
            name: np.ones([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
            for name, spec in bundle.manifest.inputs.items()
        }
        under_load(model, paths, inputs, options.seconds)


if __name__ == "__main__":
    main()
