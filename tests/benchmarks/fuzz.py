"""Mutated adapter files against the reader: ``python tests/benchmarks/fuzz.py --count 1000000``.

What is done to the files: ``tests/runtime/mutants.py``; how it is known what must become of each:
``tests/runtime/oracle.py``. Every mutant must be refused with an `EdgeError` or accepted as the oracle says,
within a second of processor time (a hang of two minutes ends the run with a traceback). Of one in 50 the
peak of Python's memory is taken (`tracemalloc`), at most twice the file and 4 MiB; one in 50 is read from a
file; accepted ones are fitted to the bundle of version 1. Number n of a seed is always the same mutant:
``--only n`` runs it alone and says what was done to it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from edge_tcur_runtime.errors import EdgeError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import parse_adapter, read_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import Manifest, open_bundle

SECONDS = 1.0  # of processor time, for one file
HANG = 120.0  # by the clock: a machine that is shared may stand still
MEMORY = 4 * 2**20  # bytes, besides twice the file
SHARE = 50
CHUNK = 500
TESTS = Path(__file__).parents[1]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


oracle = _load(TESTS / "runtime" / "oracle.py")  # first: the mutants import it
mutants = _load(TESTS / "runtime" / "mutants.py")


@dataclass
class Tally:
    """What became of mutants: verdict -> how many, the slowest (seconds), the most memory, and faults."""

    verdicts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: int = 0  # bytes beyond twice the file; below zero where it took less
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Takes in another tally."""
        self.verdicts += other.verdicts
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)
        self.faults += other.faults


def examine(seed: int, number: int, tally: Tally, folder: Path) -> str:
    """Reads one mutant; what was done to it. Faults go into the tally."""
    origin, mutant = mutants.make(seed, number)
    measured, from_file = number % SHARE == 0, number % SHARE == 1
    if measured:
        tracemalloc.start()
    began, read, problem = time.thread_time(), None, None
    try:
        if from_file:
            path = folder / "mutant.safetensors"
            path.write_bytes(mutant.raw)
            adapter = read_adapter(path)
        else:
            adapter = parse_adapter(mutant.raw)
        verdict = "accepted"
    except EdgeError as error:
        verdict, adapter = error.code, None
    except Exception as error:  # noqa: BLE001
        verdict, adapter, problem = "crash", None, f"{type(error).__name__}: {error}"
    seconds = time.thread_time() - began
    if measured:
        extra = tracemalloc.get_traced_memory()[1] - 2 * len(mutant.raw)
        tracemalloc.stop()
        tally.memory = max(tally.memory, extra)
        if extra > MEMORY:
            problem = f"{extra} bytes beyond twice the file"
    if adapter is not None:
        read = {"tensors": adapter.tensors(), "again": serialize_adapter(adapter)}
        verdict += _fit(adapter)
    if problem is None and seconds > SECONDS and not measured:
        problem = f"{seconds:.1f} s"
    problem = problem or oracle.fault(origin, mutant, read)
    tally.verdicts[verdict] += 1
    tally.slowest = max(tally.slowest, 0.0 if measured else seconds)
    if problem is not None:
        tally.faults.append(f"seed {seed}, mutant {number}: {problem} ({verdict}; {mutant.how})")
    return f"{verdict}; {mutant.how}"


@cache
def _manifest() -> Manifest:
    return open_bundle(TESTS / "data" / "bundle-v1", verify=False).manifest


def _fit(adapter: Any) -> str:
    """Whether an accepted adapter fits the bundle of version 1; anything but that or a refusal is raised."""
    manifest = _manifest()
    try:
        feeds = build_feeds(manifest, adapter)
    except EdgeError:
        return ", of another base"
    assert set(feeds) == set(manifest.factor_names())
    return ", fits"


def run_chunk(seed: int, start: int, count: int = CHUNK) -> Tally:
    """The mutants from number `start` on."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, start + count):
            if number % SHARE == 0:
                faulthandler.dump_traceback_later(HANG, exit=True)
            examine(seed, number, tally, Path(folder))
    faulthandler.cancel_dump_traceback_later()
    return tally


def run_for(seconds: float, seed: int) -> tuple[Tally, int]:
    """Mutants in this process until the time is over, and how many there were."""
    tally, count, end = Tally(), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        tally.add(run_chunk(seed, count, 50))
        count += 50
    return tally, count


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--only", type=int, help="one mutant of the seed")
    options = parser.parse_args()
    total = Tally()
    if options.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(f"{examine(options.seed, options.only, total, Path(folder))}\n")
    else:
        sys.stdout.write(f"seed {options.seed}, {options.processes} processes\n")
        run(options.seed, options.count, options.processes, total)
    for line in total.faults[:20]:
        sys.stdout.write(f"FAULT {line}\n")
    sys.exit(bool(total.faults))


def run(seed: int, count: int, processes: int, total: Tally) -> None:
    """All mutants, with a line of progress, and the figures."""
    began, done = time.monotonic(), 0
    starts = range(0, count, CHUNK)
    # An executor notices a worker that ended by itself (the traceback of a hang); a Pool would wait for ever.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for chunk in as_completed([pool.submit(run_chunk, seed, start) for start in starts]):
            total.add(chunk.result())
            done += CHUNK
            rate = done / (time.monotonic() - began)
            end = "\r" if sys.stdout.isatty() else "\n"
            if end == "\r" or done % (10 * CHUNK) == 0:
                sys.stdout.write(
                    f"{done:,} of {count:,}, {rate:.0f} a second, {len(total.faults)} faults{end}"
                )
                sys.stdout.flush()
    sys.stdout.write(f"\n{done:,} mutants in {time.monotonic() - began:.0f} s\n")
    for verdict, number in total.verdicts.most_common():
        sys.stdout.write(f"  {verdict:28}{number:10,}\n")
    sys.stdout.write(f"  slowest {total.slowest * 1e3:.1f} ms of processor time\n")
    sys.stdout.write(f"  memory at most twice the file {total.memory / 2**10:+.0f} KiB\n")
    sys.stdout.write(f"  faults {len(total.faults)}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
