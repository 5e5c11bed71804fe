"""The factors of one group of weights as a torch module: a trained core between frozen factors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.fit import fit_core
from edge_tcur.method.forms import Slice
from edge_tcur.method.selection import SELECTIONS, UPDATE, Choice
from edge_tcur.method.sketch import sketch_gradient, sketch_update
from edge_tcur.method.spectral import Batches, Spectrum
from edge_tcur.method.targets import Group, Targets
from edge_tcur.method.tproduct import coupling_constants, coupling_matrix, flatten_columns, flatten_rows
from edge_tcur.method.views import View, bias_of, find_view
from edge_tcur_runtime.formats.factors import SKETCH, AnyFactors, Factors, SketchFactors
from edge_tcur_runtime.frame import Frame, build_frame
from edge_tcur_runtime.transform import from_domain, to_domain


@dataclass(frozen=True)
class Member:
    """An adapted module and the view of its weight."""

    module: nn.Module
    view: View

    def matrix(self) -> Tensor:
        """The weight as a matrix [n1, n2], detached."""
        return self.view.matrix(self.module).detach()


def member_of(model: nn.Module, name: str) -> Member:
    """The module of that name, which can be adapted, and the view of its weight."""
    module = model.get_submodule(name)
    view = find_view(module)
    assert isinstance(view, View)
    return Member(module, view)


def members_of(model: nn.Module, targets: Targets) -> dict[str, Member]:
    """Module name -> module and view, of every weight that is adapted."""
    return {name: member_of(model, name) for group in targets.groups for name in group.modules}


def choose_factors(
    group: Group, members: list[Member], config: TCurConfig, directions: Mapping[str, Tensor] | None
) -> AnyFactors:
    """New frozen factors of a group.

    The core is zero (no ``U0 = pinv(...)`` and its rounding); with the selection ``update`` it is the
    one that comes nearest to the update.

    Args:
        directions: module name -> [n1, n2]; only the rules that need them look at them.
    """
    own = None if directions is None else [directions[name] for name in group.modules]
    factors = _choose_frozen(group, members, config, own)
    if config.selection != UPDATE or own is None:
        return factors
    update = np.stack([value.double().cpu().numpy() for value in own])
    columns, lines = _frozen(members, factors, group.size)
    core = fit_core(update, columns, lines, transform=config.domain, blocks=factors.blocks)
    return factors.with_core(core.astype(np.float32))


def _choose_frozen(
    group: Group, members: list[Member], config: TCurConfig, own: list[Tensor] | None
) -> AnyFactors:
    core = np.zeros((len(members), group.rank, group.rank), np.float32)
    if config.frame == SKETCH:
        assert own is not None
        sketch = sketch_update if config.selection == UPDATE else sketch_gradient
        pairs = [sketch(value, group.rank) for value in own]
        left, right = (np.stack([part.cpu().numpy() for part in parts]) for parts in zip(*pairs, strict=True))
        return SketchFactors.pack(core, left, right)
    picks = []
    for start in range(0, len(members), group.size):
        part = slice(start, start + group.size)
        # Of its own for every block of every group, and unrelated to those of another seed.
        seed = np.random.SeedSequence((config.seed, zlib.crc32(group.name.encode()), start))
        choice = Choice(
            group.rank,
            config.domain,
            seed.generate_state(1).item(),
            None if own is None else torch.stack(own[part]),
        )
        stack = torch.stack([member.matrix() for member in members[part]])
        picks.append(SELECTIONS[config.selection](stack, choice))
    rows, cols = (torch.stack(parts).cpu().numpy().astype(np.int32) for parts in zip(*picks, strict=True))
    return Factors(core, rows, cols)


class CoreGroup(nn.Module):
    """The factors of one group.

    Attributes:
        core: Parameter f32 [n3, r, r] in the frame's coordinates; its zero is the base.
        columns_t: f32, C_flat transposed in the frame: [b, p * r, n1], or of slices that no transform
            couples [n3, r, n1].
        spec: names and sizes.
    """

    columns_t: Tensor
    _loaded: Tensor

    def __init__(self, spec: Group, members: list[Member], factors: AnyFactors, config: TCurConfig) -> None:
        super().__init__()
        self.spec = spec
        self._members = tuple(members)
        self._factors = factors
        self._batches, self._spectra = Batches(), dict[int, Spectrum]()
        self._alone = config.domain == "identity" or spec.size == 1
        device = members[0].matrix().device
        columns, lines = _frozen(members, factors, spec.size)
        transform = "identity" if self._alone else config.domain
        blocks = len(members) if self._alone else spec.blocks
        self.frame: Frame = (
            build_frame(config.frame, columns, lines, transform=transform, blocks=blocks, alpha=config.alpha)
            if isinstance(factors, Factors)
            else Frame(transform, blocks, config.alpha)
        )
        columns = config.alpha * _product(self.frame, columns, self.frame.left, on_the_left=False)
        lines = _product(self.frame, lines, self.frame.right, on_the_left=True)
        self.core = nn.Parameter(torch.zeros(factors.core.shape, device=device))
        size = len(members) // blocks
        parts = range(0, len(members), size)

        def hold(name: str, values: list[Tensor]) -> None:
            self.register_buffer(name, torch.stack(values).float().contiguous().to(device), persistent=False)

        hold("columns_t", [flatten_columns(torch.from_numpy(columns[at : at + size])) for at in parts])
        if self._alone and isinstance(factors, Factors):
            # The rows are gathered from the layer's own output, or from its weight when a form needs them.
            mix = (
                np.eye(factors.rank)[None].repeat(blocks, 0)
                if self.frame.right is None
                else self.frame.right[:, 0]
            )
            hold("mix_t", [torch.from_numpy(value).T for value in mix])
            rows = np.repeat(factors.rows, spec.size if factors.blocks != blocks else 1, axis=0)
            self.register_buffer("rows", torch.from_numpy(rows.astype(np.int64)).to(device), persistent=False)
        else:
            hold("rows_t", [flatten_rows(torch.from_numpy(lines[at : at + size])) for at in parts])
        if not self._alone:
            constants = coupling_constants(transform, size).to(device)
            self.register_buffer("constants", constants, persistent=False)
        self.load(factors)

    def slice(self, position: int) -> Slice:
        """The factors of the weight at `position`, as the forms take them."""
        if not self._alone:
            size = self.spec.size
            block, place = divmod(position, size)
            core = self.core[block * size : (block + 1) * size]
            constants, rows_t = self.get_buffer("constants")[place], self.get_buffer("rows_t")[block]

            def together() -> Tensor:
                return self._batches.take(
                    block, place, self.core, lambda: self._spectrum(block).updates(core)
                )

            return Slice(
                lambda: coupling_matrix(core, constants),
                lambda: rows_t,
                self.columns_t[block],
                update=together,
            )
        matrix, columns_t = self.core[position], self.columns_t[position]
        if not isinstance(self._factors, Factors):
            rows_t = self.get_buffer("rows_t")[position]
            return Slice(lambda: matrix.T, lambda: rows_t, columns_t)
        rows, mix_t = self.get_buffer("rows")[position], self.get_buffer("mix_t")[position]
        member = self._members[position]

        def from_weight() -> Tensor:
            return member.matrix().index_select(0, rows).to(mix_t.dtype).T @ mix_t

        bias = bias_of(member.module, rows)
        return Slice(
            lambda: matrix.T,
            from_weight,
            columns_t,
            rows,
            mix_t,
            None if bias is None else bias.to(mix_t.dtype),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoreGroup:
        """Moved or cast: what was made from the buffers is made again."""
        self._spectra.clear()
        self._loaded = fn(self._loaded)
        result: CoreGroup = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result

    def _spectrum(self, block: int) -> Spectrum:
        """The frozen factors of a block in the transform's domain; made when first asked for."""
        if block not in self._spectra:
            size, rank = self.spec.size, self.core.shape[1]
            columns = self.columns_t[block].reshape(size, rank, -1).transpose(1, 2)
            rows = self.get_buffer("rows_t")[block].T.reshape(size, rank, -1)
            self._spectra[block] = Spectrum(self.frame.transform, columns, rows)
        return self._spectra[block]

    @property
    def in_block(self) -> bool:
        """Whether a transform couples the slices."""
        return not self._alone

    @property
    def has_rows(self) -> bool:
        """Whether the slices stand alone with rows of the base, as the gather form needs."""
        return self._alone and isinstance(self._factors, Factors)

    def factors(self) -> AnyFactors:
        """The group's factors as the adapter file holds them (raw core)."""
        if torch.equal(self.core.detach(), self._loaded):
            return self._factors  # not trained since: the same bits, which two changes of frame would round
        raw = self.frame.to_raw(self.core.detach().double().cpu().numpy())
        return self._factors.with_core(raw.astype(np.float32))

    def load(self, factors: AnyFactors) -> None:
        """Sets the core from an adapter file's raw core over the same frozen factors."""
        value = torch.from_numpy(self.frame.from_raw(factors.core.astype(np.float64)))
        with torch.no_grad():
            self.core.copy_(value)
        self._factors, self._loaded = factors, self.core.detach().clone()


def _frozen(members: list[Member], factors: AnyFactors, size: int) -> tuple[np.ndarray, np.ndarray]:
    """C [n3, n1, r] and R [n3, r, n2], float64."""
    if not isinstance(factors, Factors):
        left, right = factors.vectors()
        return left.astype(np.float64), right.astype(np.float64)
    columns, lines = [], []
    for position, member in enumerate(members):
        matrix, block = member.matrix(), position // size
        rows, cols = (torch.from_numpy(part[block].astype(np.int64)) for part in (factors.rows, factors.cols))
        columns.append(matrix.index_select(1, cols.to(matrix.device)).double().cpu().numpy())
        lines.append(matrix.index_select(0, rows.to(matrix.device)).double().cpu().numpy())
    return np.stack(columns), np.stack(lines)


def _product(frame: Frame, value: np.ndarray, factor: np.ndarray | None, *, on_the_left: bool) -> np.ndarray:
    """`value` times a matrix of the frame in the algebra of its transform."""
    if factor is None:
        return value
    blocks = value.reshape(frame.blocks, -1, *value.shape[1:])
    domain = to_domain(frame.transform, blocks)
    product = factor @ domain if on_the_left else domain @ factor
    return from_domain(frame.transform, product, blocks.shape[1]).reshape(value.shape)
