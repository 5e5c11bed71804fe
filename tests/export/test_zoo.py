"""Every family of the zoo exports and agrees with torch (outputs, loss, gradients, three optimiser steps),
and the table of docs/models.md says what was found.

EDGE_TCUR_ZOO=all measures every cell; without it, each model's `tested` columns."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import model_table
import zoo


@pytest.fixture(scope="session")
def table():
    """Model -> column -> cell of the documentation."""
    return model_table.read()


def columns_of(name):
    return zoo.COLUMNS if os.environ.get("EDGE_TCUR_ZOO") == "all" else zoo.MODELS[name].tested


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if columns_of(name)])
def test_the_table_says_what_the_targets_do(name, table, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(zoo.HERE))
    measured = zoo.measure(name, tmp_path / "model", columns_of(name))
    assert set(measured) == set(columns_of(name))
    assert model_table.agree(measured, table[name]), (
        f"{name}: measured {measured}, the table says {table[name]}; "
        f"run python tests/export/make_model_table.py --model {name!r}"
    )


def test_a_tied_embedding_is_held_once(tmp_path):
    from edge_tcur.method.targets import find_targets
    from edge_tcur.models import load_base
    from edge_tcur.settings import TrainConfig
    from edge_tcur.tasks import find_task
    from edge_tcur_export.trace import FactorModel

    task, config = find_task(zoo.LANGUAGE), TrainConfig(task=zoo.LANGUAGE, rank=2).method()
    base = load_base(zoo.MODELS["GPT-2"].base(tmp_path), task, (), {})
    model = FactorModel(base, find_targets(base.model, config).groups, task, config)
    state = model.state_dict()
    shape = (len(zoo.WORDS), 16)
    held = {value.data_ptr() for value in state.values() if tuple(value.shape) in (shape, shape[::-1])}
    assert len(held) == 1


def test_the_table_is_complete(table):
    for name, row in table.items():
        assert model_table.UNKNOWN not in {row[column] for column in zoo.MODELS[name].tested}, name
        assert not [cell for cell in row.values() if cell in {"no", ""}], f"{name}: a no without a reason"
    text = model_table.PATH.read_text(encoding="utf-8")
    assert model_table.render(table) in text  # nothing written by hand survives


def test_a_cell_that_differs_is_noticed(table):
    row = dict(table["BERT"])
    assert model_table.agree({"infer": row["infer"]}, row)
    assert not model_table.agree({"infer": "some reason"}, row)
    rows = {**table, "BERT": {**row, "step": "no gradient for A; B"}}
    assert "step: no gradient for A, B |" in model_table.render(rows)
