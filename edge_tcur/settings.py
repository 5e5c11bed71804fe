"""Every setting of `edge-tcur train`, declared once: type, default, help and check.

The command's options, the keys of a TOML file and the resolved configuration saved with a run are
all made from `TrainConfig`. Imports no torch, so that the command's help is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomllib

from edge_tcur.method.config import AUTO, GROUPINGS, TCurConfig, split_names
from edge_tcur.method.selection import GRADIENT, SELECTIONS, UPDATE
from edge_tcur.tasks import TASKS, find_task
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.factors import COUPLINGS, FRAMES
from edge_tcur_runtime.formats.schema import nearest
from edge_tcur_runtime.transform import TRANSFORMS


def setting(default: Any, description: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its help text and choices."""
    return field(default=default, metadata={"help": description, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; `description` of each field is its help text."""

    base: str = setting("", "Hugging Face directory or hub id, or package.module:function.")
    data: str = setting("", "Labelled training data: .csv, .jsonl, .npz or a folder per class.")
    task: str = setting("text-classification", "What the model answers.", choices=tuple(TASKS))
    text_column: str = setting("text", "Column or key that holds the text.")
    label_column: str = setting("label", "Column or key that holds the label.")
    eval_data: str = setting("", "Held-out data; by default a part of the training data.")
    eval_fraction: float = setting(0.2, "Part of the training data held out when there is no eval data.")
    rank: int = setting(8, "Rows and columns per group; the core holds layers x rank x rank numbers.")
    grouping: str = setting(
        "projection",
        f"Which weights share a tensor: {', '.join(GROUPINGS)}, or comma-separated name patterns.",
    )
    coupling: str = setting("none", "How far the t-product reaches.", choices=COUPLINGS)
    transform: str = setting(
        AUTO, "Along the coupled weights; auto: dft, identity without coupling.", choices=(AUTO, *TRANSFORMS)
    )
    selection: str = setting(
        GRADIENT,
        "Rule that picks rows and columns; update rehearses first, which takes as long again.",
        choices=tuple(SELECTIONS),
    )
    frame: str = setting("orthonormal", "Coordinates of training; sketch stores its vectors.", choices=FRAMES)
    targets: str = setting("all-linear", "all-linear, or comma-separated names or patterns of modules.")
    alpha: float = setting(1.0, "Scale of the update, and so of the effective learning rate.")
    rank_pattern: str = setting("", "Other ranks by module: comma-separated pattern=rank.")
    rank_budget: int = setting(
        0, "Trained numbers in all, shared out among single weights by energy; 0: --rank for each."
    )
    layers_to_transform: str = setting("", "Numbers of the layers to adapt, comma-separated; all by default.")
    modules_to_save: str = setting("", "Names or patterns of modules trained in full and saved with it.")
    epochs: int = setting(20, "Passes over the training data.")
    batch_size: int = setting(16, "Samples per step.")
    learning_rate: float = setting(0.02, "Peak learning rate of the cores.")
    head_learning_rate: float = setting(0.005, "Peak learning rate of a trained head.")
    head_epochs: int = setting(20, "Passes in which a new head is trained alone first; they cost one pass.")
    gradient_batches: int = setting(24, "Batches whose gradients choose rows and columns.")
    rehearsal_rate: float = setting(
        0.0, "Peak learning rate of what selection update learns first; 0 goes by the width of the base."
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.")
    max_length: int = setting(0, "Longest text in tokens; 0 takes the base's limit, at most 128.")
    seed: int = setting(0, "Seed of the split and of the order of the data.")
    threads: int = setting(0, "CPU threads; 0 takes all cores.")

    def __post_init__(self) -> None:
        find_task(self.task)
        self.method()
        for name, low in (
            ("epochs", 1),
            ("batch_size", 1),
            ("head_epochs", 0),
            ("gradient_batches", 1),
            ("rank_budget", 0),
            ("max_length", 0),
            ("seed", 0),
            ("threads", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{getattr(self, name)}; expected at least {low}", where=name)
        self._check_budget()
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < 100:
                raise ConfigError(f"{getattr(self, name)}; expected above 0 and below 100", where=name)
        if not 0 <= self.rehearsal_rate < 100:
            raise ConfigError(f"{self.rehearsal_rate}; expected from 0 to below 100", where="rehearsal_rate")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"{self.weight_decay}; expected at least 0", where="weight_decay")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"{self.eval_fraction}; expected between 0 and 1", where="eval_fraction")

    def _check_budget(self) -> None:
        if self.rank_budget and not (self.coupling == "none" and self.method().needs_directions):
            raise ConfigError(
                "ranks are shared out by the gradients or updates of single weights",
                where="rank_budget",
                hint=f"say coupling none and selection {GRADIENT} or {UPDATE} with it",
            )

    def with_ranks(self, ranks: Mapping[str, int]) -> TrainConfig:
        """These settings with a rank for each weight (module name -> rank), each a group of its own."""
        pattern = ",".join(f"{name}={rank}" for name, rank in ranks.items())
        return replace(self, grouping="weight", rank_pattern=pattern)

    def with_rank(self, rank: int) -> TrainConfig:
        """These settings with no rank above this one."""
        pattern = ",".join(f"{n}={min(own, rank)}" for n, own in _parse_ranks(self.rank_pattern).items())
        return replace(self, rank=min(self.rank, rank), rank_pattern=pattern)

    def method(self) -> TCurConfig:
        """The adapter's part of the settings."""
        return TCurConfig(
            rank=self.rank,
            grouping=self.grouping,
            coupling=self.coupling,
            transform=self.transform,
            selection=self.selection,
            frame=self.frame,
            targets=self.targets,
            alpha=self.alpha,
            rank_pattern=_parse_ranks(self.rank_pattern),
            layers_to_transform=_parse_layers(self.layers_to_transform),
            modules_to_save=split_names(self.modules_to_save),
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """The resolved settings, as saved with the run."""
        return asdict(self)


def _parse_ranks(text: str) -> dict[str, int]:
    """``query=4,*dense=16`` as a mapping."""
    result = {}
    for part in split_names(text):
        pattern, _, rank = part.rpartition("=")
        if not pattern or not rank.isdecimal():
            raise ConfigError(f"{part!r}; expected pattern=rank", where="rank_pattern")
        result[pattern] = int(rank)
    return result


def _parse_layers(text: str) -> tuple[int, ...]:
    parts = split_names(text)
    for part in parts:
        if not part.isdecimal():
            raise ConfigError(f"{part!r}; expected numbers of layers", where="layers_to_transform")
    return tuple(map(int, parts))


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a TOML file that `TrainConfig` knows.

    Raises:
        ConfigError: unreadable, not TOML, an unknown key (the nearest known one is named) or a
            value of the wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read: {error}", where=str(path)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path)) from error
    return {key: _checked(key, value, str(path)) for key, value in document.items()}


def config_from_dict(document: dict[str, Any], where: str) -> TrainConfig:
    """A configuration from saved or TOML values; unknown keys are errors."""
    return TrainConfig(**{key: _checked(key, value, where) for key, value in document.items()})


def _checked(key: str, value: Any, where: str) -> Any:
    known = {item.name: item for item in fields(TrainConfig)}
    if key not in known:
        guess = nearest(key, known)
        raise ConfigError(
            f"unknown configuration key {key!r}",
            where=where,
            hint=f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}",
        )
    expected = type(known[key].default)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ConfigError(
            f"{key} is {type(value).__name__} {value!r}; expected {expected.__name__}", where=where
        )
    return value
