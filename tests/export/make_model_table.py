"""Measures the models of the zoo on the targets, and writes the table of docs/models.md.

    python tests/export/make_model_table.py [--model NAME]... [--column NAME]...

Cells that are not asked for stay as they are. All of them take about an hour of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))
# The processes that are started beside this one find the packages as it does.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

import model_table
import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(zoo.MODELS))
    parser.add_argument("--column", action="append", choices=zoo.COLUMNS)
    arguments = parser.parse_args()
    columns = tuple(arguments.column or zoo.COLUMNS)
    for name in arguments.model or zoo.MODELS:
        with TemporaryDirectory() as work:
            measured = zoo.measure(name, Path(work) / "model", columns)
        rows = model_table.read()
        rows[name] |= {column: model_table.clean(cell) for column, cell in measured.items()}
        model_table.write(rows)
        print(name, measured, flush=True)


if __name__ == "__main__":
    main()
