"""The passes between torch's programs and ExecuTorch's: each alone, and what goes wrong without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_tcur_export.lowering import (
    PORTABLE,
    XNNPACK,
    Lowering,
    batch_products,
    drop_idle,
    import_executorch,
    left_over,
    reshape_weights,
)
from edge_tcur_export.quiet import quiet_torch

SIZE = 96


def traced(module, *arguments):
    return torch.export.export(module, arguments)


def operators(program):
    names = (getattr(node.target, "__name__", "") for node in program.graph_module.graph.nodes)
    return [name.removesuffix(".default").removeprefix("aten.") for name in names]


def in_edge_dialect(program):
    exir = import_executorch()
    with quiet_torch():
        return exir.to_edge(program).exported_program()


def lowered(program, backend):
    """The operators outside delegates, and the bytes of the program."""
    with quiet_torch():
        edge = Lowering(program).lower(backend)
        return left_over(edge.exported_program()), edge.to_executorch().buffer


def run(content, *arguments):
    import_executorch()
    with quiet_torch():
        from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

        return _load_for_executorch_from_buffer(content).run_method("forward", arguments)


class Product(nn.Module):
    """A product with a frozen matrix, and of the outcome with its transpose, as a backward pass has."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("weight", torch.randn(size, size, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.mm(torch.mm(x, self.weight).relu(), self.weight.t())


class Handed(nn.Module):
    """Expands to the shape that it has, as traced attention does."""

    def forward(self, x):
        y = torch.erf(x)
        return torch.erf(y.expand(x.shape)), y * 2


def test_large_products_become_batches_of_one():
    module, x = Product(SIZE), torch.randn(SIZE, SIZE)
    program = in_edge_dialect(traced(module, x))
    assert operators(program).count("mm") == 2
    batch_products(program.graph_module)
    found = operators(program)
    assert found.count("bmm") == 2
    assert "mm" not in found
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [8, SIZE])
def test_small_products_stay(rows):
    module = Product(SIZE if rows == 8 else 8)
    x = torch.randn(rows, len(module.weight))
    program = in_edge_dialect(traced(module, x))
    batch_products(program.graph_module)
    assert operators(program).count("mm") == 2


def test_xnnpack_takes_products_without_a_copy_of_the_weight():
    module, x = Product(SIZE), torch.randn(SIZE, SIZE)
    weight = module.weight.numpy().tobytes()
    turned = module.weight.t().contiguous().numpy().tobytes()
    left, content = lowered(traced(module, x), XNNPACK)
    assert not {"mm", "bmm"} & set(left)
    assert (content.count(weight), content.count(turned)) == (1, 0)
    torch.testing.assert_close(run(content, x)[0], module(x), rtol=0, atol=1e-4)


def test_without_the_pass_xnnpack_leaves_products_to_slower_kernels(monkeypatch):
    monkeypatch.setattr("edge_tcur_export.lowering._PASSES", {})
    module, x = Product(SIZE), torch.randn(SIZE, SIZE)
    left, _ = lowered(traced(module, x), XNNPACK)
    assert left["mm"] == 2


def test_convolutions_are_left_outside():
    module = nn.Conv2d(3, 8, 3).requires_grad_(False)
    left, _ = lowered(traced(module, torch.randn(1, 3, 8, 8)), XNNPACK)
    assert left["convolution"] == 1


def test_copies_that_change_nothing_go(monkeypatch):
    x = torch.randn(4, 8)
    left, content = lowered(traced(Handed(), x), PORTABLE)
    assert "expand_copy" not in left
    for found, expected in zip(run(content, x), Handed()(x), strict=True):
        torch.testing.assert_close(found, expected)
    monkeypatch.setattr("edge_tcur_export.lowering.drop_copies", lambda module: module)
    assert lowered(traced(Handed(), x), PORTABLE)[0]["expand_copy"] == 1


def test_a_copy_that_changes_something_stays():
    class Wide(nn.Module):
        def forward(self, x):
            return x.expand(4, 8) * 2, x.to(torch.int32) + 1

    x = torch.arange(8.0)[None]
    left, content = lowered(traced(Wide(), x), PORTABLE)
    assert {"expand_copy", "_to_dim_order_copy"} <= set(left)
    for found, expected in zip(run(content, x), Wide()(x), strict=True):
        assert torch.equal(found, expected)


def test_aliases_and_assertions_go():
    class Detached(nn.Module):
        def forward(self, x):
            torch._check(x.shape[0] > 0)
            y = torch.ops.aten.alias.default(x * 2)
            return y.detach(), y + 1

    x = torch.arange(3.0)
    program = drop_idle(traced(Detached(), x))
    assert not [
        name for name in operators(program) if "alias" in name or "detach" in name or "assert" in name
    ]
    names = [node.name for node in program.graph_module.graph.output_node().args[0]]
    assert [spec.arg.name for spec in program.graph_signature.output_specs] == names
    for found, expected in zip(program.module()(x), (x * 2, x * 2 + 1), strict=True):
        assert torch.equal(found, expected)


class Seen(nn.Module):
    """Reads a frozen tensor in another shape, and in its own too where `both` says so."""

    def __init__(self, both):
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
        self.both = both

    def forward(self, x):
        y = x * self.weight.reshape(2, 12)
        return y + self.weight.sum() if self.both else y


def external(program):
    """Program and data of a lowered program whose buffers lie in another file."""
    exir = import_executorch()
    with quiet_torch():
        edge = Lowering(program).lower(PORTABLE)
        frozen = set(edge.exported_program().graph_signature.inputs_to_buffers)
        place = lambda node: "base" if node.name in frozen else None  # noqa: E731
        return edge.to_executorch(exir.ExecutorchBackendConfig(external_constants=place))


@pytest.mark.parametrize("both", [False, True])
def test_a_frozen_tensor_that_is_read_in_another_shape(both, monkeypatch):
    module, x = Seen(both), torch.randn(2, 12)
    with monkeypatch.context() as patch:
        patch.setattr("edge_tcur_export.lowering.reshape_weights", lambda program: program)
        with pytest.raises(Exception, match="Failed with error"):
            external(traced(module, x))
    program = reshape_weights(drop_idle(traced(module, x)))
    names = list(program.state_dict)
    assert names == (["weight"] if both else ["weight_2x12"])
    assert operators(program).count("clone") == 0 or both
    torch.testing.assert_close(program.module()(x), module(x))
    assert external(traced(module, x)).buffer


def converted(monkeypatch):
    """Notes each conversion into the edge dialect that we ask for, by the function that does it."""
    exir, found = import_executorch(), []

    class Noted:
        def __getattr__(self, name):
            found.extend([name] if name.startswith("to_edge") else [])
            return getattr(exir, name)

    monkeypatch.setattr("edge_tcur_export.lowering.import_executorch", Noted)
    return found


def test_backends_share_one_conversion(monkeypatch, caplog):
    """What one backend changes is not in the other's program, in either order."""
    calls, module, x = converted(monkeypatch), Product(SIZE), torch.randn(SIZE, SIZE)
    for backends in ((PORTABLE, XNNPACK), (XNNPACK, PORTABLE)):
        lowering, found = Lowering(traced(module, x)), {}
        with quiet_torch():
            for backend in backends:
                edge = lowering.lower(backend)
                found[backend] = operators(edge.exported_program())
                (outputs,) = run(edge.to_executorch().buffer, x)
                torch.testing.assert_close(outputs, module(x), rtol=0, atol=1e-4)
        assert found[PORTABLE].count("mm") == 2
        assert "executorch_call_delegate" in found[XNNPACK]
        assert not {"mm", "bmm"} & set(found[XNNPACK])
        assert calls == ["to_edge"]
        assert "DEPRECATION" not in caplog.text  # of a conversion that the partitioner did not lead
        calls.clear()


def test_an_operator_that_a_backend_keeps_whole_has_its_own_conversion(monkeypatch):
    """`to_edge` takes a hardswish apart; XNNPACK has a kernel for the whole of it."""
    calls, module, x = converted(monkeypatch), nn.Hardswish(), torch.randn(4, 8)
    lowering = Lowering(traced(module, x))
    with quiet_torch():
        left = {b: left_over(lowering.lower(b).exported_program()) for b in (PORTABLE, XNNPACK)}
    assert left[XNNPACK] == {}
    assert left[PORTABLE]
    assert "hardswish" not in left[PORTABLE]
    assert calls == ["to_edge", "to_edge_transform_and_lower"]
