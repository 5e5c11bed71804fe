"""What can be made of a finished run: merged weights, an adapter of another base, one of lower rank."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_tcur.arithmetic import Fit, move_to_base, reduce_rank, refit
from edge_tcur.errors import BaseModelError
from edge_tcur.method.adapted import DEFAULT
from edge_tcur.method.group import member_of
from edge_tcur.method.targets import find_targets
from edge_tcur.models import Base, load_base
from edge_tcur.models.huggingface import quiet_transformers, read_stored
from edge_tcur.models.stored import same_bits
from edge_tcur.tasks import find_task
from edge_tcur.training.evaluate import apply_adapter, load_run_base
from edge_tcur.training.run import ADAPTER_FILE, Run, new_directory, write_run
from edge_tcur_runtime.errors import BadInputError, BaseMismatchError, ConfigError, IntegrityError
from edge_tcur_runtime.formats.adapter import Adapter, write_adapter
from edge_tcur_runtime.formats.digest import digest_bytes

WEIGHTS = "model.safetensors"
HEAD = "head.safetensors"
UNDO = "unmerge.safetensors"
UNDO_DIGESTS = "unmerge.json"
_COPIED = ("tokenizer*", "vocab*", "special_tokens*", "preprocessor_config.json", "merges.txt")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Reworked:
    """A new run.

    Attributes:
        run: where it was written.
        residuals: group -> part of the update that was lost, relative to it (0 to 1).
        base_digest: of the new run's base.
    """

    run: Run
    residuals: dict[str, float]

    @property
    def base_digest(self) -> str:
        """Digest of the base that the new adapter belongs to."""
        return self.run.base_digest


def migrate_run(run: Run, reference: str, out: Path, *, force: bool = False) -> Reworked:
    """The run's adapter brought to another version of its base, as a new run directory.

    Rows and columns stay, the core becomes the least-squares fit of the old update onto the new rows
    and columns; a head and modules trained in full are taken over.

    Args:
        reference: the new base, as `edge-tcur train --base` takes it.

    Raises:
        BaseMismatchError: its weights have other names or shapes.
    """
    old, adapter = load_run_base(run), run.adapter()
    if Path(reference).is_dir():
        reference = str(Path(reference).resolve())
    options = {"max_length": run.config.max_length}
    new = load_base(reference, find_task(run.config.task), run.labels, options)
    stacks = [_stacks(base, run, adapter) for base in (old, new)]
    if bool(new.head) != bool(old.head) or new.labels != old.labels:
        raise BaseMismatchError("the new base brings another head or other labels", where=reference)
    fits = {
        name: move_to_base(factors, adapter.header.transform, stacks[0][name], stacks[1][name])
        for name, factors in adapter.factors.items()
    }
    moved = refit(adapter, fits, new.digest)
    config = replace(run.config, base=reference)
    return _write(replace(run, config=config, base_digest=new.digest), moved, fits, out, force)


def reduce_run(run: Run, rank: int, out: Path, *, force: bool = False) -> Reworked:
    """The run's adapter with fewer rows and columns (those that hold most of it), as a new run directory.

    Groups of a lower rank already stay as they are.

    Raises:
        ConfigError: the rank is not below that of any group.
    """
    adapter = run.adapter()
    if rank >= max(factors.rank for factors in adapter.factors.values()):
        raise ConfigError(f"the rank is {rank}; the adapter has no larger one", where="rank")
    stacks = _stacks(load_run_base(run), run, adapter)
    fits = {
        name: reduce_rank(factors, adapter.header.transform, stacks[name], min(rank, factors.rank))
        for name, factors in adapter.factors.items()
    }
    smaller = refit(adapter, fits, adapter.header.base_digest)
    return _write(replace(run, config=run.config.with_rank(rank)), smaller, fits, out, force)


def _stacks(base: Base, run: Run, adapter: Adapter) -> dict[str, np.ndarray]:
    """Group name -> weights float64 [n3, n1, n2] of a base."""
    targets = find_targets(base.model, replace(run.config.method(), rank=1, rank_pattern={}), keep=base.head)
    found = {group.name: group for group in targets.groups}
    result = {}
    for name, spec in adapter.header.groups.items():
        group = found.get(name)
        parameters = () if group is None else tuple(f"{module}.weight" for module in group.modules)
        if group is None or parameters != spec.parameters or (group.n1, group.n2) != (spec.n1, spec.n2):
            raise BaseMismatchError(
                f"the base has no {len(spec.parameters)} weights [{spec.n1}, {spec.n2}] such as "
                f"{spec.parameters[0]}",
                where=base.reference,
                hint="migrate between versions of one base, not between models",
            )
        result[name] = np.stack([_matrix(base.model, module) for module in group.modules])
    return result


def _matrix(model: nn.Module, name: str) -> np.ndarray:
    value: np.ndarray = member_of(model, name).matrix().double().cpu().numpy()
    return value


def _write(run: Run, adapter: Adapter, fits: dict[str, Fit], out: Path, force: bool) -> Reworked:
    with new_directory(out, force=force) as work:
        write_adapter(work / ADAPTER_FILE, adapter)
        if (run.root / "tokenizer.json").is_file():
            shutil.copyfile(run.root / "tokenizer.json", work / "tokenizer.json")
        kept = {"trained_numbers", "head_numbers", "samples"} & set(run.metrics)
        metrics: dict[str, Any] = {key: run.metrics[key] for key in kept}
        metrics |= {
            "accuracy": None, "accuracies": [], "losses": [], "held_out_samples": 0, "step_seconds": 0.0,
            "trained_numbers": adapter.trained_numbers, "adapter_bytes": (work / ADAPTER_FILE).stat().st_size,
        }  # fmt: skip
        write_run(work, replace(run, metrics=metrics))
    residuals = {name: fit.residual for name, fit in fits.items()}
    return Reworked(replace(run, root=out, metrics=metrics), residuals)


@dataclass(frozen=True)
class Merged:
    """A base with an adapter in its weights.

    Attributes:
        root: the directory.
        weights: number of weights that were changed.
        files: what was written.
    """

    root: Path
    weights: int
    files: tuple[str, ...]


def merge_run(run: Run, out: Path, *, force: bool = False) -> Merged:
    """Writes the base with the run's adapter merged into its weights, in the base's own dtype.

    A Hugging Face base comes out in its own layout (a new head beside it, ``head.safetensors``, in float32),
    any other as ``model.safetensors`` of its state. Each weight gets the dtype that the base's files have it
    in: the sum is made in float32 and rounded once. ``unmerge.safetensors`` holds the differences of the bits
    to those files, from which `unmerge` makes the base again, exactly.

    Raises:
        BadInputError: a sum is no finite number in the dtype of its weight.
    """
    base, adapter = load_run_base(run), run.adapter()
    with new_directory(out, force=force) as work, TemporaryDirectory(dir=work.parent) as plain:
        _save_model(base, Path(plain))
        injection = apply_adapter(base, run, adapter)
        saved = {name: value.detach() for name, value in injection.adapters[DEFAULT].saved.items()}
        injection.merge()
        injection.remove()
        with torch.no_grad():
            for name, value in saved.items():
                base.model.get_parameter(name).copy_(value)
        _save_model(base, work)
        if head := {name: value.detach().contiguous() for name, value in base.head_parameters().items()}:
            save_file(head, work / HEAD)
        originals, merged = load_file(Path(plain) / WEIGHTS), load_file(work / WEIGHTS)
        if callable(getattr(_inner(base.model), "save_pretrained", None)):
            _store_as_the_base(base.reference, originals, merged, work)
        count = _save_undo(originals, merged, work)
        files = tuple(sorted(path.name for path in work.iterdir()))
    return Merged(out, count, files)


def _store_as_the_base(
    reference: str, originals: dict[str, Tensor], merged: dict[str, Tensor], work: Path
) -> None:
    """Brings both to what a base's files hold, in place; writes `merged`, and its dtype in the config."""
    stored, config = read_stored(reference)
    for name, plain in originals.items():
        original, value = stored.original(name, plain), merged[name]
        originals[name] = original
        merged[name] = original if same_bits(value, plain) else value.to(original.dtype)
        if value.isfinite().all() and not merged[name].isfinite().all():
            raise BadInputError(
                f"the sum of weight and update is no finite number in {original.dtype}",
                where=name,
                hint="keep the adapter apart, or bring the base to float32 before it is trained on",
            )
    save_file(merged, work / WEIGHTS, metadata={"format": "pt"})
    path = work / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    _copy_dtype(written, config, str(stored.default).removeprefix("torch."))
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_dtype(written: dict[str, Any], config: dict[str, Any], default: str) -> None:
    """What a config says of its dtype, and those of its parts, as in the base's own."""
    if "dtype" in written:
        written["dtype"] = config.get("dtype") or config.get("torch_dtype") or default
    for key, part in written.items():
        if isinstance(part, dict) and isinstance(own := config.get(key), dict):
            _copy_dtype(part, own, default)


def _save_undo(originals: dict[str, Tensor], merged: dict[str, Tensor], work: Path) -> int:
    """Writes the differing bits of every weight that changed; returns how many did."""
    undo = {
        name: _xor(merged[name], value)
        for name, value in originals.items()
        if not same_bits(merged[name], value)
    }
    save_file(undo, work / UNDO)
    digests = {name: _digest(originals[name]) for name in undo}
    (work / UNDO_DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    return len(undo)


def _save_model(base: Base, work: Path) -> None:
    """Writes the user's own model, as one file of weights."""
    inner = _inner(base.model)
    if callable(save := getattr(inner, "save_pretrained", None)):
        with quiet_transformers():
            save(work, max_shard_size="1TB")
        if Path(base.reference).is_dir():
            for pattern in _COPIED:
                for path in Path(base.reference).glob(pattern):
                    shutil.copyfile(path, work / path.name)
    else:
        state = {name: value.detach().contiguous().clone() for name, value in inner.state_dict().items()}
        save_file(state, work / WEIGHTS)
    if base.tokenizer is not None and not (work / "tokenizer.json").exists():
        (work / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")


def _inner(model: nn.Module) -> nn.Module:
    """The user's own model inside the wrapper that a base has."""
    for name in ("module", "encoder"):
        inner = getattr(model, name, None)
        if type(model).__module__.startswith("edge_tcur.") and isinstance(inner, nn.Module):
            return inner
    return model


def _xor(a: Tensor, b: Tensor) -> Tensor:
    kind = _BITS[a.element_size()]
    return a.contiguous().view(kind) ^ b.contiguous().view(kind)


def _digest(value: Tensor) -> str:
    raw = value.contiguous().view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)
    return digest_bytes(raw.cpu().numpy().tobytes())


def _undo(weights: dict[str, Tensor], undo: dict[str, Tensor], digests: Any, merged: Path) -> None:
    """Puts the weights in `undo` back to what `digests` says."""
    if not isinstance(digests, dict) or set(digests) != set(undo) or not set(undo) <= set(weights):
        raise IntegrityError("its files do not name the same weights", where=str(merged))
    for name, bits in undo.items():
        value = weights[name]
        if value.shape != bits.shape or bits.dtype is not _BITS[value.element_size()]:
            raise IntegrityError("the weight has another shape or dtype", where=f"{merged}: {name}")
        weights[name] = (value.view(bits.dtype) ^ bits).view(value.dtype)
        if _digest(weights[name]) != digests[name]:
            raise IntegrityError("the weight does not come out as it was", where=f"{merged}: {name}")


def unmerge(merged: Path, out: Path, *, force: bool = False) -> Merged:
    """Makes the base again from what `merge_run` wrote, bit by bit.

    Raises:
        BaseModelError: the directory holds no merged base.
        IntegrityError: a weight does not come out as it was.
    """
    for name in (WEIGHTS, UNDO, UNDO_DIGESTS):
        if not (merged / name).is_file():
            raise BaseModelError(f"holds no merged base ({name} is missing)", where=str(merged))
    try:
        weights, undo = load_file(merged / WEIGHTS), load_file(merged / UNDO)
        digests = json.loads((merged / UNDO_DIGESTS).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, OSError) as error:
        raise BaseModelError(f"cannot be read: {error}", where=str(merged)) from error
    _undo(weights, undo, digests, merged)
    with new_directory(out, force=force) as work:
        save_file(weights, work / WEIGHTS, metadata={"format": "pt"})
        for path in sorted(merged.iterdir()):
            if path.is_file() and path.name not in (WEIGHTS, UNDO, UNDO_DIGESTS, HEAD):
                shutil.copyfile(path, work / path.name)
        files = tuple(sorted(path.name for path in work.iterdir()))
    return Merged(out, len(undo), files)
