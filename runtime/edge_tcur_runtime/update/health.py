"""Whether a published adapter works on this device: the check of every adapter, and the signed answers.

The publisher computes the outputs of the bundle's canary where it has the bundle and signs some of them: of
each of the first samples the largest one, and where it is. Another processor or ONNX Runtime differs in the
last digits, so they are compared with a tolerance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_tcur_runtime.canary import read_canary
from edge_tcur_runtime.errors import (
    BadInputError,
    BudgetError,
    DiskError,
    EdgeError,
    HealthCheckError,
    MissingEngineError,
)
from edge_tcur_runtime.examine import trial_model, try_out
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle, Manifest
from edge_tcur_runtime.formats.offer import CanaryAnswers

SAMPLES = 4  # of the canary that are signed
TOLERANCE = 50  # thousandths, plus 2 % of the value
_HINT = "the adapter before it stays in use"


def canary_digest(bundle_root: Path, manifest: Manifest) -> str | None:
    """``sha256:<hex>`` of the canary's inputs; None where the bundle has no canary."""
    canary = read_canary(bundle_root, manifest)
    return None if canary is None else canary.digest


def canary_answers(bundle: Bundle, adapter: Adapter) -> CanaryAnswers | None:
    """What the adapter answers to the first `SAMPLES` samples of the bundle's canary.

    Returns:
        of each sample the place of its largest output, counted through all outputs of the sample in C order
        (of a classification that is the class), and that output in thousandths;
        None where the bundle has no canary or no inference graph.

    Raises:
        HealthCheckError: the adapter does not work with this bundle.
    """
    outputs = _outputs(bundle, adapter)
    if outputs is None:
        return None
    rows = _rows(outputs)[:SAMPLES]
    answers = rows.argmax(axis=1)
    values = np.rint(1000 * rows[np.arange(len(rows)), answers])
    return CanaryAnswers(tuple(int(x) for x in answers), tuple(int(x) for x in values))


def check_health(
    bundle: Bundle, adapter: Adapter, expected: CanaryAnswers | None, expected_inputs: str | None
) -> str:
    """The health check of every adapter, and its answers compared with the signed ones.

    Args:
        expected: the signed answers, None where there are none.
        expected_inputs: digest of the canary's inputs that they belong to.

    Returns:
        what was checked, for people.

    Raises:
        HealthCheckError: it does not fit, does not answer the canary as `edge_tcur_runtime.predict.Model`
            asks of every adapter, or gives other answers.
        IncompatibleError: the base itself answers otherwise here, or the graph cannot be loaded.
        BudgetError: the device has not enough memory now; that says nothing about the adapter.
    """
    outputs = _outputs(bundle, adapter)
    if outputs is None:
        return "it fits the bundle (which has no canary to run)"
    if expected is None or canary_digest(bundle.root, bundle.manifest) != expected_inputs:
        return f"finite outputs on {len(outputs)} canary samples"
    rows = _rows(outputs)
    known = all(0 <= answer < rows.shape[1] for answer in expected.answers)
    if len(rows) < len(expected.answers) or not known:
        raise HealthCheckError("the signed canary is of another size than this bundle's", hint=_HINT)
    for sample, (answer, thousandths) in enumerate(zip(expected.answers, expected.outputs, strict=True)):
        row = 1000 * rows[sample]
        allowed = TOLERANCE + abs(thousandths) / 50
        if abs(row[answer] - thousandths) > allowed or row.max() - row[answer] > allowed:
            raise HealthCheckError(
                f"canary sample {sample}: output {answer} gives {row[answer] / 1000:.3f} and the largest is "
                f"{row.max() / 1000:.3f}; the publisher signed {thousandths / 1000:.3f}",
                hint=_HINT,
            )
    return f"the signed answers on {len(expected.answers)} canary samples"


def _rows(outputs: np.ndarray) -> np.ndarray:
    """Outputs of any shape as f32 [samples, outputs of a sample]."""
    return outputs.reshape(len(outputs), -1)


def _outputs(bundle: Bundle, adapter: Adapter) -> np.ndarray | None:
    """Outputs f32 [samples, ...] on the whole canary; None where there is nothing to run.

    Raises:
        IncompatibleError and others: the bundle or the ONNX Runtime here does not work, which says nothing
            about the adapter (`edge_tcur_runtime.examine.trial_model`).
    """
    model = trial_model(bundle)
    try:
        return try_out(bundle, model, adapter)
    except (BadInputError, MissingEngineError, BudgetError, DiskError):
        raise
    except EdgeError as error:
        raise HealthCheckError(error.message, where=error.where, hint=_HINT) from error
