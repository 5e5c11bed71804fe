"""Compares the frames and groupings on the quickstart's task: `python tests/benchmarks/frames.py`.

One seed, every combination with three learning rates, accuracy on the user's test scans.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_tcur.data import prepare
from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.models import load_base
from edge_tcur.quickstart.digits import TASK, train_base, write_digits
from edge_tcur.tasks import find_task
from edge_tcur.training.loop import LoopSettings, accuracy, fit
from edge_tcur_runtime.data import load_dataset

RATES = {"raw": (0.002, 0.01, 0.03), "orthonormal": (0.01, 0.03, 0.1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    task = find_task(TASK)
    with TemporaryDirectory() as work:
        root = Path(work)
        digits = write_digits(root / "data", options.seed)
        train_base(digits.base, root / "base", options.seed, lambda epoch, loss: None)
        for grouping in ("projection", "shape"):
            for frame, rates in RATES.items():
                scores = []
                for rate in rates:
                    base = load_base(str(root / "base"), task, tuple("0123456789"), {})
                    parts = [
                        prepare(load_dataset(path, "image"), base.labels, base.preprocessing, root)
                        for path in (digits.sample, digits.test)
                    ]
                    injection = inject(base.model, TCurConfig(grouping=grouping, frame=frame))
                    settings = LoopSettings(options.epochs, batch_size=32, seed=options.seed)
                    fit(base.model, [(injection.parameters(), rate)], parts[0], task, settings)
                    scores.append(accuracy(base.model, parts[1], task))
                row = "  ".join(f"lr {rate}: {score:.1%}" for rate, score in zip(rates, scores, strict=True))
                sys.stdout.write(f"{grouping:<12}{frame:<13}{row}  best {max(scores):.1%}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
