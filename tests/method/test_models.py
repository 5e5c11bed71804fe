"""Architectures as `transformers` writes them, with small random weights: what is adapted, that gradients
flow, and that merging, unmerging and removing give back what they should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.forms import possible_forms
from edge_tcur.method.layer import AdaptedLayer
from edge_tcur.method.quantized import Int8Linear, quantize_linears
from edge_tcur.method.targets import find_targets
from edge_tcur_runtime.errors import BadInputError, ConfigError


@dataclass(frozen=True)
class Case:
    """A model, how it is called, and the groups that all-linear gives."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    output: str
    groups: dict[str, tuple[int, int, int]]

    def __call__(self) -> torch.Tensor:
        """The output named `output`."""
        value: torch.Tensor = getattr(self.model(**self.inputs), self.output)
        return value

    def loss(self, _: Any = None) -> torch.Tensor:
        """Some scalar of it."""
        value = self().float()
        return (value * torch.linspace(-1, 1, value.numel()).reshape(value.shape)).square().mean()


TOKENS = torch.arange(10).reshape(2, 5) % 7
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    groups = {
        "attn.c_attn": (2, 48, 16),
        "attn.c_proj": (2, 16, 16),
        "mlp.c_fc": (2, 64, 16),
        "mlp.c_proj": (2, 16, 64),
    }
    return Case(GPT2LMHeadModel(config), {"input_ids": TOKENS}, "logits", groups)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    groups = {
        f"self_attn.{leaf}_proj": (2, n1, 16) for leaf, n1 in (("q", 16), ("k", 8), ("v", 8), ("o", 16))
    }
    groups |= {"mlp.gate_proj": (2, 24, 16), "mlp.up_proj": (2, 24, 16), "mlp.down_proj": (2, 16, 24)}
    return Case(LlamaForCausalLM(config), {"input_ids": TOKENS}, "logits", groups)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=3,
    )  # fmt: skip
    groups = {f"attention.{leaf}_proj": (2, 16, 16) for leaf in "qkvo"}
    groups |= {"mlp.fc1": (2, 32, 16), "mlp.fc2": (2, 16, 32)}
    return Case(ViTForImageClassification(config), {"pixel_values": PIXELS}, "logits", groups)


def clip():
    from transformers import CLIPConfig, CLIPModel

    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**part, "vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 6}
    config = CLIPConfig(
        text_config=text, vision_config={**part, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    groups = {
        f"{side}.encoder.layers.{leaf}": sizes
        for side in ("text_model", "vision_model")
        for leaf, sizes in (
            *((f"self_attn.{name}_proj", (2, 16, 16)) for name in ("q", "k", "v", "out")),
            ("mlp.fc1", (2, 32, 16)),
            ("mlp.fc2", (2, 16, 32)),
        )
    }
    return Case(CLIPModel(config), {"input_ids": TOKENS, "pixel_values": PIXELS}, "logits_per_image", groups)


BUILDERS = {"gpt2": gpt2, "llama": llama, "vit": vit, "clip": clip}


@pytest.fixture(scope="module")
def built():
    """Every model, built once; the tests leave its bits as they were."""
    result = {}
    for name, builder in BUILDERS.items():
        torch.manual_seed(0)
        result[name] = builder()
        result[name].model.eval()
    return result


@pytest.fixture(params=sorted(BUILDERS))
def case(request, built, kit):
    case = built[request.param]
    modules, bits = dict(case.model.named_modules()), kit.bits(case.model)
    yield case
    assert dict(case.model.named_modules()) == modules
    assert kit.bits(case.model) == bits


CONFIGS = {
    "default": {},
    "sketch": {"frame": "sketch"},
    "paper": {"grouping": "shape", "coupling": "all", "selection": "norm", "frame": "raw"},
    "layer": {"grouping": "shape", "coupling": "layer", "transform": "dct", "selection": "leverage"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=list(CONFIGS))
def test_adapt_train_merge_unmerge_remove(case, options, kit):
    config = TCurConfig(rank=4, **options)
    bits = kit.bits(case.model)
    with torch.no_grad():
        base = case()
    injection = kit.adapt(case.model, config, loss=case.loss)
    if not options:
        found = {group.name: (len(group.modules), group.n1, group.n2) for group in injection.targets.groups}
        assert {name.removeprefix("transformer.h."): sizes for name, sizes in found.items()} == case.groups
    with torch.no_grad():
        torch.testing.assert_close(case(), base, rtol=1e-6, atol=1e-6)
    case.loss().backward()
    for core in injection.parameters():
        assert core.grad is not None
        assert core.grad.abs().max() > 0
    kit.stir(injection)
    with torch.no_grad():
        adapted = case()
        assert (adapted - base).abs().max() > 1e-3 * base.abs().max()
        injection.merge()
        torch.testing.assert_close(case(), adapted, rtol=1e-4, atol=1e-5)
        injection.unmerge()
        assert torch.equal(case(), adapted)
        with injection.disabled():
            assert torch.equal(case(), base)
    again = {name.replace(".base.", "."): value for name, value in kit.bits(case.model).items()}
    assert again == bits
    injection.remove()
    with torch.no_grad():
        assert torch.equal(case(), base)


@pytest.mark.parametrize("form", ["gather", "factored", "materialised", "merged"])
def test_every_form_gives_the_same_outputs_and_gradients(case, form, kit):
    injection = kit.adapt(case.model, TCurConfig(rank=3), loss=case.loss)
    kit.stir(injection)
    results = []
    for own in ("materialised", form):
        for layer in injection.layers().values():
            layer.form = own
        for core in injection.parameters():
            core.grad = None
        loss = case.loss()
        loss.backward()
        results.append([loss.detach(), *(core.grad for core in injection.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
    injection.remove()


PATTERNS = {
    "gpt2": "*.c_attn",
    "llama": "*.q_proj,*.v_proj",
    "vit": "*.mlp.*",
    "clip": "vision_model.*.q_proj",
}


def test_targets_by_pattern(built, kit):
    for name, pattern in PATTERNS.items():
        case = built[name]
        targets = find_targets(case.model, TCurConfig(rank=2, targets=pattern, selection="norm"))
        injection = inject(case.model, TCurConfig(rank=2, targets=pattern, selection="norm"))
        adapted = [key for key, module in case.model.named_modules() if isinstance(module, AdaptedLayer)]
        assert sorted(adapted) == sorted(module for group in targets.groups for module in group.modules)
        assert len(adapted) == {"gpt2": 2, "llama": 4, "vit": 4, "clip": 2}[name]
        case.loss().backward()
        assert all(core.grad.abs().max() > 0 for core in injection.parameters())
        injection.remove()


def test_what_is_left_alone(built):
    skipped = find_targets(built["gpt2"].model, TCurConfig()).skipped
    assert skipped["lm_head"] == "not inside a numbered layer"
    assert skipped["transformer.wte"] == "Embedding, not a linear layer or convolution"
    with pytest.raises(ConfigError, match=r"the weight of lm_head is tied to transformer\.wte"):
        find_targets(built["gpt2"].model, TCurConfig(targets="lm_head"))
    skipped = find_targets(built["vit"].model, TCurConfig()).skipped
    assert skipped["vit.embeddings.patch_embeddings.projection"] == "Conv2d: adapted where --targets names it"


def test_the_fused_projection_of_gpt2_against_its_three_parts(built, kit):
    """c_attn holds q, k and v side by side and transposed: rows of the factors are its output features."""
    model = built["gpt2"].model
    injection = inject(model, TCurConfig(rank=4, targets="*.c_attn", selection="leverage"))
    kit.stir(injection)
    layer = model.transformer.h[1].attn.c_attn
    (group,) = injection.groups.values()
    factors = group.factors()
    assert factors.rows.max() < 48
    assert factors.cols.max() < 16
    weight = layer.base.weight.detach().T.double()
    update = weight[:, factors.cols[1]] @ torch.from_numpy(factors.core[1]).double() @ weight[factors.rows[1]]
    x = torch.randn(2, 5, 16)
    expected = x.double() @ (weight + update).T + layer.base.bias.double()
    for form in possible_forms(layer.view, has_rows=True):
        layer.form = form
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    injection.remove()


class Convolutions(nn.Module):
    """A stem, two residual blocks of a 3x3 and a 1x1 convolution, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"wide": nn.Conv2d(6, 8, 3, padding=1), "narrow": nn.Conv2d(8, 6, 1, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["narrow"](torch.tanh(block["wide"](x)))
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "options", [{}, {"frame": "sketch"}, {"coupling": "all"}, {"coupling": "all", "transform": "dct"}]
)
def test_convolutions(options, kit):
    model = Convolutions()
    modules, bits = dict(model.named_modules()), kit.bits(model)
    config = TCurConfig(rank=3, targets="*.wide,*.narrow,head", **options)

    def loss(_=None):
        return nn.functional.cross_entropy(model(PIXELS), torch.tensor([0, 2]))

    with torch.no_grad():
        base = model(PIXELS)
    injection = kit.adapt(model, config, loss=loss)
    assert [(group.name, group.n1, group.n2) for group in injection.targets.groups] == [
        ("wide", 8, 54), ("narrow", 6, 8), ("head", 3, 6),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(injection.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert all(core.grad.abs().max() > 0 for core in injection.parameters())
    with torch.no_grad():
        adapted = model(PIXELS)
        forms = {name: layer.form for name, layer in injection.layers().items()}
        for layer in injection.layers().values():
            layer.form = "materialised"
        torch.testing.assert_close(model(PIXELS), adapted, rtol=1e-4, atol=1e-5)
        for name, layer in injection.layers().items():
            layer.form = forms[name]
        injection.merge()
        torch.testing.assert_close(model(PIXELS), adapted, rtol=1e-4, atol=1e-5)
        injection.unmerge()
        assert torch.equal(model(PIXELS), adapted)
        injection.remove()
        assert torch.equal(model(PIXELS), base)
    assert dict(model.named_modules()) == modules
    assert kit.bits(model) == bits


@pytest.mark.parametrize("options", CONFIGS.values(), ids=list(CONFIGS))
def test_a_bfloat16_base(options, kit):
    model = kit.Net(width=16).bfloat16()
    bits = kit.bits(model)
    config = TCurConfig(rank=4, modules_to_save=("head",), **options)
    injection = kit.adapt(model, config)
    cores, saved = injection.trained()
    assert {core.dtype for core in cores} == {torch.float32}
    assert {value.dtype for value in saved} == {torch.bfloat16}
    losses = kit.train(model, injection.parameters(), steps=20)
    assert losses[-1] < 0.8 * losses[0]
    for core in cores:
        assert core.dtype == core.grad.dtype == torch.float32
        assert core.abs().max() > 0
    x = kit.batch()[0].bfloat16()
    with torch.no_grad():
        adapted = model(x)
        assert adapted.dtype == torch.bfloat16
        injection.merge()
        torch.testing.assert_close(model(x), adapted, rtol=0.1, atol=0.1)
        injection.unmerge()
        assert torch.equal(model(x), adapted)
    injection.remove()
    assert kit.bits(model) == bits


@pytest.mark.parametrize("options", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_base(options, dtype, kit):
    model = kit.Net(width=16).to(dtype)
    quantize_linears(model)
    modules, bits = dict(model.named_modules()), kit.bits(model)
    x = kit.batch()[0].to(dtype)
    with torch.no_grad():
        base = model(x)
    injection = kit.adapt(model, TCurConfig(rank=4, **options))
    assert {core.dtype for core in injection.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(model(x), base, rtol=1e-6, atol=1e-6)
    losses = kit.train(model, injection.parameters(), steps=10)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = model(x)
        with pytest.raises(ConfigError, match="no int8 weight") as caught:
            injection.merge()
        assert (caught.value.where, "dequantize" in caught.value.hint) == ("blocks.0.up", True)
        assert torch.equal(model(x), adapted)  # refused before anything was changed
        injection.merge(dequantize=True)
        assert type(model.blocks[0].up) is nn.Linear
        assert model.blocks[0].up.weight.dtype == model.blocks[0].up.bias.dtype == dtype
        assert type(model.head) is Int8Linear
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(model(x), adapted, rtol=tolerance, atol=tolerance)
        injection.unmerge()
        assert torch.equal(model(x), adapted)
    injection.remove()
    assert dict(model.named_modules()) == modules
    assert kit.bits(model) == bits


@pytest.mark.parametrize("bias", [True, False])
def test_int8_weights_are_the_nearest(bias):
    torch.manual_seed(0)
    linear = nn.Linear(5, 4, bias=bias)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8
    step = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.dequantize() - linear.weight).abs() <= step / 2 + 1e-7).all()
    assert layer.weight.abs().amax(dim=1).tolist() == [127, 127, 0, 127]
    x = torch.randn(3, 5)
    expected = x @ layer.dequantize().T + (linear.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    assert not list(layer.parameters())


def test_quantising_all_but_a_head():
    model = nn.ModuleDict(
        {"head": nn.Sequential(nn.Linear(3, 3)), "header": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}
    )
    assert quantize_linears(model, keep=("head",)) == ["header"]
    assert type(model["head"][0]) is nn.Linear


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-5])
def test_quantised_weights_are_within_half_a_step_in_every_dtype(kind, size):
    torch.manual_seed(0)
    linear = nn.Linear(40, 30).to(kind)
    with torch.no_grad():
        linear.weight.mul_(size)
        linear.weight[3] = 0
    layer = Int8Linear(linear)
    error = (layer.weight.float() * layer.scale.float()[:, None] - linear.weight.float()).abs()
    assert (error <= 0.51 * layer.scale.float()[:, None]).all()
    assert not layer.weight[3].any()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_not_quantised_nor_adapted(kit, value):
    model = kit.Net()
    with torch.no_grad():
        model.blocks[1].down.weight[2, 3] = value
    with pytest.raises(BadInputError, match=r"blocks\.1\.down.*NaN or infinity"):
        quantize_linears(model)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    model.blocks[1].down = Int8Linear(model.blocks[1].down)  # past the check
    with pytest.raises(BadInputError, match=r"blocks\.1\.down.*NaN or infinity"):
        find_targets(model, TCurConfig(rank=2, targets="*.1.down"))
