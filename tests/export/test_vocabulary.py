"""The loss and the head of a language model in pieces of the vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree

from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig
from edge_tcur_export import cases, vocabulary
from edge_tcur_export import graph as graphs
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.quantize import quantize_int4, quantize_int8
from edge_tcur_export.quantized_graph import WeightTable, quantize_weights
from edge_tcur_export.trace import Signature, Traced, trace_backward, trace_program
from edge_tcur_runtime.canary import departs, read_canary
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import IncompatibleError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.predict import Model as DeviceModel
from edge_tcur_runtime.tasks import IGNORED

WIDTH = 32  # features: a block of int4
ROW = 4 * WIDTH  # bytes of a row in float32
NAMES, OUTPUTS = ("input_ids", "labels", "core"), ("loss", "logits", "metric")


class Model(torch.nn.Module):
    """A table of words, one layer, and the table again."""

    def __init__(self, words, width, tied=True, read_twice=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", torch.randn(words, width, generator=generator))
        self.register_buffer("head", self.table if tied else self.table.flip(0).contiguous())
        self.read_twice = read_twice

    def forward(self, input_ids, labels, core):
        task = find_task("causal-lm")
        hidden = torch.nn.functional.embedding(input_ids, self.table) @ core
        if self.read_twice:
            hidden = hidden + (self.table * core.sum()).sum(dim=0)
        outputs = torch.nn.functional.linear(hidden, self.head)
        detached = outputs.detach()
        return task.loss(outputs, labels), detached, task.measure(detached, labels)


def step_graph(words=30, width=WIDTH, **how):
    """A step graph, and the forward graph."""
    axes = {0: Dim("batch", min=1, max=4096), 1: Dim("sequence", min=2, max=1024)}
    ids = torch.randint(words, (3, 16))
    program = trace_program(
        Model(words, width, **how),
        (ids, ids.clone(), torch.eye(width).requires_grad_(True)),
        (axes, axes, {}),
    )
    forward = graphs.to_graph(Traced(program, Signature(NAMES, OUTPUTS)))
    joint = trace_backward(program)
    for spec in joint.graph_signature.output_specs:
        spec.kind, spec.target = OutputKind.USER_OUTPUT, None
    joint.module_call_graph[0].signature.out_spec = _pytree.tree_structure((0, 1, 2, 3))
    return graphs.to_graph(Traced(joint, Signature(NAMES, (*OUTPUTS, "core.grad")))), forward


@pytest.fixture(scope="module")
def plain():
    return step_graph()


def run(model, feeds, *, ours=True, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    raw = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    off = ["ConstantFolding"] if ours else []
    session = onnxruntime.InferenceSession(
        raw, options, providers=["CPUExecutionProvider"], disabled_optimizers=off
    )
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(None, {n: v for n, v in feeds.items() if n in wanted}), strict=True))


def feeds_of(words, width, samples, length, seed, scale=1.0):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, words, (samples, length))
    labels = np.where(generator.random(ids.shape) < 0.3, IGNORED, ids)
    core = (scale * generator.normal(size=(width, width))).astype(np.float32)
    return {"input_ids": ids, "labels": labels, "core": core}


def check(found, expected):
    assert set(found) == set(expected) - {"logits"}
    # Both are sums in float32, in different orders: 2.8e-6 apart once for a loss of 86.
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=5e-6, atol=1e-6)
    np.testing.assert_allclose(found["metric"], expected["metric"], rtol=1e-6)
    atol = 2e-6 * max(1.0, np.abs(expected["core.grad"]).max())
    np.testing.assert_allclose(found["core.grad"], expected["core.grad"], rtol=2e-5, atol=atol)


@pytest.mark.parametrize("rows", [1, 7, 15, 29])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31), samples=st.integers(1, 3), length=st.integers(2, 6),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
)  # fmt: skip
def test_loss_metric_and_gradient_are_those_of_the_whole(plain, rows, seed, samples, length, scale):
    """Of any size of the pieces; outputs that are all equal, and ones far beyond what exp can hold, too."""
    model = graphs.clone(plain[0])
    assert vocabulary.write_token_loss(model, "labels", rows * ROW)
    feeds = feeds_of(30, WIDTH, samples, length, seed, scale)
    check(run(model, feeds), run(plain[0], feeds))


def test_nothing_to_learn_from_is_no_loss_and_no_gradient(plain):
    model = graphs.clone(plain[0])
    assert vocabulary.write_token_loss(model, "labels", 7 * ROW)
    feeds = feeds_of(30, WIDTH, 2, 5, 0) | {"labels": np.full((2, 5), IGNORED)}
    found = run(model, feeds)
    assert (float(found["loss"]), float(found["metric"])) == (0, 0)
    assert not found["core.grad"].any()


def test_the_whole_is_left_where_it_is_small_or_the_table_is_read_in_another_way(plain):
    for model, size in (
        (graphs.clone(plain[0]), 30 * ROW),
        (step_graph(tied=False)[0], ROW),
        (step_graph(read_twice=True)[0], ROW),
    ):
        before = [node.name for node in model.graph]
        assert not vocabulary.write_token_loss(model, "labels", size)
        assert [node.name for node in model.graph] == before
        assert [value.name for value in model.graph.outputs][:3] == list(OUTPUTS)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_pieces_of_a_quantised_table_are_parts_of_its_bytes(plain, kind, ours, tmp_path):
    """Under ONNX Runtime's own optimisers too; the table is stored once, and float32 a piece at a time."""
    matrix = Model(30, WIDTH).table.numpy()
    table = quantize_int8(matrix, 0) if kind == "int8" else quantize_int4(matrix, 1)
    expected = graphs.clone(plain[0])
    (weight,) = [v for v in expected.graph.initializers.values() if tuple(v.shape) == (30, WIDTH)]
    weight.const_value = ir.tensor(table.dequantize(), name=weight.name)
    model, whole = graphs.clone(expected), graphs.clone(expected)
    assert vocabulary.write_token_loss(model, "labels", 7 * ROW)
    feeds = feeds_of(30, WIDTH, 2, 5, 1)
    for changed in (model, whole):
        BaseFile(tmp_path, WeightTable([table])).externalize(changed)
        spread = tmp_path.joinpath("base.bin").stat().st_size - table.nbytes
        assert 0 <= spread < 2**12  # paddings, and numbers of bytes
        assert not [v for v in changed.graph.initializers.values() if tuple(v.shape) == (30, WIDTH)
                    and v.dtype == ir.DataType.FLOAT]  # fmt: skip
        ir.save(changed, tmp_path / "graph.onnx")
        found = run(tmp_path / "graph.onnx", feeds, ours=ours, optimized=tmp_path / "optimized.onnx")
        if changed is model:
            check(found, run(expected, feeds))
            nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
            assert {"DequantizeLinear", "MatMulNBits"}.isdisjoint(node.op_type for node in nodes)
        gradient = run(expected, feeds)["core.grad"]
        np.testing.assert_allclose(found["core.grad"], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
def test_an_inference_graph_answers_in_pieces_as_whole(plain, kind):
    expected = graphs.keep_outputs(graphs.clone(plain[1]), ("logits",))
    (weight,) = [v for v in expected.graph.initializers.values() if tuple(v.shape) == (30, WIDTH)]
    matrix = weight.const_value.numpy()
    stored = {"int8": [quantize_int8(matrix, 0)], "int4": [quantize_int4(matrix, 1)]}.get(kind, [])
    for table in stored:
        weight.const_value = ir.tensor(table.dequantize(), name=weight.name)
    model = graphs.clone(expected)
    assert not vocabulary.split_head(graphs.clone(model), 30 * ROW)
    assert vocabulary.split_head(model, 7 * ROW)
    (table,) = [v for v in model.graph.initializers.values() if tuple(v.shape) == (30, WIDTH)]
    assert [node.op_type for node, _ in table.uses()].count("Slice") == 5
    quantize_weights(model, WeightTable(stored))
    feeds = feeds_of(30, WIDTH, 2, 5, 2)
    whole = run(expected, feeds)["logits"]
    np.testing.assert_allclose(run(model, feeds)["logits"], whole, rtol=1e-5, atol=1e-5)


CHILD = """
import sys
from pathlib import Path
import numpy as np
from edge_tcur_runtime import heap
from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.engines.session import open_session
heap.give_back_at_once()
session = open_session(Path(sys.argv[1]), threads=1, in_order=sys.argv[2] == "1")
ids = np.arange(1024).reshape(4, 256)
before = read_memory().resident
session.run(None, {"input_ids": ids, "labels": ids, "core": np.eye(16, dtype=np.float32)})
print((read_memory().peak - before) / (4 * 1024 * 20000))
"""


@pytest.mark.parametrize("in_order", [0, 1])
def test_no_outputs_of_the_whole_vocabulary_are_ever_held(in_order, tmp_path):
    """In units of the outputs' size: whole, a step holds three of them; in pieces, less than a half."""
    model, _ = step_graph(20000, 16)
    growth = []
    for name in ("whole", "pieces"):
        if name == "pieces":
            assert vocabulary.write_token_loss(model, "labels", 2000 * 64)
        ir.save(model, tmp_path / f"{name}.onnx")
        command = [sys.executable, "-c", CHILD, str(tmp_path / f"{name}.onnx"), str(in_order)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth.append(json.loads(done.stdout))
    assert growth[0] > 1.8
    assert growth[1] < 0.5


def write_qwen(root):
    """A Qwen2 of two layers over 600 words, bytes as tokens; its head is its table."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **size, **heads)).save_pretrained(root)
    end = "<|endoftext|>"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), end]
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=end, pad_token=end).save_pretrained(root)


@pytest.fixture(scope="module")
def language_model(kit, tmp_path_factory):
    """An int4 bundle whose head is four pieces, and whose canary is a part of its outputs."""
    root = tmp_path_factory.mktemp("language-model")
    write_qwen(root / "base")
    (root / "data.csv").write_text("text\n" + "".join(f"abc{n} def{n}\n" for n in range(6)))
    config = TrainConfig(
        str(root / "base"), str(root / "data.csv"), task="causal-lm", rank=2, epochs=1, selection="norm",
        threads=1, targets="*.q_proj,*.down_proj",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "PIECE_BYTES", 150 * ROW)
        patch.setattr(cases, "_CANARY_BYTES", 2 * 5 * 600 * 4)
        patch.setattr(cases, "_CANARY_ENTRIES", 1000)
        return kit.export(config, root, ("onnx", "step"), precision="int4", recompute=True)


def test_a_language_model_with_a_tied_table_of_int4(kit, language_model):
    exported = language_model
    kit.check_parity(exported)
    report = exported.report.quantization
    assert 0.02 < report.relative_errors["module.lm_head.weight"] < 0.12  # int4, as of a linear layer
    for role in ("infer", "step", "step_recompute"):
        tables = [tensor for tensor in exported.graph(role).graph.initializer if 600 in tensor.dims]
        # Scales, and two numbers in each byte: no float32 table.
        assert {tensor.data_type: list(tensor.dims) for tensor in tables} == {1: [600, 1], 2: [600, 16]}
        assert len(tables) == 2
    manifest = exported.bundle.manifest
    ids = np.arange(16).reshape(2, 8)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds = build_feeds(manifest, exported.run.adapter())
    results = [
        open_engine("ort-step", exported.bundle, threads=1, graph=graph).step(inputs, ids, feeds)
        for graph in ("step", "step_recompute")
    ]
    assert [result.outputs.size for result in results] == [0, 0]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].metric is not None


def test_the_bytes_of_a_base_are_counted_once(language_model):
    """The table's pieces, and the table whose rows are picked, are one part of the file."""
    step = language_model.bundle.manifest.memory.graphs["step"]
    size = language_model.bundle.path("base.bin").stat().st_size
    assert size - 2**14 < step.base < size + 2**14  # small tensors lie in the graph


def test_the_canary_of_a_large_vocabulary_is_short_and_holds_a_part(language_model):
    """Answers that differ in what it holds, and those that are not finite anywhere, are refused."""
    bundle = language_model.bundle
    canary = read_canary(bundle.root, bundle.manifest)
    assert canary.sizes == (2, 5, 600)
    assert canary.inputs["input_ids"].shape == (2, 5)
    assert canary.base.shape == canary.adapter.shape == (2, 1000)
    steps = np.diff(canary.places)
    assert steps.min() >= 3  # evenly spread: words of each piece of the vocabulary, at each position
    assert steps.max() <= 4
    model = DeviceModel(bundle, threads=1)
    whole = model.outputs(canary.inputs)
    assert departs(canary.part(whole), canary.base) is None
    model.load("own", language_model.run.adapter())
    for place, value, problem in ((0, 1e6, "off by"), (1, np.nan, "NaN")):
        outputs = whole.copy()
        outputs[0, 0, canary.places[0] + place] = value
        model._run = lambda inputs, feeds, outputs=outputs: outputs
        with pytest.raises(IncompatibleError, match=problem):
            model._check({}, canary.base, "the base", IncompatibleError)
    short = whole[:, :4]
    assert departs(canary.part(short), canary.base).startswith("outputs of the shape [2, 4, 600]")
