"""Which weights of a model are adapted, in which groups, and why the others are not."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from edge_tcur.method.config import ALL_LINEAR, TCurConfig
from edge_tcur_runtime.errors import BadInputError, ConfigError

_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """Linear modules whose weights [n1, n2] form one tensor.

    Attributes:
        name: short name, the prefix of its factors in the adapter file.
        modules: names of the modules in slice order.
        n1, n2: output and input features.
    """

    name: str
    modules: tuple[str, ...]
    n1: int
    n2: int


@dataclass(frozen=True)
class Targets:
    """Result of `find_targets`: the groups, and module name -> reason for every weight left alone."""

    groups: tuple[Group, ...]
    skipped: dict[str, str]


def find_targets(model: nn.Module, config: TCurConfig, *, keep: Collection[str] = ()) -> Targets:
    """The groups of `model` under `config`.

    ``all-linear`` takes every `nn.Linear` inside numbered layers (``layers.0.``...); in a model
    without numbered layers, every `nn.Linear`. Modules in `keep` (a head) are never adapted.

    Args:
        model: any module; nothing is changed.
        keep: module names, with everything below them, that stay as they are.

    Raises:
        BadInputError: nothing can be adapted, or a weight is not finite or has mixed dtype in its group.
        ConfigError: a pattern matches nothing, or the rank is larger than a weight.
    """
    skipped: dict[str, str] = {}
    chosen: dict[str, nn.Linear] = {}
    linears = _linear_modules(model, keep, skipped)
    numbered = any(_NUMBER.search(name) for name in linears)
    patterns = [pattern.strip() for pattern in config.targets.split(",") if pattern.strip()]
    for name, module in linears.items():
        if config.targets == ALL_LINEAR:
            if numbered and not _NUMBER.search(name):
                skipped[name] = "not inside a numbered layer"
                continue
        elif not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            skipped[name] = "matched by no target pattern"
            continue
        chosen[name] = module
    if config.targets != ALL_LINEAR:
        _refuse_idle_patterns(patterns, chosen, linears)
    if not chosen:
        raise BadInputError(
            "the base has no weight that can be adapted",
            where=type(model).__name__,
            hint="tCURLoRA adapts nn.Linear weights; " + (_reasons(skipped) or "the model has none"),
        )
    groups = _group(chosen, config)
    _check(groups, chosen, config.rank)
    return Targets(groups, skipped)


def _linear_modules(model: nn.Module, keep: Collection[str], skipped: dict[str, str]) -> dict[str, nn.Linear]:
    result: dict[str, nn.Linear] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            if next(module.parameters(recurse=False), None) is not None:
                skipped[name] = f"{type(module).__name__}, not nn.Linear"
        elif any(name == kept or name.startswith(f"{kept}.") for kept in keep):
            skipped[name] = "part of the head"
        elif id(module.weight) in owners:
            skipped[name] = f"its weight is tied to {owners[id(module.weight)]}"
        else:
            owners[id(module.weight)] = name
            result[name] = module
    return result


def _refuse_idle_patterns(
    patterns: list[str], chosen: dict[str, nn.Linear], linears: dict[str, nn.Linear]
) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in chosen):
            raise ConfigError(
                f"the target pattern {pattern!r} matches no linear module",
                where="targets",
                hint=f"linear modules are, for example: {', '.join(list(linears)[:4]) or 'none'}",
            )


def _reasons(skipped: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])


def _group(chosen: dict[str, nn.Linear], config: TCurConfig) -> tuple[Group, ...]:
    members: dict[tuple[str, int, int], list[str]] = {}
    for name, module in chosen.items():
        n1, n2 = module.weight.shape
        key = f"{n1}x{n2}" if config.grouping == "shape" else _NUMBER.sub(r"\1*", name)
        members.setdefault((key, n1, n2), []).append(name)
    names = _short_names([key for key, _, _ in members])
    return tuple(
        Group(name, tuple(modules), n1, n2)
        for name, ((_, n1, n2), modules) in zip(names, members.items(), strict=True)
    )


def _short_names(keys: list[str]) -> list[str]:
    """Each key without what precedes its last ``*``, where that leaves the names distinct."""
    keys = [key.removesuffix("*").removesuffix(".") or "linear" for key in keys]
    short = [key.rpartition("*.")[2] for key in keys]
    if len(set(short)) < len(keys):
        short = [key.replace("*.", "") for key in keys]
    if len(set(short)) < len(keys):
        short = [f"{name}-{position}" for position, name in enumerate(short)]
    return short


def _check(groups: tuple[Group, ...], modules: dict[str, nn.Linear], rank: int) -> None:
    for group in groups:
        if rank > min(group.n1, group.n2):
            raise ConfigError(
                f"the rank {rank} is larger than the weight {group.modules[0]} [{group.n1}, {group.n2}]",
                where="rank",
                hint=f"use at most {min(group.n1, group.n2)}, or leave that weight out with --targets",
            )
        dtypes = {modules[name].weight.dtype for name in group.modules}
        if len(dtypes) > 1:
            raise BadInputError(f"its weights have different dtypes: {dtypes}", where=group.name)
        for name in group.modules:
            if not torch.isfinite(modules[name].weight).all():
                raise BadInputError("the weight holds NaN or infinity", where=name)
