"""The budget is a promise: in fresh processes, by VmHWM, and inside a memory cgroup whose limit it is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

MIB = 2**20
CGROUPS = Path("/sys/fs/cgroup")
NAME = f"edge-tcur-test-{os.getpid()}"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs VmHWM")


@pytest.fixture(scope="module")
def tool():
    """The benchmark, a share of which this is."""
    path = Path(__file__).parents[1] / "benchmarks" / "budget.py"
    spec = importlib.util.spec_from_file_location("budget_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(words):
    """A bundle with tables and the graph that recomputes."""
    return words.bundle.root


def kept(found, budget):
    """Whether a run ended below its budget, and the plan had told its peak."""
    assert "peak" in found, found
    assert found["peak"] <= budget
    assert 0.95 <= found["predicted"] / found["peak"] <= 1.1


@pytest.mark.parametrize("engine", ["auto", "ort-step"])
def test_what_a_refusal_names_is_accepted_and_kept(tool, root, texts_csv, engine, capsys):
    refused = tool.run_child(root, texts_csv, MIB, engine, "auto")
    assert refused["before"]
    budget = tool.named(refused)
    found = tool.run_child(root, texts_csv, budget, engine, "auto")
    kept(found, budget)
    with capsys.disabled():
        print(
            f" {found['predicted'] / MIB:.1f} predicted, {found['peak'] / MIB:.1f} of {budget // MIB} MiB",
            end="",
        )


# --- a cgroup ------------------------------------------------------------------------------------------


def controller():
    """The folder of the memory controller, the file of a group's limit, and the one of its peak; or None."""
    for folder, limit, peak in (
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),  # version 1
        (CGROUPS, "memory.max", "memory.peak"),
    ):
        controllers = folder / "cgroup.controllers"
        if (folder / "cgroup.procs").is_file() and (
            folder.name == "memory" or (controllers.is_file() and "memory" in controllers.read_text().split())
        ):
            return folder, limit, peak
    return None


@contextlib.contextmanager
def limited(budget):
    """A command that runs another one in a new group of that limit, and the file of the group's peak."""
    found = controller()
    if found is None:
        pytest.skip("no memory controller of control groups is mounted at /sys/fs/cgroup")
    folder, limit, peak = found
    group = folder / NAME
    try:
        if folder == CGROUPS:
            (folder / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error.strerror}")
    try:
        (group / limit).write_text(str(budget))
        # Nothing may hide in swap, where there is an account: version 1 counts both, version 2 swap alone.
        for name, most in (("memory.memsw.limit_in_bytes", budget), ("memory.swap.max", 0)):
            with contextlib.suppress(OSError):
                if (group / name).is_file():  # on a plain file system a write would make one
                    (group / name).write_text(str(most))
        entered = f'echo $$ > {group / "cgroup.procs"} && exec "$@"'
        yield ("sh", "-c", entered, "sh"), group / peak
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(0.1)


def evict(*roots):
    """Drops the cached pages of files, so that the group is charged for those it reads."""
    for root in roots:
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def libraries():
    specs = [importlib.util.find_spec(name) for name in ("onnxruntime", "numpy", "safetensors", "tokenizers")]
    return [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin]


def test_a_cgroup_of_the_budget_does_not_kill_the_run(tool, root, texts_csv, capsys):
    budget = int(tool.named(tool.run_child(root, texts_csv, MIB, "ort-step", "off")) * 1.05)
    free = tool.run_child(root, texts_csv, budget, "ort-step", "off")
    with limited(budget) as (before, peak):
        evict(root, *libraries())
        found = tool.run_child(root, texts_csv, budget, "ort-step", "off", before=before)
        charged = int(peak.read_text()) if peak.is_file() else 0  # Linux before 5.19 has no memory.peak
    kept(found, budget)
    assert charged <= budget
    assert found["seconds"] < 3 * free["seconds"] + 2  # a limit is felt as thrashing before it kills
    with capsys.disabled():
        print(
            f" limit {budget / MIB:.0f} MiB, charged {charged / MIB:.0f}, VmHWM {found['peak'] / MIB:.0f}; "
            f"{found['seconds']:.2f} s against {free['seconds']:.2f} s", end="",
        )  # fmt: skip


def test_the_cgroup_is_real(tool, root, texts_csv):
    """Without a budget of its own the same run is killed below what it needs."""
    with limited(16 * MIB) as (before, _):
        evict(root, *libraries())
        with pytest.raises(RuntimeError, match=r"ended with (-9|137)"):
            tool.run_child(root, texts_csv, 0, "ort-step", "off", before=before)
