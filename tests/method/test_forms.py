"""Which form computes a layer, and the cost model that chooses it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.cost import Sizes, cheapest_form, predict_seconds
from edge_tcur.method.forms import FORMS, possible_forms
from edge_tcur.method.layer import AdaptedLayer
from edge_tcur.method.views import find_view

ATTENTION = Sizes(tokens=512, n1=384, n2=384, inner=8, rank=8)


def test_possible_forms():
    linear, convolution = find_view(torch.nn.Linear(2, 3)), find_view(torch.nn.Conv2d(2, 3, 3))
    assert possible_forms(linear, has_rows=True) == ("gather", "factored", "merged", "materialised")
    assert possible_forms(linear, has_rows=False) == ("factored", "merged", "materialised")
    assert possible_forms(convolution, has_rows=True) == ("gather", "materialised")
    assert possible_forms(convolution, has_rows=False) == ("materialised",)
    assert possible_forms(linear, has_rows=False, in_block=True) == (
        "factored", "merged", "spectral", "materialised",
    )  # fmt: skip
    assert possible_forms(convolution, has_rows=False, in_block=True) == ("materialised",)
    assert set(FORMS) == {"gather", "factored", "merged", "spectral", "materialised"}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("size", ["tokens", "n1", "n2", "inner"])
def test_more_work_is_never_predicted_to_be_faster(form, size):
    more = replace(ATTENTION, **{size: 2 * getattr(ATTENTION, size)})
    assert 0 < predict_seconds(form, ATTENTION) <= predict_seconds(form, more)


def test_the_cheapest_form_is_the_one_with_the_lowest_prediction():
    for sizes in (ATTENTION, replace(ATTENTION, tokens=1), replace(ATTENTION, inner=192, tokens=4096)):
        costs = {form: predict_seconds(form, sizes) for form in FORMS}
        assert cheapest_form(tuple(FORMS), sizes) == min(costs, key=costs.get)
        assert cheapest_form(("merged",), sizes) == "merged"


def test_the_choice_depends_on_coupling_and_tokens():
    assert cheapest_form(tuple(FORMS), ATTENTION) == "gather"
    few, many = (replace(ATTENTION, tokens=tokens, inner=192) for tokens in (16, 16384))
    coupled = ("factored", "merged", "materialised")
    assert cheapest_form(coupled, few) == "factored"
    assert cheapest_form(coupled, many) in {"merged", "materialised"}


def test_a_layer_asks_for_the_form_of_its_sizes(kit, monkeypatch):
    model = kit.Net()
    kit.adapt(model, TCurConfig(rank=2, coupling="all"))
    asked = []

    def choose(forms, sizes):
        asked.append((forms, sizes))
        return "merged"

    monkeypatch.setattr("edge_tcur.method.layer.cheapest_form", choose)
    model(torch.randn(5, 7, 4))
    coupled = ("factored", "merged", "spectral", "materialised")
    assert asked[0] == (coupled, Sizes(tokens=35, n1=12, n2=6, inner=6, rank=2))
    assert len(asked) == len([m for m in model.modules() if isinstance(m, AdaptedLayer)]) == 9


@pytest.fixture(scope="module")
def tool():
    """`tests/benchmarks/forms.py`."""
    path = Path(__file__).parents[1] / "benchmarks" / "forms.py"
    spec = importlib.util.spec_from_file_location("forms_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["forms_benchmark"] = module  # its dataclasses look there for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["forms_benchmark"]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["linear", "int8", "convolution"])
def test_the_benchmark_measures_every_form_of_a_cell(tool, one_thread, kind):
    """That the chosen one is near the fastest is for the benchmark to say, on an idle machine."""
    over, line = tool.judge(tool.Cell(64, 1, 32, 32, 4, False, kind), rounds=1)
    assert over >= 0
    assert line.count("ms: ") == 1


def test_a_form_that_is_slow_each_time_fails_the_benchmark(tool, monkeypatch, capsys):
    tries = []

    def measure(cell, rounds):
        tries.append(cell)
        slow = cell.kind == "int8" or (cell.kind == "convolution" and len(tries) % tool.ATTEMPTS)
        return "gather", {
            "gather": [1.3 if slow else 1.1, 9.0, 1.1 if not slow else 1.3],
            "merged": [1.0, 9.0, 1.0],
        }

    monkeypatch.setattr(tool, "measure", measure)
    cells = {kind: tool.Cell(4, 1, 2, 3, 1, kind=kind) for kind in ("linear", "int8", "convolution")}
    for kind, status in (("linear", 0), ("int8", 1), ("convolution", 0)):
        tries.clear()
        monkeypatch.setattr(tool, "CELLS", [cells[kind]])
        monkeypatch.setattr(sys, "argv", ["forms.py"])
        assert tool.main() == status
        assert len(tries) == (1 if kind == "linear" else tool.ATTEMPTS)
    assert "1 above 20%" in capsys.readouterr().out
