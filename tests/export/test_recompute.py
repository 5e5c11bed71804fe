"""Recompute on a small step graph written by hand: what is duplicated, that nothing merges or moves it,
that the numbers stay, and that peak memory falls."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur.errors import ExportError
from edge_tcur_export import recompute
from edge_tcur_export.recompute import block_of, recompute_blocks

BLOCKS, WIDTH = 4, 8
INPUTS = ("x",)


def text(blocks, inside):
    """Blocks ``p = (h w) c`` then ``h = p * sigmoid(p)``, a loss, and the gradient ``k`` of every ``c``, in
    torch's order: all of the forward pass, then the backward pass from the last block to the first."""
    numbers = range(blocks)
    given = ", ".join(f"float c{i}, float[{WIDTH}, {WIDTH}] w{i}" for i in numbers)
    ahead = "".join(
        f"m{i} = MatMul(h{i}, w{i})\np{i} = Mul(m{i}, c{i})\n{inside.format(i=i)}\n"
        f"h{i + 1} = Mul(p{i}, s{i})\n"
        for i in numbers
    )
    back = "".join(
        f"t{i} = Sub(one, s{i})\na{i} = Mul(p{i}, t{i})\nb{i} = Add(a{i}, one)\nd{i} = Mul(s{i}, b{i})\n"
        f"e{i} = Mul(g{i + 1}, d{i})\nf{i} = Mul(e{i}, m{i})\nk{i} = ReduceSum <keepdims = 0> (f{i})\n"
        f"u{i} = Mul(e{i}, c{i})\nv{i} = Transpose(w{i})\ng{i} = MatMul(u{i}, v{i})\n"
        for i in reversed(numbers)
    )
    outputs = ", ".join(f"float k{i}" for i in numbers)
    return f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[n, {WIDTH}] x, {given}) => (float loss, float[n, {WIDTH}] logits, {outputs})
    <float one = {{1}}, float two = {{2}}> {{
    h0 = Sigmoid(x)
    {ahead}
    logits = Identity(h{blocks})
    q = Mul(h{blocks}, h{blocks})
    loss = ReduceSum <keepdims = 0> (q)
    g{blocks} = Mul(h{blocks}, two)
    {back}
    }}"""


def build(blocks=BLOCKS, name="layers.{i}.weight", inside="s{i} = Sigmoid(p{i})"):
    model = ir.from_proto(onnx.parser.parse_model(text(blocks, inside)))
    generator, graph = np.random.default_rng(0), model.graph
    for value in [value for value in graph.inputs if value.name.startswith("w")]:
        graph.inputs.remove(value)
        value.name = name.format(i=value.name[1:])
        weight = (generator.normal(size=(WIDTH, WIDTH)) / 2).astype(np.float32)
        value.const_value = ir.tensor(weight, name=value.name)
        graph.register_initializer(value)
    return model


def feeds(samples=3, blocks=BLOCKS):
    x = np.random.default_rng(1).normal(size=(samples, WIDTH)).astype(np.float32)
    return {"x": x, **{f"c{i}": np.array(1 + i / 8, np.float32) for i in range(blocks)}}


def run(model, path):
    """Outputs by name, and how many operators of each kind are left after ONNX Runtime's optimiser."""
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, feeds())
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True)), kinds


def test_the_numbers_stay_and_the_optimiser_keeps_the_duplicates(tmp_path):
    plain, kinds = run(build(), tmp_path / "plain.onnx")
    assert kinds.count("Sigmoid") == BLOCKS + 1
    model = build()
    done = recompute_blocks(model, INPUTS)
    # The last block's backward pass comes at once; the product, its scaling and the sigmoid are needed again.
    assert [(block.name, block.nodes) for block in done] == [(f"layers.{i}", 3) for i in (2, 1, 0)]
    found, kinds = run(model, tmp_path / "again.onnx")
    # The forward pass, no longer read by the backward one, is fused.
    assert (kinds.count("Sigmoid"), kinds.count("QuickGelu")) == (BLOCKS + 1, BLOCKS - 1)
    assert len(plain) == BLOCKS + 2
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_without_the_gate_the_optimiser_merges_the_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(recompute.Gate, "__call__", lambda self, value: value)
    model = build()
    recompute_blocks(model, INPUTS)
    assert [node.op_type for node in model.graph].count("Sigmoid") == 2 * BLOCKS
    _, kinds = run(model, tmp_path / "merged.onnx")
    assert kinds.count("Sigmoid") == BLOCKS + 1


def ancestors(value):
    found, waiting = set(), [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [given for given in node.inputs if given is not None]
    return found


def test_a_duplicate_waits_for_the_gradient_of_the_block_behind():
    model = build()
    recompute_blocks(model, INPUTS)
    values = {output.name: output for node in model.graph for output in node.outputs}
    for block in range(BLOCKS - 1):
        duplicate = ancestors(values[f"s{block}.again"])
        gradients = {values[f"e{later}"].producer() for later in range(block + 1, BLOCKS)}
        assert gradients <= duplicate
        assert values[f"e{block}"].producer() not in duplicate
        # The backward pass reads nothing of the inside any more, nor does it keep it.
        for inner in ("m", "p", "s"):
            readers = {node.outputs[0].name for node in values[f"{inner}{block}"].consumers()}
            assert readers <= {f"p{block}", f"s{block}", f"h{block + 1}"}
    order = {node: place for place, node in enumerate(model.graph)}
    for node in model.graph:
        assert all(order[before] < order[node] for before in node.predecessors())


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_model_without_two_numbered_blocks_is_refused(blocks):
    name = "layers.0.part{i}.weight" if blocks else "part{i}.weight"
    with pytest.raises(ExportError, match=f"needs numbered blocks .* the model has {blocks}") as caught:
        recompute_blocks(build(name=name), INPUTS)
    assert "--recompute" in caught.value.hint


def test_what_is_drawn_at_random_is_kept():
    model = build(inside="s{i} = RandomUniformLike <seed = 1.0> (p{i})")
    done = recompute_blocks(model, INPUTS)
    assert [block.nodes for block in done] == [2, 2, 2]
    assert [node.op_type for node in model.graph].count("RandomUniformLike") == BLOCKS


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.layer.3.dense.bias", "encoder.layer.3"),
        ("0.weight", "0"),
        ("layers.1.blocks.2.fc.weight", "layers.1"),
        ("stage2.fc.weight", None),
        ("layers.3", None),
        ("head.weight", None),
    ],
)
def test_the_block_of_a_name(name, block):
    assert block_of(name) == block


PEAK = """
import sys
import numpy as np
from pathlib import Path
from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.engines.session import open_session
session = open_session(Path(sys.argv[1]), threads=1, in_order=True)
feeds = {value.name: np.ones((2**17, 8) if value.shape else (), np.float32) for value in session.get_inputs()}
before = read_memory().resident
session.run(None, feeds)
print(read_memory().peak - before)
"""


def test_peak_memory_falls(tmp_path):
    """Twelve blocks keep three values of 4 MiB each inside, and one at their border."""
    plain, again = tmp_path / "plain.onnx", tmp_path / "again.onnx"
    model = build(blocks=12)
    ir.save(model, plain)
    recompute_blocks(model, INPUTS)
    ir.save(model, again)

    def growth(path):
        command = [sys.executable, "-c", PEAK, str(path)]
        # glibc's own threshold moves while it runs, and freed values then stay in the heap, or do not
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout) / 2**20

    before = growth(plain)
    assert before > 12 * 3 * 4
    assert growth(again) < 0.6 * before
