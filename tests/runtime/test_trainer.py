"""One update of a run, whatever its micro-batches, and updates that diverge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_tcur_runtime import trainer as trainer_module
from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.engines import StepResult
from edge_tcur_runtime.errors import (
    ConfigError,
    UsageError,
)
from edge_tcur_runtime.personalize import personalize
from edge_tcur_runtime.tasks import find_device_task, mean_by_weight
from short_runs import ENGINE, INSTALLED, ONE_LABEL, Quadratic, make_trainer, quadratic_trainer, quick

pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")


@pytest.mark.parametrize("name", ENGINE)
def test_accumulated_micro_batches_take_the_same_steps_as_the_whole_batch(bundle, user, name):
    values = {}
    for micro in (16, 3, 1):
        trainer = make_trainer(bundle, user, quick(engine=name))
        trainer.micro_batch = micro
        losses = [trainer.step(np.arange(16) + 16 * number, 1.0) for number in range(3)]
        values[micro] = trainer.values, losses
    for micro in (3, 1):
        np.testing.assert_allclose(values[micro][1], values[16][1], rtol=1e-6)
        for key, value in values[micro][0].items():
            np.testing.assert_allclose(value, values[16][0][key], rtol=0, atol=1e-6, err_msg=key)


def test_a_step_weighs_micro_batches_by_their_samples():
    """Seven samples by three: the last pass has one sample and a third of the others' weight."""
    optimizer = {"max_gradient_norm": 0.0}
    trainer = quadratic_trainer(engine := Quadratic(), quick(optimizer=optimizer))
    trainer.micro_batch = 3
    loss = trainer.step(np.arange(7), 1.0)
    assert engine.sizes == [3, 3, 1]
    mean = 3 / 7
    assert loss == pytest.approx((4 + 3) * (9 - 6 * mean + mean) / 2)
    np.testing.assert_allclose(trainer._optimizer.first["head"] / 0.1, 3 - mean, rtol=1e-6)


def test_micro_batches_of_a_language_model_weigh_by_their_tokens():
    """Texts of three and one counted tokens: the second pass counts a third of the first, one without any
    counts nothing."""

    class Tokens(Quadratic):
        def step(self, inputs, targets, feeds):
            self.sizes.append(len(targets))
            counted = targets[:, 1:] != -100
            value = float(inputs["input_ids"][:, 1:][counted].mean()) if counted.any() else 0.0
            gradients = {name: np.full(feeds[name].shape, value, np.float32) for name in ("q.core", "head")}
            return StepResult(value, np.zeros((*targets.shape, 2), np.float32), gradients, value)

    optimizer = {"max_gradient_norm": 0.0}
    trainer = quadratic_trainer(engine := Tokens(), quick(optimizer=optimizer), count=3)
    ids = np.array([[9, 1, 1, 1], [9, 5, 0, 0], [9, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])

    def preprocess(samples):
        rows = samples.ravel().astype(int)
        return {"input_ids": ids[rows], "attention_mask": mask[rows]}

    dataset = Dataset("text", trainer._data.dataset.samples, None, "made", ("a", "b", "c"), reads="nothing")
    task = find_device_task("causal-lm")
    trainer._data = trainer_module.Batch(dataset, np.empty((3, 0), np.int64), preprocess, task)
    trainer.micro_batch = 1
    assert trainer.score(trainer._data) == (2.0, 2.0)
    assert trainer.step(np.arange(3), 1.0) == pytest.approx(2.0)
    assert engine.sizes == [1] * 6
    np.testing.assert_allclose(trainer._optimizer.first["head"] / 0.1, 2.0, rtol=1e-6)


def test_the_better_of_two_adapters_is_the_tasks_business():
    def better(task, before, after):
        return trainer_module.Outcome(find_device_task(task), {}, before=before, after=after).better

    assert better("text-regression", (2.0, 4.0), (1.0, 5.0))  # an error: less is better
    assert not better("text-regression", (1.0, 4.0), (2.0, 1.0))
    assert better("image-segmentation", (0.4, 1.0), (0.5, 1.2))
    assert better("causal-lm", (0.5, 3.0), (0.4, 2.0))  # the likelihood of the text, not the best guesses
    assert not better("causal-lm", (0.4, 2.0), (0.5, 2.0))


@pytest.mark.parametrize(("right", "count", "micro"), [(15, 23, 22), (7, 26, 25)])
def test_a_share_that_differs_by_rounding_alone_is_the_same_share(right, count, micro):
    """Before and after may be scored in passes of other sizes: the guard makes them smaller on the way."""
    hits = np.arange(count) < right
    sizes = [len(part) for part in np.split(hits, range(micro, count, micro))]
    found = [np.mean(part) for part in np.split(hits, range(micro, count, micro))]
    whole = mean_by_weight([np.mean(hits)], [count])
    parts = mean_by_weight(found, sizes)
    task = find_device_task("image-classification")
    for before, after in ((whole, parts), (parts, whole)):
        assert not trainer_module.Outcome(task, {}, before=(before, 1.0), after=(after, 2.0)).better
        assert trainer_module.Outcome(task, {}, before=(before, 2.0), after=(after, 1.0)).better


def test_data_read_for_another_task_are_refused(bundle, user):
    with pytest.raises(UsageError, match="read as 'values'; the task image-classification takes 'label'"):
        personalize(bundle, replace(user, reads="values"), quick())


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_is_exact_but_for_the_engines_rounding(micro):
    whole, parts = (quadratic_trainer(Quadratic(), quick()) for _ in range(2))
    whole.micro_batch, parts.micro_batch = 7, micro
    for number in range(5):
        assert whole.step(np.arange(7), 1.0) == pytest.approx(parts.step(np.arange(7), 1.0), rel=1e-6), number
    for key, value in whole.values.items():
        np.testing.assert_allclose(parts.values[key], value, atol=1e-6)


def test_cores_and_a_head_have_learning_rates_of_their_own():
    optimizer = {"learning_rate": 0.5, "head_learning_rate": 0.125}
    trainer = quadratic_trainer(Quadratic(), quick(optimizer=optimizer))
    trainer.step(np.arange(7), 0.5)  # Adam's first step is as long as the rate
    np.testing.assert_allclose(3 - trainer.values["q.core"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(3 - trainer.values["head"], 0.0625, rtol=1e-5)
    adapter = trainer._coordinates.adapter(trainer.values, {})
    np.testing.assert_allclose(adapter.extras["head"], 3 - 0.0625, rtol=1e-6)


def test_scoring_moves_nothing_and_counts_every_sample():
    trainer = quadratic_trainer(engine := Quadratic(), quick())
    trainer.micro_batch = 3
    before = {key: value.copy() for key, value in trainer.values.items()}
    accuracy, loss = trainer.score(trainer._data)
    assert accuracy == 1
    assert loss == pytest.approx((4 + 3) * (9 - 6 * 3 / 7 + 3 / 7) / 2)
    assert engine.sizes == [3, 3, 1]
    for key, value in before.items():
        np.testing.assert_array_equal(value, trainer.values[key])


# --- divergence ------------------------------------------------------------------------------------


def not_a_number(count, result):
    return replace(result, loss=float("nan")) if count == 3 else result


def bad_gradient(bad):
    def spoil(count, result):
        gradients = {**result.gradients, "q.core": np.full((1, 2, 2), bad, np.float32)}
        return replace(result, gradients=gradients) if count == 3 else result

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_a_number, "the loss is nan"),
        (bad_gradient(np.nan), "a gradient is not finite"),
        (bad_gradient(np.inf), "a gradient is not finite"),
    ],
)
def test_divergence_is_a_clear_error_and_leaves_the_last_good_values(spoil, message):
    trainer = quadratic_trainer(Quadratic(spoil), quick())
    trainer.step(np.arange(7), 1.0)
    trainer.step(np.arange(7), 1.0)
    before = {key: value.copy() for key, value in trainer.values.items()}
    with pytest.raises(ConfigError, match=f"training diverged: {message}") as caught:
        trainer.step(np.arange(7), 1.0)
    assert caught.value.where == "learning_rate"
    assert "lower --learning-rate" in caught.value.hint
    for key, value in before.items():
        np.testing.assert_array_equal(value, trainer.values[key])


def test_a_factor_that_float32_cannot_hold_is_divergence_too():
    trainer = quadratic_trainer(Quadratic(), quick(optimizer={"learning_rate": 99.0}))
    trainer._optimizer.step = lambda values, gradients, rates: {
        key: value + 1e39 for key, value in values.items()
    }
    with pytest.raises(ConfigError, match="training diverged: a factor is too large for float32"):
        trainer.step(np.arange(7), 1.0)


def test_a_held_out_loss_that_is_no_number_is_never_better():
    outcome = trainer_module.Outcome(ONE_LABEL, {}, before=(0.0, 1.0), after=(1.0, float("nan")))
    assert not outcome.better
    assert trainer_module.Outcome(ONE_LABEL, {}, before=(0.5, 1.0), after=(0.5, 0.9)).better
    assert not trainer_module.Outcome(ONE_LABEL, {}, before=(0.5, 1.0), after=(0.5, 1.0)).better
    assert not trainer_module.Outcome(ONE_LABEL, {}, before=(0.5, 1.0), after=(0.4, 0.1)).better
