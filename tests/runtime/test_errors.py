"""The table of codes in docs/errors.md is the table in the code."""

from __future__ import annotations

import re
from pathlib import Path

from edge_tcur_runtime import errors
from edge_tcur_runtime.errors import EdgeError, ExitCode

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"


def runtime_errors() -> list[type[EdgeError]]:
    """EdgeError and its subclasses, those of the workstation left out (it has its own table)."""
    found, queue = [], [EdgeError]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        if kind.__module__.startswith("edge_tcur_runtime"):
            found.append(kind)
    return found


def test_every_error_is_documented_with_its_exit_code_and_class():
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted((e.code, str(int(e.exit_code)), e.__name__) for e in runtime_errors())


def test_every_exit_code_is_documented():
    rows = re.findall(r"^\| (\d+) \| ([a-z ]+) \|", DOCS.read_text(), re.MULTILINE)
    assert rows == [(str(int(code)), code.name.lower().replace("_", " ")) for code in ExitCode]


def test_codes_are_unique_and_stated_by_each_class():
    kinds = runtime_errors()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all("code" in vars(kind) for kind in kinds)


def test_errors_live_in_the_leaf_module():
    assert {kind.__module__ for kind in runtime_errors()} == {errors.__name__}


def test_an_error_carries_its_place_and_hint():
    error = errors.DataError("no label", where="train.csv:17", hint="add one")
    assert str(error) == "train.csv:17: no label"
    assert str(errors.DataError("no label")) == "no label"
    assert error.to_dict() == {
        "code": "bad-data",
        "exit_code": 3,
        "message": "no label",
        "where": "train.csv:17",
        "hint": "add one",
    }
