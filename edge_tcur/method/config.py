"""What is adapted and how: one frozen dataclass of named choices, checked when it is made.

Imports no torch: the names are options of `edge-tcur train`, whose help must be cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from edge_tcur.method.selection import GRADIENT, SELECTIONS, UPDATE
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.adapter import MAX_ALPHA
from edge_tcur_runtime.formats.factors import COUPLINGS, FRAMES, SKETCH
from edge_tcur_runtime.formats.schema import nearest
from edge_tcur_runtime.transform import TRANSFORMS

GROUPINGS = ("projection", "shape", "layer", "weight")
ALL_LINEAR = "all-linear"
AUTO = "auto"
_WHOLE = "a whole number"
_KINDS: dict[str, tuple[type, ...]] = {
    "a text": (str,),
    _WHOLE: (int,),
    "a number": (int, float),
    "a mapping": (Mapping,),
    "a list": (tuple, list),
}


@dataclass(frozen=True)
class TCurConfig:
    """Settings of a tCURLoRA adapter.

    Attributes:
        rank: r, rows and columns per group; the core holds n3 * r * r numbers.
        grouping: which weights share a tensor: ``projection`` (one projection, stacked over the
            layers), ``shape`` (the paper's: every weight of one shape), ``layer`` (the weights of one
            shape in one layer), ``weight`` (each alone), or comma-separated name patterns, one tensor each.
        coupling: how far the t-product reaches: ``none`` (each weight alone, with rows and columns of
            its own), ``layer`` (the weights of a group in one layer) or ``all`` (the whole group).
        transform: along the coupled weights: ``dft`` (the paper's), ``dct``, ``identity`` (shared
            rows and columns, nothing else); ``auto`` is ``dft``, and ``identity`` without coupling.
        selection: rule that picks rows and columns, see `edge_tcur.method.selection`.
        frame: coordinates of training, ``orthonormal`` or ``raw`` (`edge_tcur_runtime.frame`), or
            ``sketch``: stored ternary sketches of the gradient or update in the place of rows and columns.
        targets: ``all-linear``, or the names of modules, as a list or comma-separated (kept in that form).
        alpha: scale of the update (and so of the effective learning rate).
        rank_pattern: name pattern of a module -> rank of its group; the first that matches counts.
        layers_to_transform: numbers of the layers that are adapted, or one number; empty for all.
        modules_to_save: names of modules that are trained in full and saved with the adapter.
        seed: of selections that draw at random.

    Names are as in peft: a plain one means the module of that name and all whose last components it is
    (``query``: ``encoder.layer.0.attention.self.query`` too); one with ``*``, ``?`` or ``[`` is a pattern
    of whole names.

    Raises:
        ConfigError: a value that is not known, or a combination that means nothing.
    """

    rank: int = 8
    grouping: str = "projection"
    coupling: str = "none"
    transform: str = AUTO
    selection: str = GRADIENT
    frame: str = "orthonormal"
    targets: str | Sequence[str] | Set[str] = ALL_LINEAR
    alpha: float = 1.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] = ()
    modules_to_save: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._bring_to_one_form()
        self._refuse_types()
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ConfigError(f"the rank is {rank}; expected at least 1", where=name)
        if not 0 < self.alpha < MAX_ALPHA:
            raise ConfigError(f"{self.alpha}; expected above 0 and below {MAX_ALPHA:g}", where="alpha")
        if not any(mark in self.grouping for mark in "*?,"):
            _known("grouping", self.grouping, GROUPINGS)
        _known("coupling", self.coupling, COUPLINGS)
        _known("transform", self.transform, (AUTO, *TRANSFORMS))
        _known("selection", self.selection, SELECTIONS)
        _known("frame", self.frame, FRAMES)
        self._refuse_combinations()

    def _bring_to_one_form(self) -> None:
        """Lists as peft has them; what is neither is refused with its type."""
        targets, layers, saved = self.targets, self.layers_to_transform, self.modules_to_save
        if isinstance(targets, (list, tuple, Set)):
            if not targets:
                raise ConfigError("the list is empty", where="targets", hint=f"name modules, or {ALL_LINEAR}")
            for name in targets:
                _typed("targets", name, "a text")
            names = sorted(targets) if isinstance(targets, Set) else targets
            object.__setattr__(self, "targets", ",".join(names))
        if type(layers) is int:
            object.__setattr__(self, "layers_to_transform", (layers,))
        elif isinstance(layers, list):
            object.__setattr__(self, "layers_to_transform", tuple(layers))
        if isinstance(saved, list):
            object.__setattr__(self, "modules_to_save", tuple(saved))

    def _refuse_types(self) -> None:
        """A file of settings may hold anything; what is of another type would fail much later."""
        texts = ("grouping", "coupling", "transform", "selection", "frame", "targets")
        kinds = dict.fromkeys(texts, "a text") | {"rank": _WHOLE, "seed": _WHOLE, "alpha": "a number"}
        kinds |= {"rank_pattern": "a mapping", "layers_to_transform": "a list", "modules_to_save": "a list"}
        for name, kind in kinds.items():
            _typed(name, getattr(self, name), kind)
        for name, parts, kind in (
            ("rank_pattern", self.rank_pattern, "a text"),
            ("rank_pattern", self.rank_pattern.values(), _WHOLE),
            ("layers_to_transform", self.layers, _WHOLE),
            ("modules_to_save", self.modules_to_save, "a text"),
        ):
            for part in parts:
                _typed(name, part, kind)
        if self.seed < 0:
            raise ConfigError(f"{self.seed}; expected at least 0", where="seed")

    def _refuse_combinations(self) -> None:
        if self.coupling == "none" and self.transform not in (AUTO, "identity"):
            raise ConfigError(
                f"coupling none leaves nothing to transform; {self.transform!r} would be passed over",
                where="transform",
                hint="say coupling all or layer, or leave the transform out",
            )
        if self.coupling == "layer" and self.grouping == "projection":
            raise ConfigError(
                "grouping by projection has one weight of each layer in a group: coupling layer is none",
                where="coupling",
                hint="say coupling none, or grouping shape",
            )
        if self.grouping == "weight" and self.coupling != "none":
            raise ConfigError(
                "grouping by weight has one weight in a group: there is nothing to couple",
                where="coupling",
                hint="say coupling none, or another grouping",
            )
        if self.frame == SKETCH and (self.coupling != "none" or not self.needs_directions):
            raise ConfigError(
                "the sketch frame stores sketches of each weight's gradient or update",
                where="frame",
                hint=f"say coupling none and selection {GRADIENT} or {UPDATE} with it",
            )

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names in `targets`; none where it is ``all-linear``."""
        text = self.targets if isinstance(self.targets, str) else ",".join(self.targets)
        return () if text == ALL_LINEAR else split_names(text)

    @property
    def layers(self) -> tuple[int, ...]:
        """`layers_to_transform`."""
        layers = self.layers_to_transform
        return (layers,) if isinstance(layers, int) else tuple(layers)

    @property
    def domain(self) -> str:
        """The transform, ``auto`` resolved."""
        if self.transform != AUTO:
            return self.transform
        return "identity" if self.coupling == "none" else "dft"

    @property
    def needs_directions(self) -> bool:
        """Whether rows and columns (or sketches) are chosen from gradients or from a learnt update."""
        return self.selection in (GRADIENT, UPDATE)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "grouping": "shape",
        "coupling": "all",
        "transform": "dft",
        "selection": "norm",
        "frame": "raw",
    },
    "curlora": {
        "grouping": "projection",
        "coupling": "none",
        "transform": "identity",
        "selection": "inverse-norm",
        "frame": "raw",
    },
    "gradient": {
        "grouping": "projection",
        "coupling": "none",
        "transform": "identity",
        "selection": GRADIENT,
        "frame": "orthonormal",
    },
    "sketch": {
        "grouping": "projection",
        "coupling": "none",
        "transform": "identity",
        "selection": GRADIENT,
        "frame": SKETCH,
    },
    "update": {
        "grouping": "projection",
        "coupling": "none",
        "transform": "identity",
        "selection": UPDATE,
        "frame": "orthonormal",
    },
    "update-sketch": {
        "grouping": "projection",
        "coupling": "none",
        "transform": "identity",
        "selection": UPDATE,
        "frame": SKETCH,
    },
}
"""Named choices of the axes.

``paper``: He et al., arXiv 2501.02227, section 2: attention q, k, v and output of all layers in one
tensor, the two feed-forward matrices in one each (grouping by shape gives these three on BERT and ViT),
DFT t-product, columns then rows by norm, the core itself trained (raw), one rank.
``curlora``: Fawi, *CURLoRA*, arXiv 2408.14572: each weight alone, rows and columns drawn with
probabilities inverse to their squared norms.
``gradient``, ``sketch``, ``update``, ``update-sketch``: ours, see docs/method.md.
"""


def preset(name: str, **changes: Any) -> TCurConfig:
    """The configuration of that preset, with `changes`.

    Raises:
        ConfigError: no such preset; the nearest is suggested.
    """
    _known("preset", name, PRESETS)
    return replace(TCurConfig(**PRESETS[name]), **changes)


def split_names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated text."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _typed(field_name: str, value: Any, kind: str) -> None:
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
        raise ConfigError(f"{value!r}; expected {kind}", where=field_name)


def _known(field_name: str, value: str, known: Iterable[str]) -> None:
    options = tuple(known)
    if value not in options:
        guess = nearest(value, options)
        raise ConfigError(
            f"{value!r} is not known; expected one of {', '.join(options)}",
            where=field_name,
            hint=f"did you mean {guess!r}?" if guess else None,
        )
