"""Fixtures of the workstation's tests."""

import json

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur.training import train
from edge_tcur_runtime.cli.framework import run
from training_runs import image_config, text_config, train_arguments


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def cli(capsys):
    """Runs `edge-tcur`; returns exit code, stdout (parsed with --json) and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            run(edge_tcur, list(map(str, arguments)))
        out, err = capsys.readouterr()
        return caught.value.code, json.loads(out) if "--json" in arguments else out, err

    return call


@pytest.fixture(scope="session")
def image_run(vit_dir, digits_npz, tmp_path_factory):
    """A finished run on pictures; tests read it and never write to it."""
    root = tmp_path_factory.mktemp("runs") / "image"
    return train(image_config(vit_dir, digits_npz, epochs=6), root).run


@pytest.fixture(scope="session")
def text_run(bert_dir, texts_csv, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "text"
    return train(text_config(bert_dir, texts_csv, epochs=15, batch_size=4, head_learning_rate=0.05), root).run


@pytest.fixture(scope="session")
def trained(vit_dir, digits_npz, tmp_path_factory):
    """A run that the tests read and do not change."""
    root = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as caught:
        run(edge_tcur, list(map(str, train_arguments(vit_dir, digits_npz, root, "--quiet"))))
    assert caught.value.code == 0
    return root
