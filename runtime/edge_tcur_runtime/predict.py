"""`Model`: one base in memory, any of its adapters in use, swapped by changing what is fed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any

import numpy as np

from edge_tcur_runtime.canary import NOT_FINITE, departs, no_memory, ran_out_of_memory, read_canary
from edge_tcur_runtime.cores import within
from edge_tcur_runtime.data import Dataset, encode_targets
from edge_tcur_runtime.engines.providers import ON_CPU, Placement
from edge_tcur_runtime.engines.readable import require_readable
from edge_tcur_runtime.engines.session import error_line, open_session, require_names
from edge_tcur_runtime.errors import DataError, EdgeError, IncompatibleError, IntegrityError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.schema import nearest
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.tasks import Answer, Prediction, find_device_task, mean_by_weight

__all__ = ["Model", "Prediction"]

_Feeds = Mapping[str, np.ndarray]


class Model:
    """A bundle's inference graph, and any number of its adapters.

    The base is loaded once. `attach` sets the adapter of all threads; ``with model.adapter(name)`` uses
    one that was loaded by name, in this thread (or asyncio task) alone. Both replace one reference to
    the arrays that are fed, so a prediction that is under way finishes with the adapter it began with.

    Args:
        bundle: an opened (verified) bundle.
        threads: CPU threads; 0 takes all that this process may use.
        check: run the bundle's canary on the base now, and on each adapter as it is loaded.
        placement: the provider that runs it (`edge_tcur_runtime.engines.selfcheck.choose_provider`).
        prepack: hold the weights packed for the processor as well: one sample is answered up to 1.5 x
            sooner, for as much memory again as the weights of the products take in float32.

    Raises:
        MissingEngineError: ONNX Runtime is not installed.
        IncompatibleError: it cannot load the graph, the bundle has none, or its answers to the canary are
            not those that were exported.
        IntegrityError: the graph or the base was changed since the bundle was opened.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        check: bool = True,
        placement: Placement = ON_CPU,
        prepack: bool = False,
    ) -> None:
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
        files = bundle.manifest.files
        require_readable(bundle, graph)
        self._session = open_session(
            graph, threads=within(threads), files=files, placement=placement, prepack=prepack
        )
        names = [value.name for value in self._session.get_inputs()]
        require_names(graph, "input", bundle.manifest.inputs, names)
        require_names(graph, "default for", names, bundle.manifest.inputs)
        require_names(graph, "output", ("logits",), [value.name for value in self._session.get_outputs()])
        optional = [value.name for value in self._session.get_overridable_initializers()]
        require_names(graph, "input", bundle.manifest.factor_names(), [*names, *optional])
        self._preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root, files)
        self._feeds: _Feeds = {}
        self._loaded: dict[str | None, _Feeds] = {None: {}}
        self._own: ContextVar[_Feeds | None] = ContextVar("adapter", default=None)
        self._canary = read_canary(bundle.root, bundle.manifest) if check else None
        self._base_answers: np.ndarray | None = None
        if self._canary is not None:
            outputs = self._check({}, self._canary.base, "the base", IncompatibleError)
            self._base_answers = self._canary.part(outputs)

    def attach(self, adapter: Adapter | None) -> None:
        """Uses `adapter` from the next prediction on, in every thread that is not inside `adapter`; None
        is the base. Runs no canary: `load` does, ahead of time.

        Raises:
            BaseMismatchError, IncompatibleError: it does not fit; the adapter in use stays.
        """
        self._feeds = {} if adapter is None else build_feeds(self.bundle.manifest, adapter)

    def load(self, name: str, adapter: Adapter) -> None:
        """Keeps `adapter` under a name for `adapter`; one that had the name before is replaced.

        Raises:
            BaseMismatchError, IncompatibleError: it does not fit.
            IntegrityError, BudgetError: see `try_out`.
        """
        self._loaded[name], _ = self._checked(adapter)

    def try_out(self, adapter: Adapter) -> np.ndarray | None:
        """The check of `load`; nothing is kept.

        Returns:
            its outputs f32 [samples, ...] on the whole canary; None without one, or without `check`.

        Raises:
            BaseMismatchError, IncompatibleError: it does not fit.
            IntegrityError: the graph cannot run with it; or its answers to the canary are not finite, are
                those with a core of zero although its own is not, or, of the adapter that came with the
                bundle, not the exported ones.
            BudgetError: memory is short, which says nothing about the adapter.
        """
        return self._checked(adapter)[1]

    def unload(self, name: str) -> None:
        """Forgets an adapter; blocks that use it finish with it.

        Raises:
            UsageError: there is none of that name.
        """
        self._feeds_of(name)
        self._loaded.pop(name, None)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that were loaded."""
        return tuple(name for name in list(self._loaded) if name is not None)  # others may load meanwhile

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Uses the adapter of that name in this thread while the block runs; None is the base.

        Raises:
            UsageError: there is none of that name.
        """
        token = self._own.set(self._feeds_of(name))
        try:
            yield
        finally:
            self._own.reset(token)

    def _feeds_of(self, name: str | None) -> _Feeds:
        try:
            return self._loaded[name]
        except KeyError:
            guess = nearest(str(name), self.loaded)
            hint = f"did you mean {guess!r}?" if guess else "load it first"
            raise UsageError(f"no adapter {name!r} was loaded", hint=hint) from None

    def _checked(self, adapter: Adapter) -> tuple[_Feeds, np.ndarray | None]:
        """What is fed for an adapter, after the canary, and what it answered to that."""
        feeds = build_feeds(self.bundle.manifest, adapter)
        if self._canary is None:
            return feeds, None
        own = self._canary.adapter if _is_own(self.bundle, adapter) else None
        outputs = self._check(feeds, own, "the adapter", IntegrityError)
        idle = all(not factors.core.any() for factors in adapter.factors.values())
        if not idle and np.array_equal(self._canary.part(outputs), self._without_cores(adapter)):
            raise IntegrityError(
                "the adapter changes nothing: with cores of zero the canary's answers are the same bits",
                where=str(self.bundle.root),
                hint="this ONNX Runtime does not feed the factors; update it",
            )
        return feeds, outputs

    def _without_cores(self, adapter: Adapter) -> np.ndarray:
        """Answers to the canary with cores of zero: the base's, or with the same extras (a trained head)."""
        assert self._canary is not None
        if not adapter.extras and self._base_answers is not None:
            return self._base_answers
        zero = {group: part.with_core(np.zeros_like(part.core)) for group, part in adapter.factors.items()}
        feeds = build_feeds(self.bundle.manifest, Adapter(adapter.header, zero, adapter.extras))
        return self._canary.part(self._answers(feeds, "the adapter without cores", IntegrityError))

    def _answers(self, feeds: _Feeds, what: str, kind: type[EdgeError]) -> np.ndarray:
        """Outputs on the canary's inputs; ONNX Runtime's errors share no class."""
        assert self._canary is not None
        try:
            return self._run(self._canary.inputs, feeds)
        except Exception as error:
            if ran_out_of_memory(error):
                raise no_memory() from error
            raise kind(
                f"{what} cannot run on the bundle's canary: {error_line(error)}", where=str(self.bundle.root)
            ) from error

    def _check(
        self, feeds: _Feeds, expected: np.ndarray | None, what: str, kind: type[EdgeError]
    ) -> np.ndarray:
        """Outputs on the canary; refused where they are not finite, or in the part that the canary holds not
        the expected ones."""
        assert self._canary is not None
        outputs = self._shaped(self._answers(feeds, what, kind))
        found = self._canary.part(outputs)
        problem = departs(found, found if expected is None else expected)
        if problem is None and not np.isfinite(outputs).all():
            problem = NOT_FINITE
        if problem is not None:
            raise kind(
                f"{what} gives {problem} on the bundle's canary",
                where=str(self.bundle.root),
                hint="update ONNX Runtime, or fetch the bundle and the adapter again",
            )
        return outputs

    def _run(self, inputs: Mapping[str, np.ndarray], feeds: _Feeds) -> np.ndarray:
        result: np.ndarray = self._session.run(["logits"], {**inputs, **feeds})[0]
        return result

    def outputs(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raw outputs f32 [samples, ...] of model inputs.

        Raises:
            IncompatibleError: the graph's outputs are not those of the task with the bundle's labels.
        """
        own = self._own.get()
        return self._shaped(self._run(inputs, self._feeds if own is None else own))

    def _shaped(self, result: np.ndarray) -> np.ndarray:
        """The outputs, which must have the axes of the task."""
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

    def stream(
        self, samples: Iterable[str] | Iterable[np.ndarray], *, batch_size: int = 16
    ) -> Iterator[Answer]:
        """Answers for samples as they come, in their order; no more than `batch_size` are held at once.

        Each batch is answered with the adapter that is in use when it is asked for. Where `samples` ends
        with an exception, what came before it is answered first.

        Args:
            samples: texts, or images [*size] or [*size, c], of any number.
            batch_size: how many are answered together; with 1 no answer waits for the next sample.

        Raises:
            UsageError: a batch size below 1.
            DataError: a sample that the model does not take.
        """
        if batch_size < 1:
            raise UsageError(f"a batch of {batch_size} samples; expected 1 or more")
        return self._streamed(iter(samples), batch_size)

    def _streamed(self, source: Iterator[Any], batch_size: int) -> Iterator[Answer]:
        problem: Exception | None = None
        while problem is None:
            batch: list[Any] = []
            try:
                for sample in islice(source, batch_size):
                    batch.append(sample)  # noqa: PERF402 - what came before an exception is kept
            except Exception as error:  # noqa: BLE001 - the source's own; raised after the answers
                problem = error
            if not batch:
                break
            samples = _stacked(batch) if self.task.kind == "image" else batch
            yield from self.predict(samples, batch_size=batch_size)
        if problem is not None:
            raise problem

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


def _stacked(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one shape as one array [n, ...].

    Raises:
        DataError: they differ in shape.
    """
    shapes = {np.shape(image) for image in images}
    if len(shapes) > 1:
        raise DataError(
            f"images of different shapes in one batch: {sorted(shapes)}",
            hint="resize them to the model's size",
        )
    return np.stack(images)


def _is_own(bundle: Bundle, adapter: Adapter) -> bool:
    """Whether an adapter is the one that came with the bundle: writing it gives the same bytes."""
    entry = bundle.manifest.files.get(bundle.manifest.adapter or "")
    return entry is not None and digest_bytes(serialize_adapter(adapter)) == entry.sha256
