"""The settings: one declaration, checked wherever a value comes from."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from edge_tcur.settings import TrainConfig, config_from_dict, read_config
from edge_tcur_runtime.errors import ConfigError


def test_the_settings_are_read_without_torch():
    code = "import sys, edge_tcur.settings; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_says_what_it_is():
    for item in fields(TrainConfig):
        assert item.metadata["help"].endswith("."), item.name
        choices = item.metadata["choices"]
        assert choices is None or item.default in choices, item.name


def test_round_trip():
    config = TrainConfig(base="b", rank=4, learning_rate=0.5)
    assert config_from_dict(config.to_dict(), "run.json") == config
    assert config.method().rank == 4


def test_a_toml_file(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text('base = "vit/"\nrank = 4\nlearning_rate = 1\n')
    values = read_config(path)
    assert values == {"base": "vit/", "rank": 4, "learning_rate": 1.0}
    assert type(values["learning_rate"]) is float


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learning_rat = 0.1", "unknown configuration key 'learning_rat'", "did you mean 'learning_rate'?"),
        ("zzz = 0.1", "unknown configuration key 'zzz'", "known keys: base, data, "),
        ("rank = 8.5", "rank is float 8.5; expected int", None),
        ("rank = true", "rank is bool True; expected int", None),
        ("base = 3", "base is int 3; expected str", None),
        ("rank = ", "not valid TOML", None),
    ],
)
def test_bad_toml(tmp_path, text, message, hint):
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert message in caught.value.message
    assert caught.value.where == str(path)
    assert hint is None or hint in caught.value.hint


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "missing.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b'base = "\xe9"')
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("rank", 0), ("max_length", -1), ("seed", -1), ("threads", -1),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("head_learning_rate", float("inf")),
        ("weight_decay", -0.1), ("weight_decay", float("nan")),
        ("eval_fraction", 0.0), ("eval_fraction", 1.0),
        ("task", "text-clasification"), ("grouping", "x"), ("frame", "x"), ("selection", "x"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    assert caught.value.where == field
