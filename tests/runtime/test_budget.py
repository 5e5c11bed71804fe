"""The memory budget: what is measured, and that the guard and the micro-batch keep under the limit."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime import budget as module
from edge_tcur_runtime.budget import Budget, Memory, choose_micro_batch, read_memory
from edge_tcur_runtime.errors import BudgetError, ExitCode

MIB = 2**20
STATUS = """\
Name:\tpython
VmPeak:\t  600000 kB
VmHWM:\t  131072 kB
VmRSS:\t   65536 kB
RssAnon:\t   40960 kB
RssFile:\t   20480 kB
RssShmem:\t    4096 kB
"""


# --- measuring -------------------------------------------------------------------------------------


def test_the_kernels_text_is_read_in_bytes(tmp_path):
    path = tmp_path / "status"
    path.write_text(STATUS)
    assert read_memory(path) == Memory(128 * MIB, 64 * MIB, 40 * MIB, 20 * MIB)


def test_a_kernel_that_says_less_leaves_zeros(tmp_path):
    path = tmp_path / "status"
    path.write_text("VmRSS:\t1024 kB\nVmHWM:\nRssAnon:\tmany kB\n")
    assert read_memory(path) == Memory(resident=MIB)
    assert read_memory(tmp_path / "missing") == Memory()


MEASURE = """
from edge_tcur_runtime.budget import read_memory
before = read_memory()
block = bytearray(64 * 2**20)
block[:: 4096] = b"x" * len(block[:: 4096])
held = read_memory()
del block
after = read_memory()
print(held.peak - before.peak, held.anonymous - before.anonymous, after.peak - held.peak, after.resident)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_what_is_allocated_is_measured():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    peak, anonymous, later, resident = map(int, done.stdout.split())
    assert 60 * MIB < peak < 80 * MIB
    assert 60 * MIB < anonymous < 80 * MIB
    assert later < 2 * MIB  # the peak stays when the memory is given back
    assert resident < 60 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_this_process_has_a_peak_of_at_least_what_is_resident():
    memory = read_memory()
    assert memory.peak >= memory.resident >= memory.anonymous > 0


# --- the guard -------------------------------------------------------------------------------------


def at(monkeypatch, peak):
    monkeypatch.setattr(module, "read_memory", lambda: Memory(peak=peak, resident=peak // 2))


def test_work_that_does_not_fit_is_refused_before_it_starts_and_the_smallest_budget_is_named():
    with pytest.raises(
        BudgetError, match=r"the budget of 64\.0 MiB cannot be met: it needs about 100\.0 MiB"
    ) as e:
        Budget(64 * MIB).require(100 * MIB, "it")
    assert e.value.exit_code == ExitCode.BUDGET == 5
    assert e.value.hint == "give at least --budget 100MiB"
    with pytest.raises(BudgetError) as e:
        Budget(64 * MIB).require(100 * MIB + 1, "it")
    assert e.value.hint == "give at least --budget 101MiB"


@given(st.integers(1, 2**45), st.integers(0, 2**45))
def test_the_budget_that_is_named_would_do(limit, needed):
    try:
        Budget(limit).require(needed, "it")
    except BudgetError as error:
        assert needed > limit
        named = int(error.hint.removeprefix("give at least --budget ").removesuffix("MiB")) * MIB
        assert 0 <= named - needed < MIB
        Budget(named).require(needed, "it")
    else:
        assert needed <= limit


def test_a_crossed_limit_stops_the_run_and_names_a_budget_above_the_peak(monkeypatch):
    at(monkeypatch, 100 * MIB)
    assert Budget(100 * MIB).check("so far").peak == 100 * MIB
    with pytest.raises(
        BudgetError, match=r"the budget of 99\.0 MiB was exceeded by a step: the peak is"
    ) as e:
        Budget(99 * MIB).check("by a step")
    assert "nothing was installed" in e.value.message
    assert e.value.hint == "give at least --budget 110MiB"


def test_without_a_limit_nothing_is_refused(monkeypatch):
    at(monkeypatch, 2**50)
    assert Budget().check("ever").peak == 2**50
    Budget().require(2**60, "anything")


def test_a_limit_where_memory_cannot_be_measured_is_refused_and_not_ignored(monkeypatch):
    at(monkeypatch, 0)
    with pytest.raises(BudgetError, match="cannot be measured") as caught:
        Budget(2**40).check("so far")
    assert "leave --budget out" in caught.value.hint
    assert Budget().check("so far") == Memory()


# --- the micro-batch -------------------------------------------------------------------------------


SIZES = st.integers(1, 2**40)


@given(st.integers(1, 512), st.none() | SIZES, SIZES, SIZES)
def test_the_micro_batch_is_between_one_and_the_batch(batch, limit, one, two):
    assert 1 <= choose_micro_batch(batch, limit, one, two) <= batch


@given(st.integers(1, 512), SIZES, SIZES)
def test_without_a_limit_the_whole_batch_is_taken(batch, one, two):
    assert choose_micro_batch(batch, None, one, two) == batch


@given(st.integers(1, 512), st.integers(0, 2**34), st.integers(0, 2**30), st.integers(0, 2**34))
def test_what_is_predicted_fits_where_anything_does(batch, fixed, each, room):
    """Memory of n samples being fixed + n * each."""
    one, two = fixed + each, fixed + 2 * each
    limit = two + room
    micro = choose_micro_batch(batch, limit, one, two)
    assert fixed + micro * each <= limit
    larger = min(batch, 2 * micro)
    if larger > micro and each > 0:  # the next larger size tried would have come within a tenth of the limit
        assert two + 1.1 * each * (larger - 2) > limit or -(-larger // 2) != micro


@given(st.integers(1, 512), SIZES, SIZES, SIZES, SIZES)
def test_more_memory_never_gives_a_smaller_micro_batch(batch, first, second, one, two):
    low, high = sorted((first, second))
    assert choose_micro_batch(batch, low, one, two) <= choose_micro_batch(batch, high, one, two)


@pytest.mark.parametrize(("limit", "expected"), [(200, 16), (184, 8), (140, 4), (121, 2), (110, 1), (1, 1)])
def test_the_batch_is_halved_until_it_fits(limit, expected):
    assert choose_micro_batch(16, limit, 110, 115) == expected
