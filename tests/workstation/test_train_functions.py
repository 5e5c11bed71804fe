"""A base that is a function of a user's own module."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from edge_tcur.errors import BaseModelError
from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import evaluate_run, train
from edge_tcur.training.evaluate import apply_adapter
from edge_tcur_runtime.errors import (
    BaseMismatchError,
)
from training_runs import IMAGE, image_config, refused, text_config

FUNCTIONS = """
import torch
from torch import nn

PREPROCESSING = {"kind": "image", "input": "pixels", "height": 8, "width": 8, "channels": 1,
                 "scale": 1 / 255, "mean": [0.5], "std": [0.5]}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(1, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.ModuleList([layer, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.out = nn.Linear(8, 3)
        self.preprocessing = PREPROCESSING
    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        for layer in self.encoder:
            x = layer(x)
        return self.out(x.mean(dim=1))

def net():
    return Net()

def unstable():
    model = Net()
    nn.init.normal_(model.out.weight, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    return model

def nothing():
    return "a string"

def silent():
    return nn.Linear(3, 3)

def partial():
    model = Net()
    model.preprocessing = {"kind": "image", "input": "pixels"}
    return model

def other_name():
    model = Net()
    model.preprocessing = {**PREPROCESSING, "input": "image"}
    return model

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module `own_bases` in the current directory."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "own_bases.py").write_text(FUNCTIONS)
    (place / "bad_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(place)
    yield place
    sys.modules.pop("own_bases", None)


def test_a_function_base(functions, digits_npz, tmp_path):
    run = train(image_config("own_bases:net", digits_npz, epochs=3), tmp_path / "run").run
    assert {spec.parameters for spec in run.adapter().header.groups.values()} == {
        tuple(f"module.encoder.{i}.linear{n}.weight" for i in range(2)) for n in (1, 2)
    }
    assert all(np.abs(factors.core).max() > 0 for factors in run.adapter().factors.values())
    assert str(functions) not in sys.path
    # torch's fused layer would read the base's weights and ignore the update in inference.
    base = load_base("own_bases:net", find_task(IMAGE), run.labels, {})
    pixels = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        injection = apply_adapter(base, run, run.adapter())
        adapted = base.model(pixels=pixels)
        injection.activate(None)
        assert not torch.equal(base.model(pixels=pixels), adapted)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("own_bases:missing", "cannot import the function"),
        ("no_such_module:f", "cannot import the function"),
        ("bad_syntax:f", "cannot import the function"),
        ("own_bases:nothing", "returned str; expected a torch.nn.Module"),
        ("own_bases:silent", "says nothing of its inputs"),
        ("own_bases:partial", "preprocessing is not valid: the field 'channels' is missing"),
        ("own_bases:other_name", "the model fails on inputs"),
        ("own_bases:broken", "the function failed: RuntimeError: no weights here"),
    ],
)
def test_bad_functions(functions, name, match, digits_npz, tmp_path):
    error = refused(image_config(name, digits_npz), tmp_path / "run", BaseModelError, match)
    assert error.where == name


def test_a_function_whose_weights_change(functions, digits_npz, tmp_path):
    run = train(image_config("own_bases:unstable", digits_npz), tmp_path / "run").run
    with pytest.raises(BaseMismatchError) as caught:
        evaluate_run(run, digits_npz)
    assert "the same weights at every call" in caught.value.hint


def test_a_function_takes_no_text(functions, texts_csv, tmp_path):
    refused(
        text_config("own_bases:net", texts_csv), tmp_path / "run", BaseModelError, "gives a picture model"
    )
