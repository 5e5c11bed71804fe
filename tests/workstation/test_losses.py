"""Losses and metrics in torch against their definitions in numpy float64, with gradients by differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur.tasks import TASKS, find_task
from edge_tcur_runtime.tasks import DEVICE_TASKS, IGNORED

NAMES = ("text-classification", "text-regression", "text-multilabel", "image-segmentation", "causal-lm")
SPACES = [(3, 4), (2, 3, 2)]


def log_softmax(values, axis):
    top = values.max(axis=axis, keepdims=True)
    return values - top - np.log(np.exp(values - top).sum(axis=axis, keepdims=True))


def cross_entropy(outputs, targets):
    """Mean of ``-log p(target)`` over rows [n, classes]."""
    return -np.mean([row[target] for row, target in zip(log_softmax(outputs, -1), targets, strict=True)])


def bce_with_logits(outputs, targets):
    """torch's definition of ``BCEWithLogitsLoss``, with ``log sigmoid`` in its stable form."""
    log_yes, log_no = -np.logaddexp(0, -outputs), -np.logaddexp(0, outputs)
    return -np.mean(targets * log_yes + (1 - targets) * log_no)


def dice_ce(outputs, targets):
    """MONAI's ``DiceCELoss(to_onehot_y=True, softmax=True)``: smooth_nr = smooth_dr = 1e-5, with the
    background, each sample and class on its own, lambda_dice = lambda_ce = 1."""
    samples, classes = outputs.shape[:2]
    log_p = log_softmax(outputs, 1).reshape(samples, classes, -1)
    flat, dice, entropy = targets.reshape(samples, -1), [], []
    for sample in range(samples):
        for number in range(classes):
            p, t = np.exp(log_p[sample, number]), (flat[sample] == number).astype(np.float64)
            dice.append(1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5))
        entropy += [-log_p[sample, target, place] for place, target in enumerate(flat[sample])]
    return np.mean(dice) + np.mean(entropy)


def token_cross_entropy(outputs, targets):
    """Of the shifted tokens (transformers' ``ForCausalLMLoss``); 0 where every one is ignored."""
    rows, following = outputs[:, :-1].reshape(-1, outputs.shape[-1]), targets[:, 1:].ravel()
    known = following != IGNORED
    return cross_entropy(rows[known], following[known]) if known.any() else 0.0


DEFINITIONS = {
    "label": cross_entropy,
    "values": lambda outputs, targets: np.mean((outputs - targets) ** 2),
    "labels": bce_with_logits,
    "masks": dice_ce,
    "nothing": token_cross_entropy,
}


def make(name, seed, scale=3.0, space=(3, 4)):
    """Outputs f64 and valid targets of five samples, of a size that an odd seed changes."""
    generator = np.random.default_rng(seed)
    classes = 3 + seed % 2
    shape = {"masks": (5, classes, *space), "nothing": (5, 6, classes)}
    outputs = scale * generator.normal(size=shape.get(TASKS[name].reads, (5, classes)))
    targets = TASKS[name].example_targets(
        torch.from_numpy(outputs).float(), torch.Generator().manual_seed(seed)
    )
    return outputs, targets


def loss_and_gradient(task, outputs, targets):
    leaf = torch.from_numpy(outputs).float().requires_grad_(True)
    loss = task.loss(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    return loss.item(), gradient.numpy()


def test_every_task_of_the_device_has_a_loss_and_the_same_facts():
    assert list(TASKS) == list(DEVICE_TASKS)
    for name, task in TASKS.items():
        assert isinstance(task, type(DEVICE_TASKS[name]))
        assert find_task(name) is task


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 3.0, 60.0]), space=st.sampled_from(SPACES))
def test_a_loss_is_its_definition(name, seed, scale, space):
    task = TASKS[name]
    outputs, targets = make(name, seed, scale, space)
    loss, gradient = loss_and_gradient(task, outputs, targets)
    rounded = outputs.astype(np.float32).astype(np.float64)
    assert loss == pytest.approx(DEFINITIONS[task.reads](rounded, targets.numpy()), rel=2e-5, abs=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), space=st.sampled_from(SPACES))
def test_a_gradient_is_that_of_the_definition(name, seed, space):
    """Central differences of the definition along one random direction, in float64."""
    task = TASKS[name]
    outputs, targets = make(name, seed, 1.0, space)
    _, gradient = loss_and_gradient(task, outputs, targets)
    direction = np.random.default_rng(seed + 1).normal(size=outputs.shape)
    step, define = 1e-5, DEFINITIONS[task.reads]
    ahead, behind = (define(outputs + sign * step * direction, targets.numpy()) for sign in (1, -1))
    assert (gradient * direction).sum() == pytest.approx((ahead - behind) / (2 * step), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 4))
def test_micro_batches_by_weight_are_the_batch(name, seed, cut):
    """What the device's accumulation relies on: loss, gradient and metric."""
    task = TASKS[name]
    outputs, targets = make(name, seed, 1.0)
    whole, whole_gradient = loss_and_gradient(task, outputs, targets)
    metric = task.measure(torch.from_numpy(outputs).float(), targets).item()
    assert metric == pytest.approx(task.score(outputs.astype(np.float32), targets.numpy()), abs=1e-6)
    loss = measured = 0.0
    gradients = []
    for part in (slice(0, cut), slice(cut, 5)):
        share = task.weight(targets[part].numpy()) / max(1, task.weight(targets.numpy()))
        found, gradient = loss_and_gradient(task, outputs[part], targets[part])
        measured += share * task.measure(torch.from_numpy(outputs[part]).float(), targets[part]).item()
        loss += share * found
        gradients.append(share * gradient)
    assert loss == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert measured == pytest.approx(metric, abs=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), whole_gradient, rtol=1e-3, atol=1e-6)


def test_bce_is_finite_far_out_and_has_its_gradient_at_zero():
    """A new head answers 0 everywhere; of ``relu(x) - x t + log(1 + exp(-|x|))`` the graph's gradient there
    is -t, for `Relu` and `Abs` have none."""
    outputs = np.array([[0.0, 0.0, 1e4, -1e4, 1e4]])
    targets = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]])
    loss, gradient = loss_and_gradient(TASKS["text-multilabel"], outputs, targets)
    assert loss == pytest.approx((2 * np.log(2) + 1e4) / 5, rel=1e-6)
    np.testing.assert_allclose(gradient, np.array([[0.5, -0.5, 0, 0, 1]]) / 5, atol=1e-7)


def test_dice_of_classes_that_nobody_names_costs_nothing():
    outputs = np.full((1, 3, 2, 2), -50.0)
    outputs[:, 0] = 50.0
    targets = torch.zeros(1, 2, 2, dtype=torch.int64)
    loss, gradient = loss_and_gradient(TASKS["image-segmentation"], outputs, targets)
    assert loss == pytest.approx(0, abs=1e-6)
    assert np.isfinite(gradient).all()
    assert TASKS["image-segmentation"].measure(torch.from_numpy(outputs).float(), targets).item() == 1


def test_a_batch_in_which_everything_is_ignored_costs_nothing_and_moves_nothing():
    task = TASKS["causal-lm"]
    targets = torch.full((2, 4), IGNORED)
    targets[:, 0] = 1  # the first token is predicted from nothing
    loss, gradient = loss_and_gradient(task, np.ones((2, 4, 5)), targets)
    assert loss == 0
    assert not gradient.any()
    assert task.measure(torch.ones(2, 4, 5), targets).item() == 0
    assert task.weight(targets.numpy()) == 0
