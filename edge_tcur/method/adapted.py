"""The injection of adapted layers (`edge_tcur.method.layer`) into a model, several adapters at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.group import CoreGroup, choose_factors, member_of
from edge_tcur.method.layer import AdaptedLayer, Slot
from edge_tcur.method.quantized import Int8Linear
from edge_tcur.method.targets import Targets, find_targets, group_specs, saved_parameters
from edge_tcur_runtime.errors import BadInputError, BaseMismatchError, ConfigError, UsageError
from edge_tcur_runtime.formats.factors import SKETCH, AnyFactors, Factors, SketchFactors, check_factors

DEFAULT = "default"


@dataclass
class InjectedAdapter:
    """One adapter of an `Injection`.

    Attributes:
        config: its settings.
        targets: what it adapts and what it leaves alone.
        groups: group name -> `CoreGroup`.
        saved: parameter name -> its own copy of a parameter of `modules_to_save`.
    """

    config: TCurConfig
    targets: Targets
    groups: dict[str, CoreGroup]
    saved: dict[str, nn.Parameter] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """The trained cores, and what `modules_to_save` names."""
        return [group.core for group in self.groups.values()] + list(self.saved.values())

    def factors(self) -> dict[str, AnyFactors]:
        """Every group's factors as the adapter file holds them."""
        return {name: group.factors() for name, group in self.groups.items()}


class Injection:
    """A model whose targets were replaced by adapted layers, under one or several named adapters.

    Attributes:
        model: the model.
        adapters: name -> adapter.
        active: name of the adapter in use, or None for the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, InjectedAdapter] = {}
        self.active: str | None = None
        self._layers: dict[str, AdaptedLayer] = {}
        self._names: dict[str, tuple[str, ...]] = {}  # of an adapted module, and whatever else it is called
        self._merged: dict[str, nn.Parameter] = {}
        self._originals: dict[str, nn.Parameter] = {}
        if any(isinstance(module, AdaptedLayer) for module in model.modules()):
            raise UsageError(
                "the model has adapted layers already",
                hint="add the adapter to what adapted it, or remove (unload) that first",
            )
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def add(
        self,
        name: str,
        config: TCurConfig,
        *,
        keep: tuple[str, ...] = (),
        factors: Mapping[str, AnyFactors] | None = None,
        directions: Mapping[str, Tensor] | None = None,
    ) -> InjectedAdapter:
        """Adds an adapter and activates it; see `inject`."""
        if not name:
            raise UsageError("an adapter needs a name")
        if name in self.adapters:
            raise UsageError(
                f"there is an adapter {name!r} already", hint="delete it first, or choose a name"
            )
        self._refuse_while_merged()
        with self.disabled():
            adapter = self._build(config, keep, factors, directions)
        self.adapters[name] = adapter
        self.activate(name)
        return adapter

    def _build(
        self,
        config: TCurConfig,
        keep: tuple[str, ...],
        factors: Mapping[str, AnyFactors] | None,
        directions: Mapping[str, Tensor] | None,
    ) -> InjectedAdapter:
        with self._plain():
            targets = find_targets(self.model, config, keep=keep)
            saved = {
                key: nn.Parameter(value.detach().clone())
                for key, value in saved_parameters(self.model, config.modules_to_save).items()
            }
            if factors is not None:
                check_fit(factors, targets, config)
            elif config.needs_directions:
                _check_directions(directions, targets)
            groups = {}
            for spec in targets.groups:
                members = [member_of(self.model, module) for module in spec.modules]
                own = (
                    choose_factors(spec, members, config, directions)
                    if factors is None
                    else factors[spec.name]
                )
                groups[spec.name] = CoreGroup(spec, members, own, config)
            self._adapt(targets)
        return InjectedAdapter(config, targets, groups, saved)

    def _adapt(self, targets: Targets) -> None:
        """Makes adapted layers of the targets that have none yet; `_plain` puts them in."""
        names: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        for group in targets.groups:
            for name in group.modules:
                if name not in self._layers:
                    member = member_of(self.model, name)
                    self._layers[name] = AdaptedLayer(member.module, member.view)
                    self._names[name] = tuple(names[id(member.module)])

    def _put(self, name: str, module: nn.Module) -> None:
        """Puts `module` in the place of the target of that name, wherever the model holds it."""
        for place in self._names[name]:
            _replace(self.model, place, module)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The model with its own layers, for looking at it; the adapted ones return, new ones included."""
        for name, layer in self._layers.items():
            self._put(name, layer.base)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                self._put(name, layer)

    def activate(self, name: str | None) -> None:
        """Uses the adapter of that name; None switches every update off: the model is exactly the base.

        Raises:
            UsageError: no such adapter, or one is merged.
        """
        if name is not None:
            self._known(name)
        self._refuse_while_merged()
        for layer in self._layers.values():
            layer.use(None)
        for parameter, value in self._originals.items():
            _set_parameter(self.model, parameter, value)
        self._originals = {}
        self.active = name
        if name is None:
            return
        adapter = self.adapters[name]
        for group in adapter.groups.values():
            for position, module in enumerate(group.spec.modules):
                self._layers[module].use(Slot(group, position))
        for parameter, value in adapter.saved.items():
            self._originals[parameter] = _set_parameter(self.model, parameter, value)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base inside the block; then the adapter that was active again, where it is still there."""
        name = self.active
        self.activate(None)
        try:
            yield
        finally:
            self.activate(name if name in self.adapters else None)

    def delete(self, name: str) -> None:
        """Forgets an adapter; where it was active, the base is."""
        self._known(name)
        if self.active == name:
            self.activate(None)
        del self.adapters[name]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the parameters of the active adapter."""
        return self.adapters[self._current()].parameters()

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The active adapter's cores, and its copies of what `modules_to_save` names."""
        adapter = self.adapters[self._current()]
        return [group.core for group in adapter.groups.values()], list(adapter.saved.values())

    def factors(self) -> dict[str, AnyFactors]:
        """The active adapter's factors as the adapter file holds them."""
        return self.adapters[self._current()].factors()

    @property
    def groups(self) -> dict[str, CoreGroup]:
        """The active adapter's groups."""
        return self.adapters[self._current()].groups

    @property
    def targets(self) -> Targets:
        """What the active adapter adapts and leaves alone."""
        return self.adapters[self._current()].targets

    def layers(self) -> Mapping[str, AdaptedLayer]:
        """The adapted layers by module name."""
        return self._layers

    def merge(self, *, dequantize: bool = False) -> None:
        """Adds the active adapter's update to the weights; `unmerge` brings back every bit.

        Args:
            dequantize: allow int8 layers to become float ones, which alone can hold the sum.

        Raises:
            UsageError: no adapter is active, or one is merged already.
            ConfigError: an int8 base, and `dequantize` was not said.
            BadInputError: a sum is not finite in the dtype of its weight; nothing is changed.
        """
        name = self._current()
        self._refuse_while_merged()
        with torch.no_grad():
            sums = {module: self._sum(module, dequantize) for module in _modules(self.adapters[name])}
        for module, (linear, value) in sums.items():
            layer = self._layers[module]
            layer.use(None)
            if linear is not None:
                self._put(module, linear)
                continue
            # A parameter of its own: another module may be tied to the base's weight.
            weight = nn.Parameter(value, requires_grad=False)
            self._merged[module] = _set_parameter(layer.base, "weight", weight)
        self._merged.setdefault("", nn.Parameter(torch.empty(0)))

    def _sum(self, module: str, dequantize: bool) -> tuple[nn.Module | None, Tensor]:
        layer = self._layers[module]
        (slot,) = layer._slot
        part = slot.group.slice(slot.position)
        matrix = layer.view.matrix(layer.base)
        total = (matrix + part.dense()).to(matrix.dtype)  # added in the wider of the two dtypes
        if not torch.isfinite(total).all():
            raise BadInputError(
                f"the sum of weight and update is no finite number in {matrix.dtype}", where=module
            )
        if not isinstance(layer.base, Int8Linear):
            return None, layer.view.restore(layer.base, total)
        if not dequantize:
            raise ConfigError(
                "the sum of an int8 weight and an update is no int8 weight",
                where=module,
                hint="say dequantize to make these layers float, or keep the adapter apart",
            )
        linear = nn.Linear(layer.base.in_features, layer.base.out_features, layer.base.bias is not None)
        linear.weight.data = total
        if layer.base.bias is not None:
            linear.bias.data = layer.base.bias.clone()
        return linear.requires_grad_(False), total

    @property
    def is_merged(self) -> bool:
        """Whether the active adapter's update is in the weights."""
        return bool(self._merged)

    def unmerge(self) -> None:
        """Puts the base's own weights back, bit by bit, and uses the adapter again.

        Raises:
            UsageError: nothing is merged.
        """
        if not self._merged:
            raise UsageError("no adapter is merged")
        for module in _modules(self.adapters[self._current()]):
            layer = self._layers[module]
            self._put(module, layer)
            if module in self._merged:
                _set_parameter(layer.base, "weight", self._merged[module])
        self._merged = {}
        self.activate(self.active)

    def remove(self) -> None:
        """Puts the base's own layers back (merged ones stay merged); the adapters are forgotten."""
        if not self._merged:
            self.activate(None)
        for name, layer in self._layers.items():
            if self.model.get_submodule(name) is layer:
                self._put(name, layer.base)
        self.adapters, self.active, self._layers, self._merged, self._originals = {}, None, {}, {}, {}

    def apply_at_rest(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` of the model does (a move, a cast), to what is not in it now.

        That is what other adapters trained in full, what the active one stands in for, and what is merged.
        """
        resting = [*self._originals.values(), *self._merged.values()]
        for name, adapter in self.adapters.items():
            resting += [] if name == self.active else adapter.saved.values()
        for value in resting:
            value.data = fn(value.data)
        for name, layer in self._layers.items():
            if self.model.get_submodule(name) is not layer:
                layer._apply(fn)  # type: ignore[no-untyped-call]

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UsageError(f"there is no adapter {name!r}; loaded: {known}")

    def _current(self) -> str:
        if self.active is None:
            raise UsageError("no adapter is active", hint="activate one first")
        return self.active

    def _refuse_while_merged(self) -> None:
        if self._merged:
            raise UsageError(f"the adapter {self.active!r} is merged", hint="unmerge it first")


def _modules(adapter: InjectedAdapter) -> list[str]:
    return [module for group in adapter.groups.values() for module in group.spec.modules]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner.add_module(leaf, module)


def _set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> nn.Parameter:
    """Puts a parameter in the place of the one of that name, which it returns."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, AdaptedLayer):  # another adapter's target
        owner = owner.base
    old = owner.get_parameter(leaf)
    owner.register_parameter(leaf, value)
    return old


def _check_directions(directions: Mapping[str, Tensor] | None, targets: Targets) -> None:
    missing = [
        module
        for group in targets.groups
        for module in group.modules
        if directions is None or module not in directions
    ]
    if missing:
        raise ConfigError(
            f"no direction was given for {missing[0]}"
            + (f" and {len(missing) - 1} more" * (len(missing) > 1)),
            where="selection",
            hint="take edge_tcur.method.gradients.mean_gradients, or Rehearsal.updates, or another selection",
        )
    assert directions is not None
    for group in targets.groups:
        for module in group.modules:
            found = tuple(directions[module].shape)
            if found != (group.n1, group.n2):
                raise ConfigError(
                    f"the direction has the shape {list(found)}; expected [{group.n1}, {group.n2}]",
                    where=module,
                )
            if not torch.isfinite(directions[module]).all():
                raise BadInputError("the direction holds NaN or infinity", where=module)


@contextmanager
def gradients_as_before(model: nn.Module) -> Iterator[None]:
    """Where the block fails, the model's parameters require gradients as before it."""
    states = {key: value.requires_grad for key, value in model.named_parameters()}
    try:
        yield
    except Exception:
        for key, value in model.named_parameters():
            value.requires_grad_(states[key])
        raise


def inject(
    model: nn.Module,
    config: TCurConfig,
    *,
    keep: tuple[str, ...] = (),
    factors: Mapping[str, AnyFactors] | None = None,
    directions: Mapping[str, Tensor] | None = None,
    name: str = DEFAULT,
) -> Injection:
    """Freezes `model` and replaces its targets by adapted layers.

    Args:
        model: the base; changed in place, its parameters no longer require gradients.
        config: see `TCurConfig`.
        keep: modules that are not adapted (a head).
        factors: start from these (an adapter's) instead of from new ones.
        directions: module name -> [n1, n2], for selections that need them: mean gradients of the task's
            loss (`edge_tcur.method.gradients`), or a learnt update (`edge_tcur.method.rehearsal`).
        name: of the adapter.

    Raises:
        BadInputError, ConfigError: see `find_targets`; a direction that is missing, of another shape or not
            finite.
        UsageError: the model is adapted already.
        BaseMismatchError: `factors` do not fit the model's groups; the model is unchanged.
    """
    with gradients_as_before(model):
        injection = Injection(model)
        injection.add(name, config, keep=keep, factors=factors, directions=directions)
    return injection


def check_fit(factors: Mapping[str, AnyFactors], targets: Targets, config: TCurConfig) -> None:
    """Refuses factors that are not of these groups.

    Raises:
        BaseMismatchError: other groups, other sizes, or sketches in the place of indices.
        FileFormatError, BadInputError: shapes, dtypes or values that no adapter has (`check_factors`).
    """
    specs = group_specs(targets)
    names = [group.name for group in targets.groups]
    if set(factors) != set(names):
        raise BaseMismatchError(f"the adapter has the groups {sorted(factors)}, the model {sorted(names)}")
    for group in targets.groups:
        own = factors[group.name]
        if isinstance(own, Factors) == (config.frame == SKETCH):
            raise BaseMismatchError(
                f"the adapter's factors are not of the frame {config.frame}", where=group.name
            )
        fits = len(own.core) == len(group.modules) and own.blocks == group.blocks
        if isinstance(own, Factors):
            fits = fits and own.rows.max() < group.n1 and own.cols.max() < group.n2
        else:
            fits = fits and (own.n1, own.n2) == (group.n1, group.n2)
        if not fits:
            raise BaseMismatchError(
                f"the adapter's factors do not fit {len(group.modules)} weights [{group.n1}, {group.n2}] "
                f"in {group.blocks} blocks",
                where=group.name,
            )
        if type(own) in (Factors, SketchFactors):  # a comparison brings others, of no format
            check_factors(own, specs[group.name], group.name)
