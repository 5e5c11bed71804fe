"""Which weights are adapted, in which groups, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.quantized import Int8Linear, quantize_linears
from edge_tcur.method.targets import Group, find_targets, group_specs, layer_number, saved_parameters
from edge_tcur.models.base import base_digest
from edge_tcur_runtime.errors import BadInputError, ConfigError


def refused(model, error, match, where=None, **options):
    with pytest.raises(error, match=match) as caught:
        find_targets(model, TCurConfig(**{"rank": 2, **options}))
    if where is not None:
        assert caught.value.where == where
    return caught.value.hint


def test_projection_groups_and_the_reasons_for_the_rest(kit):
    targets = find_targets(kit.Net(), TCurConfig(rank=2), keep=("head",))
    assert [(g.name, len(g.modules), g.n1, g.n2) for g in targets.groups] == [
        ("up", 3, 12, 6),
        ("gate", 3, 12, 6),
        ("down", 3, 6, 12),
    ]
    assert targets.groups[0].modules == ("blocks.0.up", "blocks.1.up", "blocks.2.up")
    assert targets.skipped["head"] == "part of the head"
    assert targets.skipped["embed"] == "not inside a numbered layer"
    assert targets.skipped["blocks.0.norm"] == "LayerNorm, not a linear layer or convolution"
    assert "blocks.0.up" not in targets.skipped
    spec = group_specs(targets)["down"]
    assert (spec.parameters[1], spec.n1, spec.n2) == ("blocks.1.down.weight", 6, 12)


def test_shape_groups(kit):
    options = {"grouping": "shape", "coupling": "all", "targets": "embed,blocks.*"}
    targets = find_targets(kit.Net(width=4), TCurConfig(rank=2, **options))
    assert [(g.name, g.modules) for g in targets.groups] == [
        ("4x4", ("embed",)),
        ("8x4", tuple(f"blocks.{n}.{leaf}" for n in range(3) for leaf in ("up", "gate"))),
        ("4x8", ("blocks.0.down", "blocks.1.down", "blocks.2.down")),
    ]


@pytest.mark.parametrize(
    ("grouping", "coupling", "expected"),
    [
        ("projection", "none", {"up": 3, "gate": 3, "down": 3}),
        ("projection", "all", {"up": 1, "gate": 1, "down": 1}),
        ("shape", "none", {"12x6": 6, "6x12": 3}),
        ("shape", "layer", {"12x6": 3, "6x12": 3}),
        ("shape", "all", {"12x6": 1, "6x12": 1}),
        (
            "layer",
            "none",
            {f"{n}.{shape}": count for n in range(3) for shape, count in (("12x6", 2), ("6x12", 1))},
        ),
        ("layer", "layer", {f"{n}.{shape}": 1 for n in range(3) for shape in ("12x6", "6x12")}),
    ],
)
def test_blocks(kit, grouping, coupling, expected):
    groups = find_targets(kit.Net(), TCurConfig(rank=2, grouping=grouping, coupling=coupling)).groups
    assert {group.name: group.blocks for group in groups} == expected
    assert all(group.size * group.blocks == len(group.modules) for group in groups)


def test_pattern_groups(kit):
    config = TCurConfig(rank=2, grouping="*.up, *gate", targets="*.up,*.gate")
    groups = find_targets(kit.Net(), config).groups
    assert [group.modules for group in groups] == [
        tuple(f"blocks.{n}.{leaf}" for n in range(3)) for leaf in ("up", "gate")
    ]
    assert not any(set(group.name) & set("*?/\\") for group in groups)
    assert len({group.name for group in groups}) == 2


def test_patterns_choose_and_skip(kit):
    targets = find_targets(kit.Net(), TCurConfig(rank=2, targets="blocks.?.down, embed"))
    assert [g.name for g in targets.groups] == ["embed", "down"]
    assert targets.skipped["blocks.0.up"] == "matched by no target pattern"


def test_group_names_of_sequential_models_are_distinct_and_plain(kit):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    targets = find_targets(model, TCurConfig(rank=2))
    assert [(g.name, g.modules) for g in targets.groups] == [("6x4", ("0",)), ("6x6", ("2", "4"))]
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    assert [(g.name, g.modules) for g in find_targets(model, TCurConfig(rank=2)).groups] == [
        ("linear", ("0", "1"))
    ]
    same_leaf = nn.ModuleDict({"a": nn.ModuleList([kit.Block(4)]), "b": nn.ModuleList([kit.Block(4)])})
    assert [g.name for g in find_targets(same_leaf, TCurConfig(rank=2)).groups] == [
        "a.up", "a.gate", "a.down", "b.up", "b.gate", "b.down",
    ]  # fmt: skip


def test_without_numbered_layers_every_linear_is_adapted():
    model = nn.ModuleDict({"first": nn.Linear(4, 6), "second": nn.Linear(6, 4)})
    assert [g.name for g in find_targets(model, TCurConfig(rank=2)).groups] == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "number"), [("layers.3.q", 3), ("a.12", 12), ("0", 0), ("layer1.conv", None), ("e.1.f.2", 1)]
)
def test_layer_numbers(name, number):
    assert layer_number(name) == number


def test_layers_to_transform(kit):
    targets = find_targets(kit.Net(), TCurConfig(rank=2, layers_to_transform=(0, 2)))
    assert targets.groups[0].modules == ("blocks.0.up", "blocks.2.up")
    assert targets.skipped["blocks.1.up"] == "not among the layers to transform"
    refused(kit.Net(), ConfigError, "the base has no layer 3; its layers are 0 to 2", "layers_to_transform",
            layers_to_transform=(1, 3))  # fmt: skip
    refused(nn.Linear(4, 4), ConfigError, "its layers are not numbered", "layers_to_transform",
            layers_to_transform=(0,))  # fmt: skip


def test_ranks_by_module(kit):
    config = TCurConfig(rank=2, rank_pattern={"*.up": 1, "*.?own": 4, "blocks.*": 3})
    assert [g.rank for g in find_targets(kit.Net(), config).groups] == [1, 3, 4]
    hint = refused(kit.Net(), ConfigError, r"one group get the ranks \[2, 4\]: blocks\.0\.up", "rank_pattern",
                   rank_pattern={"blocks.1.*": 4})  # fmt: skip
    assert "name all of the group" in hint
    hint = refused(kit.Net(), ConfigError, r"the pattern '\*\.uq' matches no adapted module", "rank_pattern",
                   rank_pattern={"*.uq": 4})  # fmt: skip
    assert "blocks.0.up" in hint
    injection = kit.adapt(kit.Net(), config)
    assert [tuple(core.shape) for core in injection.parameters()] == [(3, 1, 1), (3, 3, 3), (3, 4, 4)]


def test_a_tied_weight_is_adapted_once(kit):
    model = kit.Net()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    targets = find_targets(model, TCurConfig(rank=2))
    assert targets.groups[0].modules == ("blocks.0.up", "blocks.1.up")
    assert targets.skipped["blocks.2.up"] == "its weight is tied to blocks.0.up"


def test_a_tied_weight_that_is_named_is_refused(kit):
    model = kit.Net()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    match = r"the weight of blocks\.2\.up is tied to blocks\.0\.up"
    hint = refused(model, ConfigError, match, "targets", targets="*.up")
    assert "leave it out of the patterns" in hint
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "output": nn.Linear(4, 5, bias=False)})
    tied["output"].weight = tied["embedding"].weight
    refused(tied, ConfigError, "the weight of output is tied to embedding", "targets", targets="output")
    refused(tied, BadInputError, "no weight that can be adapted")


def test_a_rank_larger_than_a_weight(kit):
    match = r"rank 7 is larger than the weight blocks\.0\.up \[12, 6\]"
    assert "at most 6" in refused(kit.Net(), ConfigError, match, "rank", rank=7)
    refused(
        kit.Net(), ConfigError, r"rank 7 .* blocks\.0\.down \[6, 12\]", "rank", rank_pattern={"*.down": 7}
    )
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3))
    refused(
        convolution, ConfigError, r"rank 3 is larger than the weight 0 \[2, 9\]", "rank", rank=3, targets="0"
    )


def test_nothing_to_adapt(kit):
    hint = refused(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), BadInputError, "no weight that can be adapted"
    )
    assert "0: Conv2d: adapted where --targets names it" in hint
    assert "there are none" in refused(nn.ReLU(), BadInputError, "no weight that can be adapted", "ReLU")


def test_patterns_that_match_nothing(kit):
    match = r"'\*\.query' matches no module that can be adapted"
    assert "blocks.0.up" in refused(kit.Net(), ConfigError, match, "targets", targets="*.up,*.query")
    # A module that is there, but has no weight that can be adapted, is not one.
    refused(kit.Net(), ConfigError, r"'\*\.norm' matches no module that can be adapted", targets="*.norm")
    with pytest.raises(ConfigError, match="'tail' matches no module with weights") as caught:
        saved_parameters(kit.Net(), ("head", "tail"))
    assert caught.value.where == "modules_to_save"
    assert set(saved_parameters(kit.Net(), ("head", "e*"))) == {
        f"{name}.{part}" for name in ("head", "embed") for part in ("weight", "bias")
    }


def test_a_module_that_is_saved_is_not_adapted(kit):
    config = TCurConfig(rank=2, modules_to_save=("*.up", "blocks.1.down"))
    targets = find_targets(kit.Net(), config)
    assert [group.modules for group in targets.groups] == [
        ("blocks.0.gate", "blocks.1.gate", "blocks.2.gate"),
        ("blocks.0.down", "blocks.2.down"),
    ]
    assert targets.skipped["blocks.2.up"] == "trained in full (modules_to_save)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(kit, value):
    model = kit.Net()
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = value
    refused(model, BadInputError, r"blocks\.1\.down: the weight holds NaN or infinity")
    with pytest.raises(BadInputError, match=r"blocks\.1\.down"):
        inject(model, TCurConfig(rank=2, selection="norm"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mixed_dtypes_in_a_group(kit):
    model = kit.Net()
    model.blocks[1].up.half()
    refused(model, BadInputError, "different dtypes", "up")
    model = kit.Net()
    model.blocks[1].up = Int8Linear(model.blocks[1].up)
    refused(model, BadInputError, "different dtypes", "up")


def test_different_shapes_in_a_group():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(4, 6))
    match = r"1 is \[6, 6\], 0 \[6, 4\]: weights of different shapes cannot share a tensor"
    refused(model, ConfigError, match, "grouping", grouping="?")
    # A projection whose shape changes from layer to layer is one tensor a shape.
    groups = find_targets(model, TCurConfig(rank=2)).groups
    assert [group.modules for group in groups] == [("0", "2"), ("1",)]


def test_a_module_that_no_grouping_pattern_matches(kit):
    hint = refused(kit.Net(), ConfigError, r"no grouping pattern matches the adapted module blocks\.0\.down",
                   "grouping", grouping="*.up,*.gate")  # fmt: skip
    assert "projection, shape, layer" in hint


def test_coupling_by_layer_takes_layers_of_one_size(kit):
    options = {"grouping": "shape", "coupling": "layer"}
    hint = refused(kit.Net(), ConfigError, "the group 12x6 has not the same number of weights in every layer",
                   "coupling", targets="blocks.0.gate,*.up", **options)  # fmt: skip
    assert "none or all" in hint
    beside = nn.ModuleDict(
        {"in": nn.Linear(4, 4), "layers": nn.ModuleList([nn.Linear(4, 4)]), "out": nn.Linear(4, 4)}
    )
    refused(beside, ConfigError, "has not the same number of weights in every layer", "coupling",
            targets="*", **options)  # fmt: skip


def test_two_towers_number_their_layers_apart():
    model = nn.ModuleDict(
        {
            name: nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for _ in range(2))
            for name in ("text", "vision")
        }
    )
    config = TCurConfig(rank=2, grouping="shape", coupling="layer")
    (group,) = find_targets(model, config).groups
    assert (group.blocks, group.size) == (4, 2)
    assert group.modules[2:6] == ("text.1.q", "text.1.k", "vision.0.q", "vision.0.k")
    groups = find_targets(model, TCurConfig(rank=2, grouping="layer", coupling="all")).groups
    assert [(group.name, group.modules) for group in groups] == [
        (f"{tower}.{number}.4x4", (f"{tower}.{number}.q", f"{tower}.{number}.k"))
        for tower in ("text", "vision")
        for number in range(2)
    ]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 4)


def test_reasons_of_modules_that_cannot_be_adapted():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "attention": Attention(),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "own": Own(4, 4),
            "embedding": nn.Embedding(3, 4),
        }
    )
    targets = find_targets(model, TCurConfig(rank=2))
    assert [group.modules for group in targets.groups] == [("attention.out",)]
    assert targets.skipped["attention.attention"].startswith(
        "nn.MultiheadAttention reads its packed weights itself"
    )
    # Its output projection is a subclass of nn.Linear, whose weight the attention reads itself.
    assert "not a linear layer" in targets.skipped["attention.attention.out_proj"]
    assert targets.skipped["grouped"] == "Conv2d with groups: no column reaches all of its outputs"
    for name, kind in (("transposed", "ConvTranspose2d"), ("own", "Own"), ("embedding", "Embedding")):
        assert targets.skipped[name] == f"{kind}, not a linear layer or convolution"
    for name in ("grouped", "own", "attention.attention", "attention.attention.out_proj"):
        refused(model, ConfigError, f"'{name}' matches no module that can be adapted", targets=name)


def test_convolutions_are_taken_where_they_are_named():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(2, 6, 3), nn.Linear(4, 4))
    assert [group.modules for group in find_targets(model, TCurConfig(rank=2)).groups] == [("3",)]
    groups = find_targets(model, TCurConfig(rank=2, targets="0,1,2")).groups
    assert [(group.modules, group.n1, group.n2) for group in groups] == [(("0", "2"), 6, 18), (("1",), 6, 6)]


def test_quantised_layers_are_targets(kit):
    model = kit.Net()
    names = quantize_linears(model, keep=("head",))
    assert "embed" in names
    assert "head" not in names
    targets = find_targets(model, TCurConfig(rank=2))
    assert [(group.name, group.n1, group.n2) for group in targets.groups] == [
        ("up", 12, 6), ("gate", 12, 6), ("down", 6, 12),
    ]  # fmt: skip


def test_sizes_of_a_group():
    group = Group("q", ("a", "b", "c", "d"), 4, 4, 2, blocks=2)
    assert group.size == 2


@pytest.mark.parametrize("patterns", [("output",), ("embedding",), ("embedding", "output")])
def test_a_module_that_is_tied_to_another_is_not_trained_in_full(patterns):
    """A copy of its weight would untie the two without a word."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "output": nn.Linear(4, 5, bias=False)})
    model["output"].weight = model["embedding"].weight
    with pytest.raises(ConfigError, match=r"weight is tied to (output|embedding)\.weight") as caught:
        saved_parameters(model, patterns)
    assert caught.value.where == "modules_to_save"


def test_a_plain_name_is_the_last_part_of_a_name_and_a_pattern_the_whole(kit):
    def adapted(**options):
        targets = find_targets(kit.Net(), TCurConfig(rank=2, **options))
        return {name for group in targets.groups for name in group.modules}

    ups = {f"blocks.{number}.up" for number in range(3)}
    assert adapted(targets="up") == adapted(targets=["up"]) == adapted(targets="*.up") == ups
    assert adapted(targets="1.up,head") == {"blocks.1.up", "head"}
    refused(kit.Net(), ConfigError, "the target pattern 'p' matches no module", "targets", targets=["p"])
    refused(kit.Net(), ConfigError, r"'u\?' matches no module", "targets", targets=["u?"])
    targets = find_targets(kit.Net(), TCurConfig(rank=2, targets="down", modules_to_save=("up",)))
    assert {name for name, reason in targets.skipped.items() if "modules_to_save" in reason} == ups


def test_a_whole_name_comes_before_one_that_only_ends_like_it():
    """Ranks that were shared out name every module in full; another tower may end with the same name."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "b": nn.Linear(4, 4)})
    options = {"grouping": "weight", "rank_pattern": {"b": 1, "a.b": 3}}
    targets = find_targets(model, TCurConfig(rank=2, targets="b", **options))
    assert {group.modules: group.rank for group in targets.groups} == {("a.b",): 3, ("b",): 1}


def test_a_weight_of_a_kind_that_cannot_be_read_is_refused_by_name(kit):
    """As a weight that torchao quantised: a tensor of its own class in an ordinary linear layer."""

    class Packed(torch.Tensor):
        def numpy(self, *arguments, **options):
            raise RuntimeError("cannot be read")

    model = kit.Net()
    layer = model.blocks[1].up
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    hint = refused(model, BadInputError, "the weight is a Packed, not a plain tensor", "blocks.1.up")
    assert "quantize_linears" in hint
    targets = find_targets(model, TCurConfig(rank=2, targets="down"))
    assert [group.modules for group in targets.groups] == [tuple(f"blocks.{i}.down" for i in range(3))]
    with pytest.raises(BadInputError, match=r"blocks\.1\.up\.weight.*is a Packed"):
        base_digest(model)
