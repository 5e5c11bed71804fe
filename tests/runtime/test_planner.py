"""The plan of a run: it never exceeds the budget, more memory is never slower, and what is refused names a
budget that will do. The guard between passes shrinks what would cross."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.budget import Memory
from edge_tcur_runtime.errors import BudgetError
from edge_tcur_runtime.formats.memory import GraphTable, MemoryTables, RowTable
from edge_tcur_runtime.guard import Guard, taken
from edge_tcur_runtime.planner import (
    THREAD_BYTES,
    WINDOW,
    Footprint,
    Load,
    Passes,
    footprint_of,
    interpolate,
    make_plan,
    resident_rows,
    room,
    sorted_passes,
)

MIB = 2**20
SAMPLES, LENGTHS = (1, 2, 4, 8, 32), (8, 16, 64)


def convex(slopes):
    """Values over `SAMPLES` whose growth for a sample never falls, as of a peak."""
    values, slopes = [slopes[0]], sorted(slopes[1:])
    for place, slope in enumerate(slopes):
        values.append(values[-1] + slope * (SAMPLES[place + 1] - SAMPLES[place]))
    return tuple(values)


LINES = st.lists(st.integers(1, 2**22), min_size=5, max_size=5).map(convex)
TABLES = st.builds(
    GraphTable,
    nodes=st.integers(1, 4000),
    base=st.integers(0, 2**28),
    rows=st.just(()),
    values=st.tuples(LINES, LINES, LINES),
    work=st.tuples(LINES, LINES, LINES),
)
FOOTPRINTS = st.builds(
    Footprint,
    engine=st.sampled_from(["ort-step", "ort-training"]),
    graph=st.sampled_from(["step", "train"]),
    table=TABLES,
    samples=st.just(SAMPLES),
    lengths=st.just(LENGTHS),
    held=st.integers(MIB, 2**28),
    factor=st.floats(0.5, 4),
    rate=st.floats(1e-12, 1e-9),
)
LOADS = st.builds(
    Load,
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=20).map(np.array),
    batch=st.integers(1, 20),
)
LIMITS = st.integers(MIB, 2**31)


def with_spare(size):
    """A budget of which so much is planned with."""
    return next(limit for limit in range(size * 32 // 31 - 2, 2**40) if room(limit) >= size)


def footprint(each=MIB, held=50 * MIB, factor=1.0, engine="ort-step", graph="step", rate=1e-9):
    """A pass takes `each` for eight tokens of a sample."""
    values = tuple(tuple(each * count * length // 8 for count in SAMPLES) for length in LENGTHS)
    table = GraphTable(1, 0, (), values, values)
    return Footprint(engine, graph, table, SAMPLES, LENGTHS, held, factor, rate)


# --- the plan ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(FOOTPRINTS, min_size=1, max_size=3), LOADS, LIMITS, LIMITS)
def test_more_memory_is_never_slower_and_nothing_exceeds_it(footprints, load, first, second):
    low, high = (make_plan(footprints, load, limit) for limit in sorted((first, second)))
    if low.chosen is not None:
        assert low.chosen.peak <= room(low.limit)
        assert high.chosen is not None
        assert high.chosen.seconds <= low.chosen.seconds
    for plan in (low, high):
        assert (plan.chosen is None) == all(
            candidate.peak > room(plan.limit) for candidate in plan.candidates
        )


@settings(max_examples=40)
@given(st.lists(FOOTPRINTS, min_size=1, max_size=3), LOADS, LIMITS, st.integers(0, 2**29))
def test_what_is_refused_names_a_budget_that_will_do(footprints, load, limit, floor):
    plan = make_plan(footprints, load, limit, floor)
    if plan.chosen is not None:
        assert plan.require() is plan.chosen
        return
    with pytest.raises(BudgetError) as caught:
        plan.require()
    named = int(re.fullmatch(r"give at least --budget (\d+)MiB", caught.value.hint).group(1)) * MIB
    assert named > limit
    assert make_plan(footprints, load, named, floor).chosen is not None
    least = plan.smallest.peak
    assert named <= 1.04 * least + MIB
    assert make_plan(footprints, load, least - 1, floor).chosen is None


@settings(max_examples=40)
@given(FOOTPRINTS, LOADS, LIMITS)
def test_no_pass_of_the_chosen_plan_takes_more_than_it_says(found, load, limit):
    chosen = make_plan([found], load, limit).chosen
    if chosen is None:
        return
    for start in range(0, len(load.lengths), load.batch):
        lengths = load.lengths[start : start + load.batch]
        formed = chosen.passes.form(lengths)
        assert sorted(np.concatenate(formed)) == list(range(len(lengths)))
        for positions in formed:
            assert found.peak(len(positions), int(lengths[positions].max())) <= chosen.peak <= limit


def test_the_fastest_that_fits_is_taken_and_the_others_say_why_not():
    slow = footprint(each=MIB // 4, graph="step_recompute", rate=1e-8)
    plan = make_plan([footprint(), slow], Load(np.full(16, 8), 16), with_spare(70 * MIB))
    assert (plan.chosen.runs, plan.chosen.passes) == (("ort-step", "step"), Passes(16))
    plan = make_plan([footprint(), slow], Load(np.full(16, 8), 16), with_spare(51 * MIB))
    assert (plan.chosen.runs, plan.chosen.passes) == (("ort-step", "step"), Passes(1))
    plan = make_plan([footprint(), slow], Load(np.full(16, 8), 16), with_spare(50 * MIB + MIB // 2))
    assert (plan.chosen.runs, plan.chosen.passes) == (("ort-step", "step_recompute"), Passes(2))
    verdicts = {(c.runs[1], c.passes.micro_batch): c.verdict for c in plan.candidates}
    assert verdicts["step", 16] == "15.5 MiB too much"
    assert verdicts["step_recompute", 2] == "chosen: the fastest that fits"
    assert verdicts["step_recompute", 1] == "slower"


def test_another_thread_is_faster_and_takes_memory_until_it_was_measured():
    def way(threads):
        tables = MemoryTables(SAMPLES, LENGTHS, {"step": footprint().table})
        return footprint_of(tables, ("ort-step", "step", threads), 50 * MIB, 1.0, rate=1e-9)

    load = Load(np.full(16, 8), 16)
    plan = make_plan([way(1), way(4)], load, None)
    assert plan.chosen.way == ("ort-step", "step", 4)
    one, four = (next(c for c in plan.candidates if c.footprint.threads == n) for n in (1, 4))
    assert one.seconds > four.seconds > one.seconds / 4
    assert four.peak - one.peak == 3 * THREAD_BYTES
    tight = make_plan([way(1), way(4)], load, with_spare(50 * MIB + 17 * MIB // 16))
    assert (tight.chosen.way[2], tight.chosen.passes) == (1, Passes(1))
    slower = replace(way(4), rate=1e-8, measured=True)
    assert make_plan([way(1), slower], load, None).chosen.way[2] == 1


@settings(max_examples=40)
@given(FOOTPRINTS, FOOTPRINTS, LOADS, LIMITS)
def test_a_last_resort_is_taken_only_where_nothing_else_fits(whole, part, load, limit):
    part = replace(part, graph="step_last", resort=True)
    both, alone = (make_plan(found, load, limit) for found in ([whole, part], [whole]))
    if alone.chosen is not None:
        assert (both.chosen.footprint, both.chosen.passes) == (whole, alone.chosen.passes)
    else:
        without = make_plan([part], load, limit).chosen
        assert (both.chosen is None) == (without is None)
        if without is not None:
            assert both.chosen.passes == without.passes
            assert both.chosen.verdict == "chosen: a part alone, as nothing else fits"


def test_a_peak_that_was_reached_already_cannot_be_taken_back():
    plan = make_plan([footprint()], Load(np.full(4, 8), 4), 60 * MIB, floor=70 * MIB)
    assert plan.chosen is None
    assert plan.smallest.peak == 70 * MIB


def test_short_samples_are_taken_more_at_a_time():
    load = Load(np.array([64] + [8] * 15), 16)
    found = sorted_passes(footprint(), load, 2)
    assert found == Passes(2, {8: 16, 64: 2})
    chosen = make_plan([footprint()], load, with_spare(50 * MIB + 16 * MIB)).chosen
    assert chosen.passes.limits[8] == 16
    assert [len(positions) for positions in chosen.passes.form(load.lengths)] == [1, 15]


def test_with_one_sample_a_pass_no_other_micro_batch_is_planned_and_an_update_still_takes_the_batch():
    load = Load(np.array([64] + [8] * 15), 16, most=1)
    plan = make_plan([footprint()], load, None)
    assert [candidate.passes for candidate in plan.candidates] == [Passes(1)]
    assert plan.chosen.seconds == pytest.approx(footprint().seconds(1, 64) + 15 * footprint().seconds(1, 8))


def test_samples_that_are_only_scored_count_for_memory_and_not_for_time():
    short, scored = Load(np.full(16, 8), 16), Load(np.full(16, 8), 16, scored=(64, 64))
    assert scored.longest == 64
    for one in make_plan([footprint()], short, None).candidates:
        for passes in (one.passes, sorted_passes(footprint(), scored, one.passes.micro_batch)):
            other = next(c for c in make_plan([footprint()], scored, None).candidates if c.passes == passes)
            assert other.peak == 50 * MIB + 8 * MIB * one.passes.micro_batch > one.peak
            assert other.seconds <= one.seconds


def test_what_the_work_between_passes_takes_is_planned_too():
    load = Load(np.full(4, 8), 1, most=1, between=30 * MIB)
    assert make_plan([footprint()], load, None).chosen.peak == 80 * MIB
    assert make_plan([footprint()], load, with_spare(79 * MIB)).chosen is None


def test_interpolation_lies_above_a_peak_and_meets_the_grid():
    line = (3, 5, 9, 40, 300)
    assert [interpolate(SAMPLES, line, at) for at in SAMPLES] == list(line)
    assert interpolate(SAMPLES, line, 6) == 24.5
    assert interpolate(SAMPLES, line, 56) == 300 + (300 - 40)  # the last chord goes on
    assert footprint().values(1, 9) == footprint().values(1, 16)  # padded to the next length


# --- the passes of an update ---------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=30).map(np.array),
    st.integers(1, 9),
    st.dictionaries(st.sampled_from(LENGTHS), st.integers(1, 9)),
)
def test_each_sample_is_in_one_pass(lengths, micro, limits):
    passes = Passes(micro, limits)
    formed = passes.form(lengths)
    assert sorted(np.concatenate(formed)) == list(range(len(lengths)))
    assert [p.tolist() for p in formed] == [p.tolist() for p in passes.form(lengths.copy())]
    for positions in formed:
        assert len(positions) <= passes.limits.get(int(lengths[positions].max()), micro)
        if limits:
            assert len(set(lengths[positions])) == 1


def test_without_limits_the_order_of_the_data_stays():
    formed = Passes(3).form(np.array([8, 64, 8, 16, 8]))
    assert [p.tolist() for p in formed] == [[0, 1, 2], [3, 4]]


def test_passes_are_lowered_for_one_length_or_for_all():
    assert Passes(8).lowered(64, 3) == Passes(3)
    assert Passes(2, {8: 16, 64: 2}).lowered(8, 5) == Passes(2, {8: 5, 64: 2})
    assert Passes(2, {8: 16, 64: 2}).lowered(64, 1) == Passes(1, {8: 16, 64: 1})


# --- rows of the base that are read ----------------------------------------------------------------------


def test_rows_that_are_read_cost_the_windows_that_linux_maps():
    table = RowTable(bytes=100 * WINDOW, row=WINDOW // 64, input="ids")
    assert resident_rows([table], {"ids": np.array([0, 1, 63])}) == 2 * WINDOW
    assert resident_rows([table], {"ids": np.array([0, 64 * 9])}) == 3 * WINDOW
    assert resident_rows([table], {"ids": np.arange(6400)}) == 100 * WINDOW
    assert resident_rows([table], {}) == 100 * WINDOW


# --- the guard ---------------------------------------------------------------------------------------


def memory(resident, peak=None, file_backed=0):
    return Memory(peak if peak is not None else resident, resident, 0, file_backed)


def test_a_pass_that_would_cross_is_made_smaller_and_that_is_said():
    guard = Guard(100 * MIB, footprint())
    assert guard.allow(16, 8, memory(80 * MIB)) == 16
    assert guard.notes == []
    assert guard.allow(16, 8, memory(90 * MIB)) == 10
    assert guard.allow(4, 64, memory(99 * MIB)) == 1  # fewer there are not: the check afterwards decides
    assert "passes of 8 tokens have at most 10 samples" in guard.notes[0]


@given(FOOTPRINTS, st.integers(1, 64), st.sampled_from(LENGTHS), LIMITS, st.integers(0, 2**29))
def test_what_the_guard_lets_through_fits_by_its_prediction(found, samples, length, limit, resident):
    allowed = Guard(limit, found).allow(samples, length, memory(resident))
    assert 1 <= allowed <= samples
    if allowed > 1:
        assert resident + found.growth(allowed, length) <= limit
    if allowed < samples:
        assert resident + found.growth(allowed + 1, length) > limit


def test_the_guard_learns_what_a_pass_takes_but_not_from_pages_of_the_base():
    guard = Guard(100 * MIB, footprint())
    guard.saw(8, 8, memory(60 * MIB), memory(60 * MIB, peak=76 * MIB))
    assert guard.footprint.factor == 2.0
    assert guard.allow(16, 8, memory(80 * MIB)) == 10
    assert taken(memory(60 * MIB), memory(64 * MIB, 70 * MIB, file_backed=4 * MIB)) == 6 * MIB
    guard.saw(8, 8, memory(60 * MIB), memory(80 * MIB, peak=86 * MIB, file_backed=20 * MIB))
    assert guard.footprint.factor == 2.0


def test_what_stayed_below_the_limit_is_not_doubted_again():
    """A heap that keeps what was freed looks full between passes, and is not."""
    guard = Guard(100 * MIB, footprint())
    held = memory(95 * MIB, peak=96 * MIB)
    guard.saw(8, 8, held, held)
    assert guard.allow(8, 8, memory(94 * MIB, peak=96 * MIB)) == 8
