"""`Model`: one base in memory, any of its adapters in use, swapped by changing what is fed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edge_tcur_runtime.data import Dataset, encode_targets
from edge_tcur_runtime.engines.session import open_session, require_names
from edge_tcur_runtime.errors import DataError, IncompatibleError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.tasks import Answer, Prediction, find_device_task, mean_by_weight

__all__ = ["Model", "Prediction"]


class Model:
    """A bundle's inference graph with at most one adapter attached.

    The base is loaded once. Attaching an adapter replaces one reference to the arrays that are fed,
    so a prediction that is under way on another thread finishes with the adapter it began with.

    Args:
        bundle: an opened (verified) bundle.
        threads: CPU threads; 0 takes all that this process may use.

    Raises:
        MissingEngineError: ONNX Runtime is not installed.
        IncompatibleError: it cannot load the graph, or the bundle has none.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        graph = bundle.graph("infer")
        if graph is None:
            raise IncompatibleError(
                "the bundle has no inference graph",
                where=str(bundle.root),
                hint="export it again with --target onnx",
            )
        self.bundle = bundle
        self.labels = bundle.manifest.labels
        self.task = find_device_task(bundle.manifest.task)
        self._session = open_session(graph, threads=threads)
        names = [value.name for value in self._session.get_inputs()]
        require_names(graph, "input", bundle.manifest.inputs, names)
        require_names(graph, "default for", names, bundle.manifest.inputs)
        require_names(graph, "output", ("logits",), [value.name for value in self._session.get_outputs()])
        optional = [value.name for value in self._session.get_overridable_initializers()]
        require_names(graph, "input", bundle.manifest.factor_names(), [*names, *optional])
        self._preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
        self._feeds: Mapping[str, np.ndarray] = {}

    def attach(self, adapter: Adapter | None) -> None:
        """Uses `adapter` from the next prediction on; None is the base.

        Raises:
            BaseMismatchError, IncompatibleError: it does not fit; the adapter in use stays.
        """
        self._feeds = {} if adapter is None else build_feeds(self.bundle.manifest, adapter)

    def outputs(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raw outputs f32 [samples, ...] of model inputs.

        Raises:
            IncompatibleError: the graph's outputs are not those of the task with the bundle's labels.
        """
        result: np.ndarray = self._session.run(["logits"], {**inputs, **self._feeds})[0]
        axes = self.task.output_axes(self.bundle.manifest.inputs, self.labels)
        fixed = [
            axis if isinstance(axis, int) else size for axis, size in zip(axes, result.shape, strict=False)
        ]
        if result.shape != tuple(fixed) or len(axes) != result.ndim:
            raise IncompatibleError(
                f"the graph gives {math.prod(result.shape[1:2])} outputs and the bundle has "
                f"{len(self.labels)} labels; its shape is {list(result.shape)}, that of the task "
                f"{self.task.name} is [{', '.join(map(str, axes))}]",
                where=str(self.bundle.root),
                hint="export the bundle again",
            )
        return result

    def predict(self, samples: Sequence[str] | np.ndarray, *, batch_size: int = 16) -> list[Answer]:
        """Answers for raw samples (texts, or images [n, *size] or [n, *size, c]): of a classification
        `Prediction`, of other tasks see `edge_tcur_runtime.tasks`."""
        results: list[Answer] = []
        for start in range(0, len(samples), batch_size):
            inputs = self._preprocess(samples[start : start + batch_size])
            results += self.task.answer(self.outputs(inputs), inputs, self.labels)
        return results

    def evaluate(self, dataset: Dataset, *, batch_size: int = 16) -> tuple[list[Answer], float]:
        """The answers to a data set with targets, and their score by the task's metric.

        Raises:
            DataError: no samples, no targets, or a label that the bundle does not have.
        """
        encoded = encode_targets(dataset, self.labels)  # an unknown label ends here, before the work
        if not len(dataset):
            raise DataError("the data set is empty", where=dataset.source, hint="add labelled samples")
        answers: list[Answer] = []
        scores, weights = [], []
        for start in range(0, len(dataset), batch_size):
            part = slice(start, start + batch_size)
            inputs = self._preprocess(dataset.samples[part])
            outputs, targets = self.outputs(inputs), self.task.batch_targets(encoded[part], inputs)
            answers += self.task.answer(outputs, inputs, self.labels)
            scores.append(self.task.score(outputs, targets))
            weights.append(self.task.weight(targets))
        return answers, mean_by_weight(scores, weights)

    def score(self, dataset: Dataset, *, batch_size: int = 16) -> float:
        """Score of the answers to a data set; see `evaluate`."""
        return self.evaluate(dataset, batch_size=batch_size)[1]
