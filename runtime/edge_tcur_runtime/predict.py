"""`Model`: one base in memory, any of its adapters in use, swapped by changing what is fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_tcur_runtime.data import Dataset, encode_labels
from edge_tcur_runtime.engines.session import open_session, require_names
from edge_tcur_runtime.errors import DataError, IncompatibleError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.preprocess import build_preprocessor


@dataclass(frozen=True)
class Prediction:
    """The answer to one sample.

    Attributes:
        label: the most probable class.
        scores: probability of every class, in label order; they sum to 1.
    """

    label: str
    scores: tuple[float, ...]


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
        """Raw outputs f32 [samples, classes] of model inputs.

        Raises:
            IncompatibleError: the graph has another number of classes than the bundle has labels.
        """
        result: np.ndarray = self._session.run(["logits"], {**inputs, **self._feeds})[0]
        if result.shape[-1] != len(self.labels):
            raise IncompatibleError(
                f"the graph gives {result.shape[-1]} outputs and the bundle has {len(self.labels)} labels",
                where=str(self.bundle.root),
                hint="export the bundle again",
            )
        return result

    def predict(self, samples: Sequence[str] | np.ndarray, *, batch_size: int = 16) -> list[Prediction]:
        """Predictions for raw samples (texts, or images [n, h, w] or [n, h, w, c])."""
        results = []
        for start in range(0, len(samples), batch_size):
            outputs = self.outputs(self._preprocess(samples[start : start + batch_size]))
            shifted = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
            scores = shifted / shifted.sum(axis=-1, keepdims=True)
            results += [
                Prediction(self.labels[int(row.argmax())], tuple(float(score) for score in row))
                for row in scores
            ]
        return results

    def accuracy(self, dataset: Dataset, *, batch_size: int = 16) -> float:
        """Part of a labelled data set that is answered correctly, 0 to 1.

        Raises:
            DataError: see `accuracy_of`.
        """
        encode_labels(dataset, self.labels)  # an unknown label ends here, before the work
        return accuracy_of(self.predict(dataset.samples, batch_size=batch_size), dataset, self.labels)


def accuracy_of(predictions: Sequence[Prediction], dataset: Dataset, labels: Sequence[str]) -> float:
    """Part of a labelled data set that these predictions answer correctly, 0 to 1.

    Raises:
        DataError: no samples, no labels, or a label that is not in `labels`.
    """
    targets = encode_labels(dataset, labels)
    if not len(targets):
        raise DataError("the data set is empty", where=dataset.source, hint="add labelled samples")
    answers = [labels.index(item.label) for item in predictions]
    return float(np.mean(np.asarray(answers) == targets))
