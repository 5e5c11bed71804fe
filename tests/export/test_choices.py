"""Which base to export: what is planned of a form is what an export of it has; the fastest that fits is
taken."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur.cli.plan import choices as as_text
from edge_tcur_export import choices as module
from edge_tcur_export.bundle import export_run
from edge_tcur_export.choices import Form, calibrate, choose
from edge_tcur_export.plan import PlanRequest, plan_bundle, plan_run
from edge_tcur_export.settings import ExportSettings
from edge_tcur_runtime.errors import MissingEngineError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.memory import GraphTable
from edge_tcur_runtime.planner import room

MIB = 2**20
LENGTH = 16


@pytest.fixture(scope="module")
def planned(bert):
    """Of the run, without a budget: it knows nothing of the bundles."""
    return plan_run(bert.run, ExportSettings(("onnx", "step")), PlanRequest(batch=8, length=LENGTH))


@pytest.fixture(scope="module")
def written(bert, tmp_path_factory):
    """The bundle that an export of one form gives."""
    path = tmp_path_factory.mktemp("choices") / "int4"
    settings = ExportSettings(("onnx", "step"), verify=False, precision="int4", recompute=True)
    export_run(bert.run, path, settings)
    return open_bundle(path)


def forms_of(found):
    return {(row.form.precision, row.form.graph): row.form for row in found.choices.rows}


def test_every_precision_is_planned_with_and_without_recomputing(planned):
    forms = forms_of(planned)
    assert set(forms) == {(p, g) for p in ("fp32", "int8", "int4") for g in ("step", "step_recompute")}
    assert {row.micro_batch for row in planned.choices.rows} == {8, 4, 2, 1}
    for graph in ("step", "step_recompute"):
        sizes = [forms[precision, graph].base_bytes for precision in ("fp32", "int8", "int4")]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 2 * sizes[2]


def test_a_form_is_what_an_export_of_it_has(planned, written):
    """Nodes, bytes of the base that are read, and the values and operations of a pass, to the number."""
    tables = written.manifest.memory
    place = tables.lengths.index(LENGTH)
    for graph in ("step", "step_recompute"):
        form, table = forms_of(planned)["int4", graph], tables.graphs[graph]
        assert form.table == replace(table, values=(table.values[place],), work=(table.work[place],))


def test_a_bundle_is_planned_as_its_run(planned, written):
    found = plan_bundle(written, None, PlanRequest(batch=8, length=LENGTH))
    ours = {(r.form.graph, r.micro_batch): r.peak for r in found.choices.rows}
    runs = {(r.form.graph, r.micro_batch): r.peak for r in planned.choices.rows if r.form.precision == "int4"}
    assert ours == runs
    assert found.choices.measured


def test_the_fastest_that_fits_is_taken_and_told(bert, written):
    bundle = written
    free = plan_bundle(bundle, None, PlanRequest(batch=8, length=LENGTH)).choices
    assert free.chosen is None
    assert free.smallest.micro_batch == 1
    budget = free.named * MIB
    plan = plan_bundle(bundle, None, PlanRequest(batch=8, length=LENGTH, budget=budget))
    assert plan.choices.chosen.peak <= room(budget)
    assert "taken: --precision int4" in as_text(plan)
    content = json.loads(json.dumps(plan.to_dict()))["choices"]
    assert content["chosen"]["verdict"] == "chosen: the fastest that fits"
    assert content["seconds_measured_here"]
    assert len(content["candidates"]) == 8
    nothing = plan_bundle(bundle, None, PlanRequest(batch=8, length=LENGTH, budget=MIB))
    assert nothing.choices.chosen is None
    assert f"NOTHING FITS: the least is --budget {free.named}MiB with --precision int4" in as_text(nothing)


def test_the_time_is_that_of_a_pass_here(vit):
    """Of a float32 base, whatever the precision that is timed; a second measurement agrees roughly."""
    manifest = vit.bundle.manifest
    table = manifest.memory.graphs["step"]
    form = Form("fp32", "step", table, 0)
    samples = manifest.memory.samples
    rates = [
        calibrate(vit.bundle.graph("step"), form, manifest.inputs, manifest.groups, 0, samples)
        for _ in range(3)
    ]
    assert 1e-13 < min(rates) <= max(rates) < 1e-7
    quantised = replace(form, precision="int4")
    found = choose([form, quantised], 8, 0, None, samples=samples, rate=min(rates)).rows
    times = {(row.form.precision, row.micro_batch): row.seconds for row in found}
    assert times["int4", 8] > times["fp32", 8]


def test_without_onnx_runtime_times_are_of_a_common_core_and_that_is_said(vit, monkeypatch):
    def missing(*_, **__):
        raise MissingEngineError("ONNX Runtime is not installed")

    monkeypatch.setattr("edge_tcur_runtime.engines.session.open_session", missing)
    plan = plan_bundle(vit.bundle, None, PlanRequest(batch=8))
    assert not plan.choices.measured
    assert "seconds are of a common core" in as_text(plan)


def test_a_base_that_cannot_be_quantised_or_recomputed_is_planned_as_it_is(vit, monkeypatch):
    found = module.FormMaker({"fp32": module.WeightTable(())}, {}, {}, 0, vit.bundle.root)
    monkeypatch.setattr(found, "_add", lambda *arguments: found.forms.append(arguments[:2]))
    monkeypatch.setattr(module, "recompute_blocks", _refuse)
    monkeypatch.setattr(module.graphs, "clone", lambda model: model)
    monkeypatch.setattr(module.BaseFile, "externalize", lambda *_: 0)
    found(None, ())
    assert found.forms == [("fp32", "step")]
    assert found.lacking == ["--recompute: no blocks"]


def _refuse(*_):
    raise module.ExportError("no blocks")


# --- the choice, of any tables ---------------------------------------------------------------------------

LINES = st.lists(st.integers(1, 2**24), min_size=3, max_size=3).map(lambda line: tuple(np.cumsum(line)))
FORMS = st.builds(
    Form,
    precision=st.sampled_from(["fp32", "int8", "int4"]),
    graph=st.sampled_from(["step", "step_recompute"]),
    table=st.builds(
        GraphTable,
        nodes=st.integers(1, 3000),
        base=st.integers(0, 2**27),
        rows=st.just(()),
        values=st.tuples(LINES),
        work=st.tuples(LINES),
    ),
    base_bytes=st.integers(0, 2**27),
)


@settings(max_examples=50)
@given(st.lists(FORMS, min_size=1, max_size=5, unique=True), st.integers(1, 16), st.integers(2**24, 2**29))
def test_what_is_taken_fits_and_nothing_that_fits_is_faster(forms, batch, budget):
    found = choose(forms, batch, 8, budget, samples=(1, 2, 4))
    fitting = [row for row in found.rows if row.peak <= room(budget)]
    assert (found.chosen is None) == (not fitting)
    if found.chosen is not None:
        assert found.chosen.peak <= room(budget)
        assert found.chosen.seconds == min(row.seconds for row in fitting)
    else:
        assert choose(forms, batch, 8, found.named * MIB, samples=(1, 2, 4)).chosen is not None


def test_of_two_that_are_as_fast_the_exact_base_is_taken():
    table = GraphTable(10, 0, (), ((MIB, 2 * MIB),), ((10**9, 2 * 10**9),))
    forms = [Form(precision, "step", table, 0) for precision in ("fp32", "int8")]
    assert choose(forms, 4, 8, 2**30, samples=(1, 2)).chosen.form.precision == "fp32"
