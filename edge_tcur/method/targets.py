"""Which weights of a model are adapted, in which groups, and why the others are not."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from edge_tcur.method.config import GROUPINGS, TCurConfig, split_names
from edge_tcur.method.quantized import Int8Linear
from edge_tcur.method.views import View, find_view, foreign_kind, is_finite, weight_of
from edge_tcur_runtime.errors import BadInputError, ConfigError
from edge_tcur_runtime.formats.factors import GroupSpec

_NUMBER = re.compile(r"(^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """Modules whose weights, seen as matrices [n1, n2], form one tensor.

    Attributes:
        name: short name, the prefix of its factors in the adapter file.
        modules: names of the modules in slice order; the slices of a block are neighbours.
        n1, n2: output and input features.
        rank: r.
        blocks: b, the number of blocks of slices that share rows and columns.
    """

    name: str
    modules: tuple[str, ...]
    n1: int
    n2: int
    rank: int = 1
    blocks: int = 1

    @property
    def size(self) -> int:
        """p, the number of slices in a block."""
        return len(self.modules) // self.blocks


@dataclass(frozen=True)
class Targets:
    """Result of `find_targets`: the groups, and module name -> reason for every weight left alone."""

    groups: tuple[Group, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Candidate:
    """A module that can be adapted."""

    module: nn.Module
    view: View
    tied_to: str | None

    @property
    def shape(self) -> tuple[int, int]:
        n1, n2 = self.view.matrix(self.module).shape
        return n1, n2


def find_targets(model: nn.Module, config: TCurConfig, *, keep: Collection[str] = ()) -> Targets:
    """The groups of `model` under `config`.

    ``all-linear`` takes every linear layer (`nn.Linear`, GPT-2's `Conv1D`) inside numbered layers
    (``layers.0.``...); in a model without numbered linear layers, every linear layer. Convolutions are
    taken where a pattern names them. Modules in `keep` (a head) are never adapted.

    Args:
        model: any module; nothing is changed.
        keep: module names, with everything below them, that stay as they are.

    Raises:
        BadInputError: nothing can be adapted, or a weight is not finite, is no plain tensor (that of a
            quantising library) or has mixed dtype in its group.
        ConfigError: a pattern matches nothing, weights of different shapes in one group, a tied weight
            named twice, a layer number that the model lacks, a rank larger than a weight, or a rank
            pattern that matches nothing.
    """
    skipped: dict[str, str] = {}
    found = _candidates(model, keep, skipped)
    saved = [name for name in found if _is_saved(name, config.modules_to_save)]
    for name in saved:
        skipped[name] = "trained in full (modules_to_save)"
        del found[name]
    chosen = _choose(found, config, skipped)
    if not chosen:
        raise BadInputError(
            "the base has no weight that can be adapted",
            where=type(model).__name__,
            hint="tCURLoRA adapts linear layers and convolutions; " + (_reasons(skipped) or "there are none"),
        )
    _refuse_idle_ranks(config, chosen)
    groups = _group(chosen, config)
    for group in groups:
        _check(group, chosen)
    return Targets(groups, skipped)


def group_specs(targets: Targets) -> dict[str, GroupSpec]:
    """The groups as an adapter's header names them."""
    return {
        group.name: GroupSpec(tuple(f"{name}.weight" for name in group.modules), group.n1, group.n2)
        for group in targets.groups
    }


def saved_parameters(model: nn.Module, patterns: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of the modules that `patterns` (`TCurConfig.modules_to_save`) name, by name.

    Raises:
        ConfigError: a pattern matches no module with parameters, or one of two that are tied.
    """
    result: dict[str, nn.Parameter] = {}
    owners: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(value), []).append(name)
    for pattern in patterns:
        modules = [name for name, _ in model.named_modules() if name and _matches(name, (pattern,))]
        found = {
            name: value
            for name, value in model.named_parameters(remove_duplicate=False)
            if any(name.startswith(f"{module}.") for module in modules)
        }
        for name, value in found.items():
            if len(owners[id(value)]) > 1:
                other = next(owner for owner in owners[id(value)] if owner != name)
                raise ConfigError(
                    f"{name} is tied to {other}: training it would change both modules, or untie them",
                    where="modules_to_save",
                    hint="leave it frozen, or untie the two in the model first",
                )
        if not found:
            raise ConfigError(
                f"the pattern {pattern!r} matches no module with weights", where="modules_to_save"
            )
        result |= found
    return result


def _is_saved(module: str, patterns: Collection[str]) -> bool:
    """Whether a module, or one that it is part of, is named by `patterns`."""
    parts = module.split(".")
    return any(_matches(".".join(parts[:end]), patterns) for end in range(1, len(parts) + 1))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return _first_match(name, patterns) is not None


def _first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern that names `name`: the whole of it, else the first that means it (see `TCurConfig`)."""
    patterns = tuple(patterns)
    if name in patterns:
        return name
    for pattern in patterns:
        plain = not set(pattern) & set("*?[")
        if name.endswith(f".{pattern}") if plain else fnmatch.fnmatchcase(name, pattern):
            return pattern
    return None


def _candidates(model: nn.Module, keep: Collection[str], skipped: dict[str, str]) -> dict[str, _Candidate]:
    result: dict[str, _Candidate] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if not own and not isinstance(module, Int8Linear):
            continue
        view = find_view(module)
        if any(name == kept or name.startswith(f"{kept}.") for kept in keep):
            skipped[name] = "part of the head"
        elif isinstance(view, str):
            skipped[name] = view
        else:
            result[name] = _Candidate(module, view, owners.get(id(weight_of(module))))
        for value in own.values():
            owners.setdefault(id(value), name)
    return result


def _choose(
    found: Mapping[str, _Candidate], config: TCurConfig, skipped: dict[str, str]
) -> dict[str, _Candidate]:
    patterns = config.target_names
    everything = not patterns
    numbered = any(_NUMBER.search(name) for name, item in found.items() if item.view.is_linear)
    layers = {number for name in found if (number := layer_number(name)) is not None}
    if missing := set(config.layers) - layers:
        raise ConfigError(
            f"the base has no layer {min(missing)}; its layers are {_range(layers)}",
            where="layers_to_transform",
        )
    chosen: dict[str, _Candidate] = {}
    for name, item in found.items():
        reason = _refusal(name, item, everything, numbered, patterns, config)
        if reason is None:
            chosen[name] = item
        elif reason.startswith("!"):
            raise ConfigError(
                f"the weight of {name} is tied to {item.tied_to}", where="targets", hint=reason[1:]
            )
        else:
            skipped[name] = reason
    if not everything:
        _refuse_idle_patterns(patterns, found)
    return chosen


def _range(numbers: Collection[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if numbers else "not numbered"


def _refusal(
    name: str,
    item: _Candidate,
    everything: bool,
    numbered: bool,
    patterns: tuple[str, ...],
    config: TCurConfig,
) -> str | None:
    """Why this weight is left alone, or None; what must not be asked for begins with an exclamation mark."""
    number = layer_number(name)
    if everything and not item.view.is_linear:
        return f"{type(item.module).__name__}: adapted where --targets names it"
    if everything and numbered and number is None:
        return "not inside a numbered layer"
    if not everything and not _matches(name, patterns):
        return "matched by no target pattern"
    if config.layers and number not in config.layers:
        return "not among the layers to transform"
    if item.tied_to is not None:
        return (
            f"its weight is tied to {item.tied_to}"
            if everything
            else "!an update of one would not reach the other: leave it out of the patterns"
        )
    return None


def _refuse_idle_patterns(patterns: tuple[str, ...], found: Mapping[str, _Candidate]) -> None:
    for pattern in patterns:
        if not any(_matches(name, (pattern,)) for name in found):
            raise ConfigError(
                f"the target pattern {pattern!r} matches no module that can be adapted",
                where="targets",
                hint=f"such modules are, for example: {', '.join(list(found)[:4]) or 'none'}",
            )


def _refuse_idle_ranks(config: TCurConfig, chosen: Collection[str]) -> None:
    for pattern in config.rank_pattern:
        if not any(_matches(name, (pattern,)) for name in chosen):
            raise ConfigError(
                f"the pattern {pattern!r} matches no adapted module",
                where="rank_pattern",
                hint=f"such modules are, for example: {', '.join(list(chosen)[:4])}",
            )


def _reasons(skipped: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])


def layer_number(name: str) -> int | None:
    """The first number among the parts of a module's name, or None."""
    found = _NUMBER.search(name)
    return None if found is None else int(found[2])


def _layer(name: str) -> str:
    """The part of a module's name that names its layer: two towers (``text.layers.0``) number apart."""
    found = _NUMBER.search(name)
    return "none" if found is None else name[: found.end()]


def _key(name: str, shape: tuple[int, int], grouping: str) -> str:
    if grouping == "shape":
        return f"{shape[0]}x{shape[1]}"
    if grouping == "layer":
        # A star before the number: `_short_names` leaves out what precedes it where one tower has layers.
        return _NUMBER.sub(r"\1*.\2", _layer(name)) + f".{shape[0]}x{shape[1]}"
    if grouping == "weight":
        return name
    if grouping == "projection":
        return _NUMBER.sub(r"\1*", name)
    if (pattern := _first_match(name, split_names(grouping))) is not None:
        return pattern
    raise ConfigError(
        f"no grouping pattern matches the adapted module {name}",
        where="grouping",
        hint=f"add a pattern for it, leave it out of the targets, or use one of {', '.join(GROUPINGS)}",
    )


def _group(chosen: Mapping[str, _Candidate], config: TCurConfig) -> tuple[Group, ...]:
    shapes = {name: item.shape for name, item in chosen.items()}
    members: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        members.setdefault(_key(name, shape, config.grouping), []).append(name)
    for key, modules in list(members.items()):
        if config.grouping == "projection" and len({shapes[name] for name in modules}) > 1:
            del members[key]  # a projection whose shape changes from layer to layer: one tensor a shape
            for name in modules:
                members.setdefault(f"{key}.{shapes[name][0]}x{shapes[name][1]}", []).append(name)
    names = _short_names(list(members))
    groups = []
    for name, modules in zip(names, members.values(), strict=True):
        first = shapes[modules[0]]
        for module in modules:
            if shapes[module] != first:
                raise ConfigError(
                    f"{module} is {list(shapes[module])}, {modules[0]} {list(first)}: "
                    "weights of different shapes cannot share a tensor",
                    where="grouping",
                )
        groups.append(
            Group(name, tuple(modules), *first, _rank(modules, config), _blocks(name, modules, config))
        )
    return tuple(groups)


def _rank(modules: list[str], config: TCurConfig) -> int:
    found = [_first_match(name, config.rank_pattern) for name in modules]
    ranks = {config.rank if pattern is None else config.rank_pattern[pattern] for pattern in found}
    if len(ranks) > 1:
        raise ConfigError(
            f"the weights of one group get the ranks {sorted(ranks)}: {', '.join(modules[:3])}...",
            where="rank_pattern",
            hint="name all of the group, or group otherwise",
        )
    return ranks.pop()


def _blocks(group: str, modules: list[str], config: TCurConfig) -> int:
    if config.coupling == "all":
        return 1
    if config.coupling == "none":
        return len(modules)
    layers = [_layer(name) for name in modules]
    counts = {layers.count(layer) for layer in layers}
    neighbours = sum(a != b for a, b in pairwise(layers)) + 1 == len(set(layers))
    if len(counts) > 1 or not neighbours:
        raise ConfigError(
            f"the group {group} has not the same number of weights in every layer",
            where="coupling",
            hint="say coupling none or all, or group otherwise",
        )
    return len(set(layers))


def _short_names(keys: list[str]) -> list[str]:
    """Each key without what precedes its last ``*``, where that leaves the names distinct."""
    keys = [key.removesuffix("*").removesuffix(".") or "linear" for key in keys]
    short = [key.rpartition("*.")[2] for key in keys]
    if len(set(short)) < len(keys):
        short = [key.replace("*.", "") for key in keys]
    if len(set(short)) < len(keys) or any(set(name) & set("*?/\\") for name in short):
        short = [f"{re.sub(r'[^0-9A-Za-z_.-]', '', name)}-{place}" for place, name in enumerate(short)]
    return short


def _check(group: Group, chosen: Mapping[str, _Candidate]) -> None:
    if group.rank > min(group.n1, group.n2):
        raise ConfigError(
            f"the rank {group.rank} is larger than the weight {group.modules[0]} [{group.n1}, {group.n2}]",
            where="rank",
            hint=f"use at most {min(group.n1, group.n2)}, or leave that weight out with --targets",
        )
    modules = [chosen[name].module for name in group.modules]
    for name, module in zip(group.modules, modules, strict=True):
        if (kind := foreign_kind(weight_of(module))) is not None:
            raise BadInputError(
                f"the weight is a {kind}, not a plain tensor",
                where=name,
                hint="adapt the model before it is quantised, or quantise it with "
                "edge_tcur.method.quantized.quantize_linears",
            )
    dtypes: dict[str, str] = {}
    for name, module in zip(group.modules, modules, strict=True):
        dtypes.setdefault(str(weight_of(module).dtype).removeprefix("torch."), name)
    if len(dtypes) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise BadInputError(
            f"its weights have different dtypes: {found}",
            where=group.name,
            hint="bring them to one dtype, or say grouping weight",
        )
    for name, module in zip(group.modules, modules, strict=True):
        if not is_finite(module):
            raise BadInputError("the weight holds NaN or infinity", where=name)
