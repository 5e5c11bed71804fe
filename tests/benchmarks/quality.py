"""The comparison that the documentation draws from: methods, problems and seeds of the full grid.

    python tests/benchmarks/quality.py --data DIR --out docs/data/quality

`DIR` holds ``trec``, ``sst2`` and ``banking77``, each with train.csv and test.csv; without it the built-in
problems run alone. Writes records.jsonl, comparison.png and tables.md. Resumes where it stopped.
``--reduced`` is a grid of minutes, for continuous integration.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_tcur.compare.problems import AnyProblem, DigitsProblem, SegmentationProblem, TextProblem
from edge_tcur.compare.records import Record, read_records
from edge_tcur.compare.report import describe, draw_plot, markdown, summarize
from edge_tcur.compare.runner import Grid, run_grid

BASE = "all-MiniLM-L6-v2"
SHOTS = {"trec": (100,), "sst2": (300,), "banking77": (10,)}
AIMED = (
    "head",
    "full",
    "lora-r8",
    "update-sketch-r8",
    "update-sketch-r16",
    "update-sketch-shared-r3",
    "update-r8",
    "gradient-r8",
    "gradient-shared-r8",
    "lora-xs-r8",
    "curlora-r8",
)
OTHERS = (
    "paper-r8",
    "update-shared-r8",
    "update-sketch-r32",
    "sketch-r8",
    "sketch-r16",
    "gradient-r16",
    "lora-r1",
    "dora-r8",
    "vera-r256",
    "ia3",
    "gradient-svd-r8",
)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the text data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--problem", action="append", help="only this one; may be said again")
    parser.add_argument("--method", action="append", help="only this one; may be said again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where runs train, such as cuda")
    parser.add_argument("--reduced", action="store_true")
    options = parser.parse_args()
    if options.reduced:
        grid = Grid([DigitsProblem(epochs=4)], ("head", "lora-r8", "gradient-r8", "update-sketch-r8"), 1)
    else:
        problems = [p for p in _problems(options.data) if not options.problem or p.name in options.problem]
        grid = Grid(problems, options.method or (*AIMED, *OTHERS), options.seeds, dict.fromkeys(OTHERS, 3))
    run_grid(grid, options.out, workers=options.workers, device=options.device, on_record=_show)
    summary = summarize(read_records(options.out))  # of earlier calls too
    draw_plot(summary, options.out / "comparison.png")
    (options.out / "tables.md").write_text(markdown(summary), encoding="utf-8")
    sys.stdout.write(describe(summary) + "\n")


def _problems(data: Path | None) -> list[AnyProblem]:
    found: list[AnyProblem] = [DigitsProblem(), SegmentationProblem()]
    for name, shots in SHOTS.items() if data is not None else ():
        assert data is not None
        train, test = (data / name / f"{part}.csv" for part in ("train", "test"))
        found += [TextProblem(f"{name}-{count}", BASE, train, test, count) for count in shots]
    return found


def _show(record: Record, left: int) -> None:
    sys.stderr.write(
        f"{record.problem} {record.method} {record.rate:g} seed {record.seed}: validation "
        f"{record.validation:.3f} test {record.test:.3f}, {record.seconds:.0f} s; {left} left\n"
    )


if __name__ == "__main__":
    main()
