"""How many CPUs a process may use: its affinity, its container's quota, and which of them are fast."""

from __future__ import annotations

import os

import pytest

from edge_tcur_runtime import cores
from edge_tcur_runtime.cores import fast_cores, thread_counts, usable_cores, within
from edge_tcur_runtime.errors import ConfigError

CPUS = [0, 2, 3, 5, 6, 7]


@pytest.fixture(autouse=True)
def six(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(CPUS), raising=False)


def make(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "50000 100000"}, 1),
        ("0::/gone", {"cpu.max": "400000 100000"}, 4),  # a container: its group is the root of the mount
        ("0::/", {"cpu.max": "max 100000"}, 6),
        ("0::/", {"cpu.max": "9000000 100000"}, 6),
        ("0::/", {"cpu.max": "nonsense"}, 6),
        ("4:memory:/m\n2:cpu,cpuacct:/a\n0::/", {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000",
                                                 "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu:/a", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"}, 3),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ("3:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "100000", "cpuset/a/cpu.cfs_period_us": "100000"}, 6),
    ],
)  # fmt: skip
def test_no_more_than_the_quota_of_the_control_group(tmp_path, groups, files, expected):
    make(tmp_path / "proc" / "self", {"cgroup": groups})
    make(tmp_path / "sys" / "fs" / "cgroup", files)
    assert usable_cores(tmp_path) == expected


def test_without_proc_all_of_the_affinity(tmp_path):
    assert usable_cores(tmp_path) == 6


@pytest.mark.parametrize(
    ("name", "speeds", "expected"),
    [
        ("cpu_capacity", (446, 446, 446, 1024, 1024, 871), 3),
        ("cpufreq/cpuinfo_max_freq", (5100000, 5000000, 5000000, 5000000, 3800000, 3800000), 4),
        ("cpu_capacity", (1024,) * 6, 6),
        ("cpu_capacity", (446, 1024), 6),  # not of all: nothing is known
        ("other", (1, 2, 3, 4, 5, 6), 6),
    ],
)
def test_cores_of_the_fastest_kind(tmp_path, name, speeds, expected):
    files = {f"sys/devices/system/cpu/cpu{cpu}/{name}": s for cpu, s in zip(CPUS, speeds, strict=False)}
    assert fast_cores(make(tmp_path, files)) == expected


def test_what_there_is_to_choose_from(monkeypatch):
    monkeypatch.setattr(cores, "_quotas", lambda *_: [])
    monkeypatch.setattr(cores, "fast_cores", lambda: 2)
    assert thread_counts(0) == (1, 2, 6)
    assert thread_counts(4) == (4,)
    assert thread_counts(64) == (6,)
    monkeypatch.setattr(cores, "_quotas", lambda *_: [1.0])
    assert thread_counts(0) == (1,)
    assert (within(0), within(8)) == (1, 1)
    with pytest.raises(ConfigError, match="-1; expected 0 or more"):
        within(-1)
