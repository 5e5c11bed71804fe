"""What differential privacy costs in accuracy, on the committed bundle and its user's pictures.

    python tests/benchmarks/privacy_cost.py

Mean and spread, over runs with fresh noise, of the accuracy on 16 held-out pictures (64 are trained on).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import personalize
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings, PrivacySettings, SGDSettings

DATA = Path(__file__).parents[1] / "data"
RUNS = 6
TARGETS = (None, 32.0, 8.0, 2.0)


def main() -> None:
    bundle = open_bundle(DATA / "bundle-v1")
    user = load_dataset(DATA / "user.npz", "image", image_size=(8, 8), channels=1)
    for target in TARGETS:
        for optimizer in (AdamWSettings(), SGDSettings()):
            privacy = None if target is None else PrivacySettings(epsilon=target, delta=0.01)
            found = [
                personalize(
                    bundle,
                    user,
                    PersonalizeSettings(
                        epochs=60, threads=1, engine="ort-step", holdout=0.2, patience=0, seed=seed,
                        optimizer=optimizer, privacy=privacy,
                    ),
                )
                for seed in range(RUNS)
            ]  # fmt: skip
            scores = [result.score_after for result in found if result.score_after is not None]
            noise = "-" if found[0].privacy is None else f"{found[0].privacy['noise_multiplier']:.2f}"
            print(
                f"epsilon {target or 'none'}, noise {noise}, {type(optimizer).__name__}: "
                f"accuracy {np.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f}), "
                f"{np.median([result.step_seconds for result in found]) * 1e3:.1f} ms a step"
            )


if __name__ == "__main__":
    main()
