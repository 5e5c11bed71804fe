"""The settings of the method: presets, defaults, and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from edge_tcur.method.config import GROUPINGS, PRESETS, TCurConfig, preset
from edge_tcur.method.selection import SELECTIONS
from edge_tcur.settings import TrainConfig
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.adapter import MAX_ALPHA
from edge_tcur_runtime.formats.factors import COUPLINGS, FRAMES
from edge_tcur_runtime.transform import TRANSFORMS


def refused(match, where, **options):
    with pytest.raises(ConfigError, match=match) as caught:
        TCurConfig(**options)
    assert caught.value.where == where
    return caught.value.hint


def test_the_defaults_are_those_of_a_training_run():
    assert TrainConfig().method() == TCurConfig() == preset("gradient", transform="auto")
    assert preset("gradient").domain == TCurConfig().domain
    config = TCurConfig()
    assert (config.coupling, config.selection, config.frame, config.grouping) == (
        "none", "gradient", "orthonormal", "projection",
    )  # fmt: skip
    assert (config.domain, config.needs_directions) == ("identity", True)


def test_reading_the_settings_imports_no_torch():
    code = "import sys, edge_tcur.method.config; print([m for m in ('torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_configuration(name):
    config = preset(name, rank=3, seed=5)
    assert (config.rank, config.seed) == (3, 5)
    for key, value in PRESETS[name].items():
        assert getattr(config, key) == value
    assert config.domain == PRESETS[name]["transform"]
    assert config.needs_directions == (name not in {"paper", "curlora"})


def test_presets_that_are_changed_or_unknown():
    assert preset("paper", transform="dct").domain == "dct"
    with pytest.raises(ConfigError, match="sketch frame"):
        preset("sketch", coupling="all")
    with pytest.raises(ConfigError, match="'papre' is not known; expected one of paper, curlora") as caught:
        preset("papre")
    assert (caught.value.where, caught.value.hint) == ("preset", "did you mean 'paper'?")


@pytest.mark.parametrize(
    ("field", "value", "guess"),
    [
        ("grouping", "projektion", "projection"),
        ("selection", "nrom", "norm"),
        ("selection", "grad", "gradient"),
        ("frame", "Raw", "raw"),
        ("coupling", "non", "none"),
        ("transform", "fdt", "dft"),
    ],
)
def test_names_are_checked(field, value, guess):
    assert refused(f"{field}: '{value}' is not known", field, **{field: value}) == f"did you mean {guess!r}?"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), MAX_ALPHA])
def test_a_scale_that_an_adapter_file_cannot_hold(value):
    refused("expected above 0 and below", "alpha", alpha=value)


def test_ranks_are_at_least_one():
    refused("rank: the rank is 0", "rank", rank=0)
    refused("the rank is -2; expected at least 1", "*.q", rank_pattern={"*.k": 3, "*.q": -2})


@pytest.mark.parametrize("transform", ["dft", "dct"])
def test_a_transform_needs_coupling(transform):
    hint = refused(
        f"nothing to transform; '{transform}' would be passed over", "transform", transform=transform
    )
    assert "coupling all or layer" in hint
    assert TCurConfig(transform="identity") == TCurConfig(transform="identity", coupling="none")
    assert TCurConfig(coupling="all").domain == "dft"
    assert TCurConfig(coupling="all", transform=transform).domain == transform


def test_a_projection_has_one_weight_a_layer():
    assert "grouping shape" in refused("one weight of each layer", "coupling", coupling="layer")
    for grouping in ("shape", "layer", "*.q,*.k", "*"):
        assert TCurConfig(coupling="layer", grouping=grouping).grouping == grouping


@pytest.mark.parametrize(
    "options",
    [{"coupling": "all"}, {"coupling": "layer", "grouping": "shape"}]
    + [{"selection": name} for name in sorted(SELECTIONS) if name not in {"gradient", "update"}],
)
def test_sketches_are_of_gradients_of_single_weights(options):
    hint = refused("stores sketches of each weight's gradient or update", "frame", frame="sketch", **options)
    assert hint == "say coupling none and selection gradient or update with it"


def test_no_other_combination_is_refused():
    """Written out apart from `TCurConfig`: what means nothing, and no more, is refused."""
    axes = (GROUPINGS, COUPLINGS, ("auto", *TRANSFORMS), tuple(SELECTIONS), FRAMES)
    taken = 0
    for grouping, coupling, transform, selection, frame in itertools.product(*axes):
        nothing = (
            (coupling == "none" and transform in {"dft", "dct"})
            or (coupling == "layer" and grouping == "projection")
            or (coupling != "none" and grouping == "weight")
            or (frame == "sketch" and not (coupling == "none" and selection in {"gradient", "update"}))
        )
        options = {
            "grouping": grouping, "coupling": coupling, "transform": transform, "selection": selection,
            "frame": frame,
        }  # fmt: skip
        if nothing:
            with pytest.raises(ConfigError):
                TCurConfig(**options)
        else:
            config = TCurConfig(**options)
            assert config.domain in TRANSFORMS
            assert config.needs_directions == (selection in {"gradient", "update"})
            taken += 1
    assert taken == 4 * 2 * (7 * 2 + 2) + 3 * 4 * 14 + 2 * 4 * 14
