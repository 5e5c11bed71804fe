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


def test_lists_in_text():
    """Text, so that the command line, a TOML file and ``run.json`` hold the same."""
    config = TrainConfig(
        rank_pattern="*.q=4, blocks.?.k=16 ,", layers_to_transform=" 0,11", modules_to_save="head , *.norm"
    )
    assert config_from_dict(config.to_dict(), "run.json") == config
    method = config.method()
    assert method.rank_pattern == {"*.q": 4, "blocks.?.k": 16}
    assert list(method.rank_pattern) == ["*.q", "blocks.?.k"]  # the first that matches counts
    assert method.layers_to_transform == (0, 11)
    assert method.modules_to_save == ("head", "*.norm")
    method = TrainConfig().method()
    assert (dict(method.rank_pattern), method.layers_to_transform, method.modules_to_save) == ({}, (), ())


def test_a_rank_of_a_pattern_names_the_pattern():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(rank_pattern="*.q=0")
    assert caught.value.where == "*.q"


def test_combinations_that_mean_nothing_are_refused_with_the_settings():
    for options, where in (
        ({"transform": "dct"}, "transform"),
        ({"coupling": "layer"}, "coupling"),
        ({"frame": "sketch", "selection": "norm"}, "frame"),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainConfig(**options)
        assert caught.value.where == where


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
        ("coupling", "x"), ("transform", "x"), ("alpha", 0.0), ("alpha", float("inf")), ("head_epochs", -1),
        ("gradient_batches", 0), ("rank_pattern", "*.q"), ("rank_pattern", "=3"), ("rank_pattern", "*.q=x"),
        ("rank_pattern", "*.q=-1"), ("rank_pattern", "*.q=²"), ("rank_pattern", "*.q=2,*.k"),
        ("layers_to_transform", "1,a"), ("layers_to_transform", "-1"), ("layers_to_transform", "²"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    assert caught.value.where == field
