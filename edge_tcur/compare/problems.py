"""The problems of a comparison: a base, a task and its samples, for one seed.

A problem is named by a short text, so that records can be resumed: ``trec-100`` is the text problem
``trec`` with up to 100 training rows a class.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save
from torch import nn

from edge_tcur.compare import segmentation
from edge_tcur.data import Samples, prepare
from edge_tcur.models import Base, load_base
from edge_tcur.quickstart import digits
from edge_tcur.tasks import Task, find_task
from edge_tcur.training.loop import score_model
from edge_tcur_runtime.atomic import write_atomic
from edge_tcur_runtime.data import Dataset, label_names, load_dataset
from edge_tcur_runtime.errors import DataError

_BUCKETS = [8, 12, 16, 20, 24, 32, 40, 48]
_LONGEST = 64  # tokens
_VALIDATION_ROWS = 50  # a class, beside the training rows
_TEST_ROWS = 1000
_BASE_SEED = 0
_USER_PARTS = ("sample", "local", "test")


@dataclass(frozen=True)
class Problem:
    """One task at one seed.

    Attributes:
        base: freshly loaded; a method changes it in place.
        train, validation, test: disjoint; the learning rate is chosen on `validation`.
        control: names of the modules that the head-only control trains where the base has no new head.
        epochs: passes over `train`.
        rehearsal_rate: learning rate of rehearsals: the one at which LoRA did best in its sweep.
        score: of a model on samples, 0 to 1.
    """

    base: Base
    task: Task
    train: Samples
    validation: Samples
    test: Samples
    control: tuple[str, ...]
    epochs: int
    rehearsal_rate: float
    score: Callable[[nn.Module, Samples, Task], float] = score_model


@dataclass(frozen=True)
class TextProblem:
    """Few-shot text classification on a pretrained encoder.

    Attributes:
        name: of the records.
        base: reference of the encoder.
        train, test: CSV files with a ``text`` column and one other, the label.
        shots: training rows of each class (all, where it has fewer).
    """

    name: str
    base: str
    train: Path
    test: Path
    shots: int
    epochs: int = 10
    rehearsal_rate: float = 1e-3

    def prepare(self, work: Path) -> None:
        """Nothing: the encoder is read from where it is."""

    def load(self, seed: int, work: Path) -> Problem:
        """See `Problem`; shuffles the training file with the seed."""
        task = find_task("text-classification")
        rows, later = (_read(path) for path in (self.train, self.test))
        labels = label_names(rows)
        base = load_base(self.base, task, labels, {"max_length": 0})
        longest = min(_LONGEST, base.preprocessing["max_length"])
        buckets = [*(size for size in _BUCKETS if size < longest), longest]
        spec = {**base.preprocessing, "max_length": longest, "buckets": buckets}
        folder = work / self.name
        folder.mkdir(parents=True, exist_ok=True)
        if base.tokenizer is not None:  # old-or-new: another worker may be reading it
            write_atomic(folder / "tokenizer.json", base.tokenizer.encode())
        few, validation = _few_shot(rows, self.shots, seed)
        pick = np.sort(np.random.Generator(np.random.PCG64(0)).permutation(len(later))[:_TEST_ROWS])
        train, held, test = (
            prepare(part, labels, spec, folder, task) for part in (few, validation, later.select(pick))
        )
        return Problem(
            base, task, train, held, test, (), epochs=self.epochs, rehearsal_rate=self.rehearsal_rate
        )


def _read(path: Path) -> Dataset:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=str(path)) from error
    others = [name for name in header if name != "text"]
    if len(others) != 1 or len(header) != 2:
        raise DataError(
            f"the columns are {', '.join(header)}; expected text and one other", where=f"{path}, line 1"
        )
    return load_dataset(path, "text", label_column=others[0])


def _few_shot(rows: Dataset, shots: int, seed: int) -> tuple[Dataset, Dataset]:
    """The first `shots` rows of each class in a shuffle, and the next few for validation.

    A class with too few rows gives a fifth of them to validation.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    names = np.asarray(rows.labels)
    kept, held = [], []
    for label in label_names(rows):
        members = generator.permutation(np.flatnonzero(names == label))
        count = min(shots, len(members) - len(members) // 5)
        kept.append(members[:count])
        held.append(members[count : count + _VALIDATION_ROWS])
    return rows.select(np.sort(np.concatenate(kept))), rows.select(np.sort(np.concatenate(held)))


@dataclass(frozen=True)
class DigitsProblem:
    """The quickstart's user: a Vision Transformer of upright digits meets turned and inverted ones."""

    name: str = "digits"
    epochs: int = 60
    rehearsal_rate: float = 4e-3

    def prepare(self, work: Path) -> None:
        """Writes the scans and trains the base, once, into `work`; before any `load`."""
        folder = work / "digits"
        if (folder / "base").exists():
            return
        paths = digits.write_digits(folder / "data", _BASE_SEED)
        shutil.rmtree(folder / "draft", ignore_errors=True)
        digits.train_base(paths.base, folder / "draft", _BASE_SEED, lambda *_: None)
        (folder / "draft").rename(folder / "base")

    def load(self, seed: int, work: Path) -> Problem:
        """See `Problem`; the seed splits the user's scans."""
        folder = work / "digits"
        task = find_task(digits.TASK)
        everything = [load_dataset(folder / "data" / f"{part}.npz", "image") for part in _USER_PARTS]
        labels = label_names(everything[0])
        base = load_base(str(folder / "base"), task, labels, {})
        scans = _join(everything)
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(scans))
        cuts = (order[:300], order[300:500], order[500:])
        train, held, test = (
            prepare(scans.select(np.sort(cut)), labels, base.preprocessing, folder, task) for cut in cuts
        )
        return Problem(
            base,
            task,
            train,
            held,
            test,
            control=("module.classifier",),
            epochs=self.epochs,
            rehearsal_rate=self.rehearsal_rate,
        )


def _join(parts: list[Dataset]) -> Dataset:
    samples = np.concatenate([np.asarray(part.samples) for part in parts])
    labels = tuple(label for part in parts for label in part.labels or ())
    places = tuple(place for part in parts for place in part.places)
    return replace(parts[0], samples=samples, labels=labels, places=places)


@dataclass(frozen=True)
class SegmentationProblem:
    """Pages of four digits, every pixel labelled: see `edge_tcur.compare.segmentation`."""

    name: str = "segmentation"
    epochs: int = 40
    rehearsal_rate: float = 4e-3

    def prepare(self, work: Path) -> None:
        """Trains the base, once, into `work`; before any `load`."""
        kept = work / "segmentation" / "base.safetensors"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, save(segmentation.train_base(_BASE_SEED).state_dict()))

    def load(self, seed: int, work: Path) -> Problem:
        """See `Problem`; the seed draws the user's pages."""
        model = segmentation.build_model()
        model.load_state_dict(load_file(work / "segmentation" / "base.safetensors"))
        train, held, test = segmentation.user_pages(seed)
        base = Base(model, "segmentation", segmentation.INPUTS, {}, labels=segmentation.LABELS)
        return Problem(
            base,
            segmentation.TASK,
            train,
            held,
            test,
            control=("head",),
            epochs=self.epochs,
            rehearsal_rate=self.rehearsal_rate,
            score=segmentation.mean_dice,
        )


AnyProblem = TextProblem | DigitsProblem | SegmentationProblem
