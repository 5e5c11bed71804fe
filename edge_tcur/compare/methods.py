"""The methods of a comparison: ours, rivals on the same code path, and rivals through `peft`.

Every method gets the same base with the same warmed-up head and the same loop; only what is trained
besides the head differs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from edge_tcur.method.adapted import Injection, inject
from edge_tcur.method.allocation import share_out
from edge_tcur.method.config import PRESETS, TCurConfig, preset
from edge_tcur.method.group import Member, member_of
from edge_tcur.method.selection import GRADIENT
from edge_tcur.method.targets import Targets, find_targets
from edge_tcur.models import Base
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.factors import AnyFactors, SketchFactors
from edge_tcur_runtime.formats.schema import nearest

_RATES = {"core": (5e-3, 1e-2, 2e-2), "lora": (5e-4, 1e-3, 2e-3), "full": (5e-5, 1e-4, 2e-4)}


@dataclass(frozen=True)
class Prepared:
    """A model made ready for one method.

    Attributes:
        parameters: what is trained besides the head.
        trained_numbers: how many numbers these are.
        shipped_bytes: what a device needs besides base and head.
    """

    parameters: list[nn.Parameter]
    trained_numbers: int
    shipped_bytes: int


# (selection, targets) -> what that selection looks at: module name -> [n1, n2]
Directions = Callable[[str, Targets], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: stable name, also in the records.
        about: one line.
        rates: learning rates that are swept.
        prepare: changes a base in place; the second argument gives its weights' directions.
    """

    name: str
    about: str
    rates: tuple[float, ...]
    prepare: Callable[[Base, Directions], Prepared] = field(repr=False)


def tcur(config: TCurConfig, *, shared: bool = False) -> Callable[[Base, Directions], Prepared]:
    """A method of ours; `shared` gives the same numbers to the weights by energy."""

    def prepare(base: Base, directions: Directions) -> Prepared:
        own, found = config, None
        targets = find_targets(base.model, config, keep=base.head)
        if config.needs_directions:
            found = directions(config.selection, targets)
        if shared and found is not None:
            budget = sum(len(group.modules) * group.rank**2 for group in targets.groups)
            ranks = share_out(base.model, found, budget, config.frame)
            own = replace(config, grouping="weight", rank_pattern=ranks)
        return _prepared(inject(base.model, own, keep=base.head, directions=found))

    return prepare


def _prepared(injection: Injection) -> Prepared:
    tensors: dict[str, np.ndarray] = {}
    for name, factors in injection.factors().items():
        tensors |= {f"{name}.{part}": value for part, value in factors.stored().items()}
    parameters = injection.parameters()
    for name, value in injection.adapters[injection.active or ""].saved.items():
        tensors[name] = value.detach().cpu().numpy()
    return Prepared(parameters, _count(parameters), len(save(tensors)))


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class DenseFactors(SketchFactors):
    """As sketches, between float32 vectors that are used as they are: what LoRA-XS ships or recomputes.

    Not a format of ours: it cannot be stored. The vectors [n3, n1, r] and [n3, r, n2] stand where sketches
    have packed ones.
    """

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """The frozen vectors."""
        return self.packed_left, self.packed_right


def core_between(
    vectors: Callable[[Member, Tensor | None, int], tuple[Tensor, Tensor]],
    rank: int,
    *,
    gradients: bool,
) -> Callable[[Base, Directions], Prepared]:
    """A core between dense frozen vectors left [n1, r] and right [r, n2] of each weight."""
    config = TCurConfig(rank=rank, **PRESETS["sketch"])

    def prepare(base: Base, find: Directions) -> Prepared:
        targets = find_targets(base.model, config, keep=base.head)
        found = find(GRADIENT, targets) if gradients else {}
        factors: dict[str, AnyFactors] = {}
        frozen = 0
        for group in targets.groups:
            pairs = [vectors(member_of(base.model, name), found.get(name), rank) for name in group.modules]
            left, right = (
                np.stack([part.float().cpu().numpy() for part in parts]) for parts in zip(*pairs, strict=True)
            )
            core = np.zeros((len(pairs), rank, rank), np.float32)
            factors[group.name] = DenseFactors(core, left, right, group.n1, group.n2)
            frozen += (left.nbytes + right.nbytes) * gradients
        injection = Injection(base.model)
        injection.add("dense", config, keep=base.head, factors=factors)
        parameters = injection.parameters()
        return Prepared(parameters, _count(parameters), 4 * _count(parameters) + frozen)

    return prepare


def _lora_xs(member: Member, _: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA-XS (arXiv 2405.17604): ``A = U_r S_r``, ``B = V_r^T`` of the frozen weight."""
    left, values, right = torch.linalg.svd(member.matrix().double(), full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def _gradient_svd(_: Member, gradient: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of the gradient, not rounded: what the ``sketch`` frame rounds."""
    assert gradient is not None
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    return left[:, :rank], right[:rank]


def through_peft(make: Callable[[list[str]], Any]) -> Callable[[Base, Directions], Prepared]:
    """A method of the `peft` library on the same linear layers."""

    def prepare(base: Base, _: Directions) -> Prepared:
        import peft

        targets = find_targets(base.model, TCurConfig(rank=1), keep=base.head)
        names = [name for group in targets.groups for name in group.modules]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base.model, make(names))  # changes base.model in place
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        size = len(save({name: value.detach().cpu().numpy() for name, value in trained.items()}))
        return Prepared(list(trained.values()), _count(list(trained.values())), size)

    return prepare


def _peft(kind: str, **options: Any) -> Callable[[list[str]], Any]:
    def make(names: list[str]) -> Any:
        import peft

        if kind == "IA3Config":
            wide = [name for name in names if name.endswith((".output.dense", "intermediate.dense", "fc2"))]
            options["feedforward_modules"] = wide
        return getattr(peft, kind)(target_modules=names, **options)

    return make


def _nothing(_: Base, __: Directions) -> Prepared:
    return Prepared([], 0, 0)


def _everything(base: Base, _: Directions) -> Prepared:
    head = {id(value) for value in base.head_parameters().values()}
    parameters = [value for value in base.model.parameters() if id(value) not in head]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return Prepared(parameters, _count(parameters), 4 * _count(parameters))


def _ours(name: str, about: str, config: TCurConfig, rates: tuple[float, ...] = _RATES["core"]) -> Method:
    return Method(name, about, rates, tcur(config))


def _list() -> list[Method]:
    core, lora, full = _RATES["core"], _RATES["lora"], _RATES["full"]
    methods = [
        Method("head", "the head alone", (0.0,), _nothing),
        Method("full", "every weight", full, _everything),
        Method("lora-r8", "LoRA r8 (peft)", lora, through_peft(_peft("LoraConfig", r=8, lora_alpha=16))),
        Method("lora-r1", "LoRA r1 (peft)", lora, through_peft(_peft("LoraConfig", r=1, lora_alpha=2))),
        Method(
            "dora-r8",
            "DoRA r8 (peft)",
            lora,
            through_peft(_peft("LoraConfig", r=8, lora_alpha=16, use_dora=True)),
        ),
        Method(
            "vera-r256",
            "VeRA r256 (peft)",
            (5e-3, 2e-2, 5e-2),
            through_peft(_peft("VeraConfig", r=256, save_projection=False)),
        ),
        Method("ia3", "IA3 (peft)", (5e-3, 2e-2, 5e-2), through_peft(_peft("IA3Config"))),
        Method("lora-xs-r8", "LoRA-XS r8", core, core_between(_lora_xs, 8, gradients=False)),
        Method(
            "gradient-svd-r8",
            "gradient singular vectors r8",
            core,
            core_between(_gradient_svd, 8, gradients=True),
        ),
    ]
    methods += [
        _ours(f"{name}-r{rank}", f"preset {name}, r{rank}", preset(name, rank=rank))
        for name in PRESETS
        for rank in (3, 8, 16, 32)
    ]
    methods += [
        Method(
            f"{name}-shared-r{rank}",
            f"preset {name}, the numbers of r{rank} shared out by energy",
            core,
            tcur(preset(name, rank=rank), shared=True),
        )
        for name in ("gradient", "sketch", "update", "update-sketch")
        for rank in (3, 8, 16)
    ]
    return methods


METHODS: dict[str, Method] = {method.name: method for method in _list()}


def _settings(text: str) -> TCurConfig:
    try:
        settings = json.loads(text)
        base = preset(settings.pop("preset")) if "preset" in settings else TCurConfig()
        return replace(base, **settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"not settings of a method: {error}", where="method", hint='for example {"rank": 4}'
        ) from error


def find_method(name: str) -> Method:
    """The method of that name, or one given as JSON of `TCurConfig`'s settings.

    ``{"preset": "gradient", "rank": 4}`` starts from a preset.

    Raises:
        ConfigError: no such method (the nearest is suggested), or settings that are not allowed.
    """
    if name.startswith("{"):
        return _ours(name, name, _settings(name))
    if name not in METHODS:
        guess = nearest(name, METHODS)
        raise ConfigError(
            f"the method {name!r} is not known",
            where="method",
            hint=f"did you mean {guess!r}?" if guess else f"known: {', '.join(METHODS)}",
        )
    return METHODS[name]
