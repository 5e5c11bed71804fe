"""A bundle of a run in the sketch frame: what is in it, that it answers as torch does, and that a device can
personalise it with the step graph."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def sketch(export_vit):
    return export_vit("sketch", {"frame": "sketch", "targets": "*.q_proj,*.fc1", "alpha": 0.5})


def test_every_graph_agrees_with_torch(sketch, kit):
    kit.check_parity(sketch)


def test_the_manifest_says_what_is_fed(sketch, kit):
    kit.check_manifest(sketch, {"attention.q_proj": (2, 2, 2), "mlp.fc1": (2, 2, 2)})


def test_nothing_fed_is_the_base_and_the_adapter_fed_is_the_adapter(sketch, kit):
    kit.check_answers(sketch)


@pytest.mark.parametrize(("rank", "samples"), [(1, 1), (5, 4), (16, 2)])
def test_other_sketches_than_the_runs_may_be_fed(sketch, kit, rank, samples):
    kit.check_other_factors(sketch, rank, samples)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_device_personalises_with_the_step_graph(sketch, start, kit, digits_npz, tmp_path):
    kit.check_personalisation(sketch, digits_npz, tmp_path / "personal.safetensors", 0.05, start)
