"""Whether an adapter works on this device: the inference graph with the adapter, on the bundle's canary.

The publisher computes the same outputs where it has the bundle and signs the first of them; another
processor or ONNX Runtime differs in the last digits, so they are compared with a tolerance.
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
from edge_tcur_runtime.feeds import check_fit
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle, Manifest
from edge_tcur_runtime.formats.offer import CanaryAnswers

SAMPLES = 4  # of the canary that are signed
_NO_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate memory")  # as ONNX Runtime says it
TOLERANCE = 50  # thousandths, plus 2 % of the value


def canary_digest(bundle_root: Path, manifest: Manifest) -> str | None:
    """``sha256:<hex>`` of the canary's inputs; None where the bundle has no canary."""
    canary = read_canary(bundle_root, manifest)
    return None if canary is None else canary.digest


def canary_answers(bundle: Bundle, adapter: Adapter) -> CanaryAnswers | None:
    """What the adapter answers to the first `SAMPLES` samples of the bundle's canary.

    Returns:
        None where the bundle has no canary or no inference graph.

    Raises:
        HealthCheckError: the adapter does not work with this bundle.
    """
    outputs = _outputs(bundle, adapter)
    if outputs is None:
        return None
    rows = outputs[:SAMPLES]
    answers = rows.argmax(axis=-1)
    values = np.rint(1000 * rows[np.arange(len(rows)), answers])
    return CanaryAnswers(tuple(int(x) for x in answers), tuple(int(x) for x in values))


def check_health(
    bundle: Bundle, adapter: Adapter, expected: CanaryAnswers | None, expected_inputs: str | None
) -> str:
    """Loads the inference graph, feeds the adapter and compares its answers with the signed ones.

    Args:
        expected: the signed answers, None where there are none.
        expected_inputs: digest of the canary's inputs that they belong to.

    Returns:
        what was checked, for people.

    Raises:
        HealthCheckError: it does not fit, gives NaN or infinity, or other answers.
        BudgetError: the device has not enough memory now; that says nothing about the adapter.
    """
    outputs = _outputs(bundle, adapter)
    if outputs is None:
        return "it fits the bundle (which has no canary to run)"
    if expected is None or canary_digest(bundle.root, bundle.manifest) != expected_inputs:
        return f"finite outputs on {len(outputs)} canary samples"
    if len(outputs) < len(expected.answers) or max(expected.answers, default=0) >= outputs.shape[-1]:
        raise HealthCheckError("the signed canary is of another size than this bundle's")
    for sample, (answer, thousandths) in enumerate(zip(expected.answers, expected.outputs, strict=True)):
        row = 1000 * outputs[sample]
        allowed = TOLERANCE + abs(thousandths) / 50
        if abs(row[answer] - thousandths) > allowed or row.max() - row[answer] > allowed:
            raise HealthCheckError(
                f"canary sample {sample}: class {answer} gives {row[answer] / 1000:.3f} and the largest is "
                f"{row.max() / 1000:.3f}; the publisher signed {thousandths / 1000:.3f}",
                hint="the adapter before it stays in use",
            )
    return f"the signed answers on {len(expected.answers)} canary samples"


def no_memory() -> BudgetError:
    """The error of a check that ran out of memory."""
    hint = "nothing was changed; run it again when other programs have ended"
    return BudgetError("not enough memory to try the adapter now", hint=hint)


def _outputs(bundle: Bundle, adapter: Adapter) -> np.ndarray | None:
    """Finite outputs f32 [samples, classes] of the whole canary; None where there is nothing to run."""
    from edge_tcur_runtime.predict import Model

    canary = read_canary(bundle.root, bundle.manifest)
    try:
        if canary is None or bundle.graph("infer") is None:
            check_fit(bundle.manifest, adapter)
            return None
        model = Model(bundle, threads=1, check=False)
        model.attach(adapter)
        outputs = model.outputs(canary.inputs)
    except BadInputError:
        raise
    except EdgeError as error:
        if isinstance(error, (MissingEngineError, BudgetError, DiskError)):
            raise
        raise HealthCheckError(error.message, where=error.where, hint=error.hint) from error
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY):
            raise no_memory() from error
        raise HealthCheckError(f"the graph cannot run with it: {error}") from error
    if not np.isfinite(outputs).all():
        raise HealthCheckError("it gives NaN or infinity", hint="the adapter before it stays in use")
    return outputs
