"""`TCurModel`: tCURLoRA adapters on any torch model, with the names that users of `peft` know.

model = get_tcur_model(model, TCurConfig(rank=8), directions=directions)
...train it: only the cores (and `modules_to_save`) require gradients...
model.save_pretrained("adapter/")
model = TCurModel.from_pretrained(base, "adapter/")
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur import __version__
from edge_tcur.method.adapted import DEFAULT, Injection, gradients_as_before
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.rehearsal import Rehearsal
from edge_tcur.method.targets import find_targets, group_specs
from edge_tcur.models.base import base_digest
from edge_tcur_runtime.atomic import disk_error, write_atomic
from edge_tcur_runtime.errors import BadInputError, BaseMismatchError, ConfigError
from edge_tcur_runtime.formats.adapter import (
    Adapter,
    AdapterHeader,
    read_adapter,
    read_bounded,
    write_adapter,
)
from edge_tcur_runtime.formats.schema import parse_json

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "tcur_config.json"
TASK = "custom"
_MAX_CONFIG_BYTES = 2**20


class _Forward:
    """A model's call under its own signature: `transformers.Trainer` reads there which inputs to pass on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        functools.update_wrapper(self, model.forward, assigned=())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._model(*arguments, **options)


def _free_key(modules: nn.ModuleDict, name: str) -> str:
    """A key for `name`: no dots, and neither taken nor one of the dictionary's own attributes."""
    key = name.replace(".", "-")
    while key in modules or hasattr(modules, key):
        key += "-"
    return key


def _check_alike(header: AdapterHeader, config: TCurConfig, folder: Path) -> None:
    """Refuses settings that are not those that the adapter was made with: it would compute otherwise."""
    pairs = {
        "coupling": (header.coupling, config.coupling),
        "transform": (header.transform, config.domain),
        "frame": (header.frame, config.frame),
        "alpha": (header.alpha, config.alpha),
    }
    for name, (theirs, own) in pairs.items():
        if theirs != own:
            raise BaseMismatchError(
                f"the adapter's {name} is {theirs}, that of {CONFIG_FILE} {own}", where=str(folder)
            )


class TCurModel(nn.Module):
    """A model under one or several named adapters. What it does not know it asks of the model.

    `transformers.Trainer` looks for the names of labels in the model's class: say
    ``TrainingArguments(label_names=["labels"])`` for a loss at evaluation.

    Args:
        model: changed in place: frozen, its targets replaced by adapted layers.
        config: of the first adapter.
        adapter_name: its name.
        directions: module name -> [n1, n2], for selections that look at them; see `collect_gradients`
            and `rehearsal`.

    Raises:
        ConfigError, BadInputError, UsageError: see `edge_tcur.method.adapted.inject`; the model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TCurConfig,
        adapter_name: str = DEFAULT,
        *,
        directions: Mapping[str, Tensor] | None = None,
    ) -> None:
        with gradients_as_before(model):
            self._wrap(model)
            self.add_adapter(adapter_name, config, directions=directions)

    def _wrap(self, model: nn.Module) -> None:
        """Takes `model` under no adapter yet."""
        nn.Module.__init__(self)
        self.base_digest = base_digest(model)
        self.model = model
        self.injection = Injection(model)
        self.cores = nn.ModuleDict()
        self._keys: dict[str, str] = {}  # adapter name -> key in `cores`
        self.forward = _Forward(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TCurModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.injection.apply_at_rest(fn)
        return self

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter in use; None is the base."""
        return self.injection.active

    @property
    def tcur_config(self) -> dict[str, TCurConfig]:
        """Adapter name -> its settings."""
        return {name: adapter.config for name, adapter in self.injection.adapters.items()}

    def add_adapter(
        self, name: str, config: TCurConfig, *, directions: Mapping[str, Tensor] | None = None
    ) -> None:
        """Adds a new adapter and activates it."""
        self.injection.add(name, config, directions=directions)
        self._register(name)

    def _register(self, name: str) -> None:
        adapter, groups = self.injection.adapters[name], nn.ModuleDict()
        for group, part in adapter.groups.items():
            groups[_free_key(groups, group)] = part
        self._keys[name] = _free_key(self.cores, name)
        self.cores[self._keys[name]] = groups
        self._require_gradients()

    def _require_gradients(self) -> None:
        """Only what belongs to the active adapter is trained."""
        for other, adapter in self.injection.adapters.items():
            for parameter in adapter.parameters():
                parameter.requires_grad_(other == self.active_adapter)

    def set_adapter(self, name: str) -> None:
        """Uses and trains the adapter of that name.

        Backward passes of losses under another one come before: its parameters take no gradients after.
        """
        self.injection.activate(name)
        self._require_gradients()

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; where it was active, the base is."""
        self.injection.delete(name)
        del self.cores[self._keys.pop(name)]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base inside the block."""
        with self.injection.disabled():
            yield

    def merge_adapter(self, *, dequantize: bool = False) -> None:
        """Adds the active adapter's update to the weights; see `Injection.merge`."""
        self.injection.merge(dequantize=dequantize)

    def unmerge_adapter(self) -> None:
        """Brings the base's weights back, bit by bit."""
        self.injection.unmerge()

    def merge_and_unload(self, *, dequantize: bool = False) -> nn.Module:
        """The plain model with the active adapter in its weights."""
        self.injection.merge(dequantize=dequantize)
        self.injection.remove()
        return self.model

    def unload(self) -> nn.Module:
        """The plain model, exactly the base, also where an adapter was merged."""
        if self.injection.is_merged:
            self.injection.unmerge()
        self.injection.remove()
        return self.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers that are trained, and numbers in all."""
        trained = sum(value.numel() for value in self.parameters() if value.requires_grad)
        return trained, sum(value.numel() for value in self.parameters())

    def describe_trainable_parameters(self) -> str:
        """One line: what is trained of how much."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}"

    def print_trainable_parameters(self) -> None:
        """Writes `describe_trainable_parameters` to stdout, as peft does."""
        sys.stdout.write(self.describe_trainable_parameters() + "\n")

    def get_base_model(self) -> nn.Module:
        """The model inside, its adapted layers with it; `unload` gives it without them."""
        return self.model

    def adapter(self, name: str | None = None) -> Adapter:
        """An adapter (the active one by default) as the file format has it."""
        chosen = name or self.active_adapter or ""
        found = self.injection.adapters.get(chosen)
        if found is None:
            raise BadInputError(f"there is no adapter {chosen!r} to save", where="adapter")
        config = found.config
        header = AdapterHeader(
            base_digest=self.base_digest,
            groups=group_specs(found.targets),
            task=TASK,
            labels=(),
            coupling=config.coupling,
            transform=config.domain,
            frame=config.frame,
            alpha=config.alpha,
            provenance={"tool": f"edge-tcur {__version__}", "selection": config.selection},
        )
        extras: dict[str, np.ndarray] = {
            key: value.detach().float().cpu().numpy() for key, value in found.saved.items()
        }
        return Adapter(header, found.factors(), extras)

    def save_pretrained(self, directory: str | Path, *, adapter_name: str | None = None) -> None:
        """Writes ``adapter.safetensors`` and ``tcur_config.json``, each old-or-new.

        Raises:
            DiskError: it cannot be written.
        """
        folder = Path(directory)
        adapter = self.adapter(adapter_name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        config = asdict(self.tcur_config[adapter_name or self.active_adapter or ""])
        write_adapter(folder / ADAPTER_FILE, adapter)
        write_atomic(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        directory: str | Path,
        adapter_name: str = DEFAULT,
        *,
        is_trainable: bool = False,
    ) -> TCurModel:
        """`model` under a saved adapter.

        Args:
            is_trainable: whether its cores require gradients.

        Raises:
            BaseMismatchError: the adapter was made for another base (both digests are named) or with
                other settings than those beside it.
            FileFormatError, IntegrityError, BadInputError: see `parse_adapter`.
        """
        self = cls.__new__(cls)
        with gradients_as_before(model):
            self._wrap(model)
            self.load_adapter(directory, adapter_name, is_trainable=is_trainable)
        return self

    def load_adapter(self, directory: str | Path, adapter_name: str, *, is_trainable: bool = False) -> None:
        """Loads a further adapter and activates it; see `from_pretrained`."""
        folder = Path(directory)
        adapter, config = read_adapter(folder / ADAPTER_FILE), read_config(folder / CONFIG_FILE)
        if adapter.header.base_digest != self.base_digest:
            raise BaseMismatchError(
                f"the adapter was made for the base {adapter.header.base_digest}; "
                f"this one is {self.base_digest}",
                where=str(folder / ADAPTER_FILE),
            )
        _check_alike(adapter.header, config, folder)
        before = self.active_adapter
        added = self.injection.add(adapter_name, config, factors=adapter.factors)
        own = {key: tuple(value.shape) for key, value in added.saved.items()}
        if (
            adapter.header.groups != group_specs(added.targets)
            or {key: value.shape for key, value in adapter.extras.items()} != own
        ):
            self.injection.delete(adapter_name)
            self.injection.activate(before)
            raise BaseMismatchError("the adapter's modules are not those of its settings", where=str(folder))
        with torch.no_grad():
            for key, value in added.saved.items():
                value.copy_(torch.from_numpy(adapter.extras[key].copy()))
        self._register(adapter_name)
        if not is_trainable:
            for parameter in added.parameters():
                parameter.requires_grad_(False)


def get_tcur_model(
    model: nn.Module,
    config: TCurConfig | None = None,
    adapter_name: str = DEFAULT,
    *,
    directions: Mapping[str, Tensor] | None = None,
) -> TCurModel:
    """`model` under a new adapter; see `TCurModel`."""
    return TCurModel(model, config or TCurConfig(), adapter_name, directions=directions)


def collect_gradients(
    model: nn.Module, config: TCurConfig, losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """The directions that `TCurModel` takes for the selection ``gradient``.

    Args:
        model: the base, before it is adapted. A head that is new should have been trained a little:
            one of zeros passes no gradient back.
        config: says which weights are adapted.
        losses: one call a batch, each giving its mean loss, e.g.
            ``(lambda batch=batch: model(**batch).loss for batch in loader)``.
    """
    return mean_gradients(model, find_targets(model, config), losses)


def rehearsal(model: nn.Module, config: TCurConfig, rank: int = 8) -> Rehearsal:
    """A low-rank update to train first; its `updates` are directions for the selection ``update``.

    Train `Rehearsal.parameters` (and a new head) in a loop of your own inside ``with practice.active():``, at
    the learning rate of a LoRA.

    Args:
        model: the base, before it is adapted; its parameters are no longer trained.
        config: says which weights are adapted.
        rank: of the update; at least that of the adapter.
    """
    practice = Rehearsal(model, find_targets(model, config), rank, seed=config.seed)
    model.requires_grad_(False)
    return practice


def read_config(path: Path) -> TCurConfig:
    """The settings that `save_pretrained` wrote.

    Raises:
        BadInputError, FileFormatError: missing, or not JSON.
        ConfigError: an unknown setting, or a value of the wrong type.
    """
    document = parse_json(read_bounded(path, _MAX_CONFIG_BYTES), str(path))
    known = {item.name for item in fields(TCurConfig)}
    if unknown := set(document) - known:
        raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}", where=str(path))
    try:
        return TCurConfig(**document)
    except TypeError as error:
        raise ConfigError(f"a setting has a value of the wrong type: {error}", where=str(path)) from error
