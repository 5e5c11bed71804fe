"""The health check of an adapter: whether it works with a bundle on this device.

There is one definition, `Model.try_out`: what `Model.load` asks of every adapter, `edge_tcur_runtime.trial`
of one that is put in use, and `edge_tcur_runtime.update.health` of a published one.
"""

from __future__ import annotations

import numpy as np

from edge_tcur_runtime.feeds import check_fit
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.predict import Model


def trial_model(bundle: Bundle) -> Model | None:
    """The model that tries adapters; None where the bundle has no inference graph.

    Raises:
        IncompatibleError and others: see `Model`. The bundle or the ONNX Runtime here does not work, whatever
            adapter is tried.
    """
    return None if bundle.graph("infer") is None else Model(bundle, threads=1)


def try_out(bundle: Bundle, model: Model | None, adapter: Adapter) -> np.ndarray | None:
    """The health check with a `trial_model`; where there is none, the adapter must fit the bundle.

    Returns:
        its outputs f32 [samples, ...] on the bundle's canary; None where there is nothing to run.

    Raises:
        BaseMismatchError, IncompatibleError: it does not fit.
        IntegrityError, BudgetError: see `Model.try_out`.
    """
    check_fit(bundle.manifest, adapter)
    return None if model is None else model.try_out(adapter)


def examine(bundle: Bundle, adapter: Adapter) -> np.ndarray | None:
    """`try_out` with a model of its own; raises what that and `trial_model` raise."""
    return try_out(bundle, trial_model(bundle), adapter)
