"""What each task means on a device, against definitions written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.errors import ConfigError, IncompatibleError
from edge_tcur_runtime.formats.bundle import InputSpec
from edge_tcur_runtime.tasks import (
    DEVICE_TASKS,
    IGNORED,
    Likelihood,
    Metric,
    find_device_task,
    mean_by_weight,
)

PICTURE = {"pixel_values": InputSpec("float32", ("batch", 1, 4, 6))}
VOLUME = {"pixel_values": InputSpec("float32", ("batch", 1, 2, 4, 6))}
TEXT = {name: InputSpec("int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("name", "inputs", "labels", "targets", "outputs"),
    [
        ("text-classification", TEXT, "abc", ("batch",), ("batch", 3)),
        ("image-regression", PICTURE, "ab", ("batch", 2), ("batch", 2)),
        ("text-multilabel", TEXT, "abc", ("batch", 3), ("batch", 3)),
        ("image-segmentation", PICTURE, "ab", ("batch", 4, 6), ("batch", 2, 4, 6)),
        ("image-segmentation", VOLUME, "ab", ("batch", 2, 4, 6), ("batch", 2, 2, 4, 6)),
        ("causal-lm", TEXT, "", ("batch", "sequence"), ("batch", "sequence", "vocabulary")),
    ],
)
def test_axes(name, inputs, labels, targets, outputs):
    task = find_device_task(name)
    assert task.target_axes(inputs, tuple(labels)) == targets
    assert task.output_axes(inputs, tuple(labels)) == outputs


def test_names_kinds_and_an_unknown_task():
    for name, task in DEVICE_TASKS.items():
        assert (task.name, task.kind) == (name, "image" if name.startswith("image") else "text")
        assert task.target_dtype == ("float32" if task.reads in ("values", "labels") else "int64")
    with pytest.raises(ConfigError, match="the task 'causal_lm' is not known") as caught:
        find_device_task("causal_lm")
    assert caught.value.hint == "did you mean 'causal-lm'?"


def test_targets_of_a_language_model_are_its_tokens_without_the_padding():
    task = find_device_task("causal-lm")
    inputs = {
        "input_ids": np.array([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
    }
    targets = task.batch_targets(np.empty((2, 0)), inputs)
    assert targets.dtype == np.int64
    assert targets.tolist() == [[5, 6, 7], [8, 9, IGNORED]]
    assert task.weight(targets) == 3
    with pytest.raises(IncompatibleError, match="needs the input 'attention_mask'"):
        task.batch_targets(np.empty((2, 0)), {"input_ids": inputs["input_ids"]})


def random_case(task, generator, samples):
    """Outputs, targets."""
    if task.reads == "nothing":
        targets = generator.integers(0, 5, (samples, 7))
        targets[generator.random(targets.shape) < 0.3] = IGNORED
        return generator.normal(size=(samples, 7, 5)), targets
    if task.reads == "masks":
        return generator.normal(size=(samples, 3, 2, 4)), generator.integers(0, 2, (samples, 2, 4))
    outputs = generator.normal(size=(samples, 3))
    if task.reads == "label":
        return outputs, generator.integers(0, 3, samples)
    targets = generator.normal(size=outputs.shape)
    return outputs, targets if task.reads == "values" else (targets > 0).astype(np.float32)


def expected_score(task, outputs, targets):
    """The metric of one sample and its weight, with loops."""
    if task.reads == "label":
        return float(np.argmax(outputs) == targets), 1
    if task.reads == "values":
        return sum(abs(a - b) for a, b in zip(outputs, targets, strict=True)) / len(targets), 1
    if task.reads == "labels":
        right = [(1 / (1 + math.exp(-a)) >= 0.5) == (b == 1) for a, b in zip(outputs, targets, strict=True)]
        return sum(right) / len(right), 1
    if task.reads == "masks":
        answer, parts = outputs.argmax(axis=0), []
        for number in range(len(outputs)):
            found, true = set(np.flatnonzero(answer == number)), set(np.flatnonzero(targets == number))
            if found or true:
                parts.append(2 * len(found & true) / (len(found) + len(true)))
        return sum(parts) / len(parts), 1
    right = [outputs[at].argmax() == targets[at + 1] for at in range(6) if targets[at + 1] != IGNORED]
    return sum(right) / max(1, len(right)), len(right)


@given(name=st.sampled_from(sorted(DEVICE_TASKS)), seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 4))
def test_a_score_is_the_mean_over_the_weight_whatever_the_batches(name, seed, cut):
    task = find_device_task(name)
    outputs, targets = random_case(task, np.random.default_rng(seed), 5)
    parts = [expected_score(task, *pair) for pair in zip(outputs, targets, strict=True)]
    total = sum(weight for _, weight in parts)
    expected = sum(value * weight for value, weight in parts) / max(1, total)
    assert task.weight(targets) == total
    assert task.score(outputs, targets) == pytest.approx(expected, abs=1e-12)
    halves = [(task.score(outputs[part], targets[part]), task.weight(targets[part]))
              for part in (slice(0, cut), slice(cut, 5))]  # fmt: skip
    assert mean_by_weight(*zip(*halves, strict=True)) == pytest.approx(expected, abs=1e-12)


def test_nothing_that_counts_scores_zero():
    task = find_device_task("causal-lm")
    targets = np.full((2, 4), IGNORED)
    assert task.weight(targets) == 0
    assert task.score(np.ones((2, 4, 5)), targets) == 0
    assert mean_by_weight([0.0], [0]) == 0


def answers(name, outputs, inputs=None, labels=("a", "b", "c")):
    return find_device_task(name).answer(np.asarray(outputs, np.float32), inputs or {}, labels)


def test_answers_of_a_classification():
    (answer,) = answers("text-classification", [[0.0, math.log(3), -math.inf]])
    assert answer.label == "b"
    assert answer.scores == pytest.approx((0.25, 0.75, 0))
    assert answer.cells() == ("b", "0.750")


def test_answers_of_a_multilabel_task_are_chances_of_their_own_and_finite_everywhere():
    first, second = answers("text-multilabel", [[0.0, 500.0, -500.0], [-0.5, -9.0, -1.0]])
    assert first.labels == ("a", "b")
    assert first.scores == pytest.approx((0.5, 1, 0))
    assert second.to_dict()["labels"] == []
    assert second.cells() == ("(none)", "0.378")


def test_answers_of_a_regression():
    (answer,) = answers("image-regression", [[1.5, -2.0]], labels=("x", "y"))
    assert answer.to_dict() == {"values": {"x": 1.5, "y": -2.0}}
    assert answer.cells() == ("x 1.5, y -2",)


def test_answers_of_a_segmentation_are_masks_and_the_share_of_each_class():
    outputs = np.zeros((1, 3, 2, 2))
    outputs[0, 2, 0, 1] = 1
    (answer,) = answers("image-segmentation", outputs)
    assert answer.mask.tolist() == [[0, 2], [0, 0]]
    assert answer.to_dict() == {"shares": {"a": 0.75, "c": 0.25}}
    assert answer.cells() == ("a 75.0%, c 25.0%",)


def test_answers_of_a_language_model_are_the_probability_of_the_text():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3] * 3])
    inputs = {
        "input_ids": np.array([[0, 1, 2], [0, 1, 0]]),
        "attention_mask": np.array([[1, 1, 1], [1, 0, 0]]),
    }
    whole, one = answers("causal-lm", np.log([probabilities, probabilities]), inputs, ())
    assert whole.tokens == 2
    assert whole.log_likelihood == pytest.approx(math.log(0.25 * 0.8))
    assert whole.perplexity == pytest.approx((0.25 * 0.8) ** -0.5)
    assert one == Likelihood(0.0, 0)
    assert one.to_dict()["perplexity"] is None
    assert one.cells()[1:] == ("0", "-")
    assert Likelihood(-1e6, 1).to_dict()["perplexity"] is None  # beyond a float, and JSON has no infinity


def test_a_metric_is_printed_as_a_share_or_as_a_number():
    assert Metric("accuracy").format(0.4567) == "45.7%"
    assert find_device_task("text-regression").metric.format(12.34567) == "12.35"
