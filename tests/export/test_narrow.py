"""Parts that are read: a program computes them alone, answers the same, and has the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from edge_tcur_export.narrow import narrow

_aten = torch.ops.aten
WIDTH, HEADS = 8, 2


class Block(nn.Module):
    """A block of a transformer, pre-norm, over rows as the exporter's linear layers work."""

    def __init__(self, fused, mask):
        super().__init__()
        self.fused, self.mask = fused, mask
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def rows(self, layer, x):
        output = x.reshape(-1, x.shape[-1]) @ layer.weight.T + layer.bias
        return output.reshape(*x.shape[:-1], output.shape[-1])

    def forward(self, x):
        normed = self.before(x)
        q, k, v = (
            self.rows(layer, normed).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = (
            torch.arange(x.shape[1]).unsqueeze(0) >= torch.arange(x.shape[1]).unsqueeze(1)
            if self.mask
            else None
        )
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(2, 3) * 0.5
            if mask is not None:
                scores = torch.where(mask, scores, -1e4)
            mixed = torch.softmax(scores, -1) @ v
        mixed = mixed.transpose(1, 2).reshape(*x.shape[:2], WIDTH)
        x = x + self.rows(self.out, mixed)
        return x + functional.dropout(
            self.rows(self.narrow, functional.gelu(self.rows(self.wide, self.after(x)))), 0.1, False
        )


class Classifier(nn.Module):
    """Blocks, and a classifier over what `read` takes of the last one."""

    def __init__(self, read, fused=False, mask=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(fused, mask) for _ in range(2)])
        self.norm, self.head, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), read

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.read(self.norm(x)))


def traced(model, x):
    shapes = ({0: Dim("batch", max=64), 1: Dim("places", min=3, max=64)},)
    return torch.export.export(model.eval(), (x,), dynamic_shapes=shapes)


def example(batch=3, places=5):
    return torch.randn(batch, places, WIDTH, generator=torch.Generator().manual_seed(batch))


def count_whole(program):
    """Products of a row for every place: their sizes name the symbol of the places."""
    symbol = str(
        next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "x").meta["val"].shape[1]
    )
    rows = [
        node
        for node in program.graph.nodes
        if node.target is _aten.matmul.default and len(node.meta["val"].shape) == 2
    ]
    return sum(symbol in str(node.meta["val"].shape[0]) for node in rows)


READ = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "third": lambda x: x.select(1, 2),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_the_last_block_computes_one_place_and_answers_the_same(read, fused, mask):
    torch.manual_seed(0)
    model = Classifier(READ[read], fused, mask)
    program = traced(model, example())
    before = count_whole(program)
    narrow(program)
    assert before - count_whole(program) == 4  # query, out, wide, narrow
    for batch, places in ((1, 4), (5, 9)):
        x = example(batch, places)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_same():
    torch.manual_seed(0)
    model = Classifier(READ["first"])
    x = example().requires_grad_()
    program = narrow(traced(model, example()))
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (found,) = torch.autograd.grad(program.module()(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean(1),  # all places are read
        lambda x: x[:, 0] + x[:, 1],  # two of them
        lambda x: x[:, 0] + x.mean(1),
    ],
    ids=["mean", "two", "one and all"],
)
def test_more_than_one_place_stays_as_it_is(read):
    model = Classifier(read)
    program = traced(model, example())
    before = str(program.graph)
    assert str(narrow(program).graph) == before
    torch.testing.assert_close(program.module()(example()), model(example()), rtol=1e-5, atol=1e-5)


def test_a_product_with_itself_is_needed_whole():
    class Squared(nn.Module):
        def forward(self, x):
            y = x * 2
            return (y @ y)[:, 0]

    x = torch.randn(3, WIDTH, WIDTH)
    program = torch.export.export(Squared(), (x,), dynamic_shapes=({0: Dim("batch", max=64)},))
    torch.testing.assert_close(narrow(program).module()(x), Squared()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [None, []], ids=["none", "empty"])
def test_a_mean_over_all_axes_needs_all(axes):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x).mean(axes, keepdim=True)[:, 0]

    model, x = Mean(), example()
    program = narrow(torch.export.export(model, (x,)))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_norm_over_rows_needs_them_all():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            rows = self.layer(x.reshape(-1, WIDTH))
            return functional.layer_norm(rows, rows.shape).reshape(x.shape)[:, 0]

    model, x = Normed(), example()
    program = narrow(torch.export.export(model, (x,)))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_part_that_is_an_output_keeps_its_name():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x)[:, 1]

    model, x = Alone(), example()
    program = torch.export.export(model, (x,))
    before = str(program.graph)
    assert str(narrow(program).graph) != before
    program.validate()
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_windows_are_no_places():
    """Rows that a model regroups (windows of an image) are not those of one place."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            windows = x.reshape(-1, 2, WIDTH)
            y = windows.reshape(-1, WIDTH) @ self.layer.weight
            return y.reshape(x.shape[0], x.shape[1], WIDTH)[:, 0]

    model, x = Windows(), torch.randn(3, 4, WIDTH)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", max=64)},))
    torch.testing.assert_close(narrow(program).module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_operator_that_changes_a_tensor_in_place_stops_it():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            y = self.layer(x)
            return y.add_(1)[:, 0]

    model, x = Changed().eval(), example()
    program = torch.export.export(model, (x,))
    before = str(program.graph)
    assert str(narrow(program).graph) == before


def test_the_last_block_of_an_exported_classifier_over_the_first_token(vit):
    """One of two blocks computes its feed-forward for one row of each image: its product alone has a free
    number of rows that is the batch."""
    rows = {}
    graph = vit.graph("infer").graph
    shapes = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        weight = next((name for name in node.input if name.endswith("fc1.weight_t")), None)
        if node.op_type == "MatMul" and weight is not None:
            rows[weight] = shapes[node.output[0]].dim[0].dim_param
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert len(rows) == 2
    assert [rows[name] == batch for name in sorted(rows)] == [False, True]
