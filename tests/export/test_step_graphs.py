"""Bundles with the step graph's variants: recompute, and gradients through the last blocks alone."""

from __future__ import annotations

import pytest

from edge_tcur.training import TrainConfig

VARIANTS = {"recompute": True, "last_blocks": 1}
COUPLED = {"grouping": "shape", "coupling": "all", "targets": "*.k_proj,*.v_proj,*.fc2", "frame": "raw"}
KINDS = {
    "plain": {"targets": "*.q_proj,*.v_proj,*.fc1"},
    "coupled": {**COUPLED, "selection": "norm"},
    "sketched": {"frame": "sketch", "targets": "*.q_proj,*.fc1", "alpha": 0.5},
    "layer by layer": {"grouping": "weight", "targets": "*.v_proj,*.fc1",
                       "modules_to_save": "*.0.layernorm_before,module.vit.layernorm"},
}  # fmt: skip


@pytest.fixture(scope="session")
def of_kind(export_vit):
    made = {}

    def call(kind):
        if kind not in made:
            made[kind] = export_vit(kind.replace(" ", "-"), KINDS[kind], **VARIANTS)
        return made[kind]

    return call


@pytest.fixture(params=list(KINDS))
def exported(request, of_kind):
    return of_kind(request.param)


@pytest.fixture(scope="session")
def words(bert_dir, texts_csv, tmp_path_factory, kit):
    config = TrainConfig(str(bert_dir), str(texts_csv), rank=2, epochs=1, batch_size=4, threads=1)
    return kit.export(config, tmp_path_factory.mktemp("words"), ("onnx", "step"), **VARIANTS)


def test_every_graph_agrees_with_torch(exported, kit):
    kit.check_parity(exported)
    assert set(exported.report.parity) == {"infer", "step", "step_recompute", "step_last"}


def test_every_graph_of_a_bert_agrees_with_torch(words, kit):
    kit.check_parity(words)
