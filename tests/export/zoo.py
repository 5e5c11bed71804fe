"""The families of models that must export, each as a tiny base, and what each target says to it.

Used by `test_zoo` and by the command that writes the table of docs/models.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
COLUMNS = ("infer", "step", "ort-training", "portable", "xnnpack")
QUICK = ("infer", "step", "ort-training")  # what the tests measure of most models
# BERT and ViT have bundles in test_export and test_executorch; RoBERTa is BERT but for its positions.
ELSEWHERE: tuple[str, ...] = ()
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "where", "is", "my", "card", "please", "i", "lost", "the", "money",
    "send", "it", "again", "late",
]  # fmt: skip
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {"vocab_size": len(WORDS), "max_position_embeddings": 26, "pad_token_id": 0, "bos_token_id": 2,
         "eos_token_id": 3}  # fmt: skip
_PICTURE = {"image_size": 8, "patch_size": 4, "num_channels": 1}


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        family: as the table calls it.
        task: that it is trained for.
        base: writes it into a directory, and says how it is referred to.
        data: writes its data, and says where.
        tested: the columns that the tests measure; the command measures all.
        settings: of the training, besides the usual ones.
    """

    family: str
    task: str
    base: Callable[[Path], str]
    data: Callable[[Path], str]
    tested: tuple[str, ...] = QUICK
    settings: dict[str, Any] = field(default_factory=dict)


def _saved(model: str, config: str, *, text: bool, **settings: Any) -> Callable[[Path], str]:
    """A model of transformers with random weights, saved as a directory."""

    def make(root: Path) -> str:
        import torch
        import transformers

        torch.manual_seed(7)
        built = getattr(transformers, model)(getattr(transformers, config)(**settings))
        built.save_pretrained(root / "base")
        if text:
            _save_tokenizer(root / "base")
        else:
            processor = {"do_rescale": True, "image_mean": [0.5], "image_std": [0.25]}
            (root / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
        return str(root / "base")

    return make


def _save_tokenizer(root: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root)


def _function(name: str) -> Callable[[Path], str]:
    def make(_: Path) -> str:
        if str(HERE) not in sys.path:
            sys.path.insert(0, str(HERE))
        return f"zoo_models:{name}"

    return make


def _texts(root: Path) -> str:
    rows = ["text,label"]
    for n in range(6):
        rows += [f"where is my {WORDS[8 + n]},card", f"send the {WORDS[8 + n]} again,money"]
    (root / "texts.csv").write_text("\n".join(rows) + "\n")
    return str(root / "texts.csv")


def _pictures(*shape: int) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        generator = np.random.default_rng(3)
        labels = np.arange(18) % 3
        images = generator.normal(90, 20, (18, *shape))
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 2] += 90
        np.savez(root / "pictures.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
        return str(root / "pictures.npz")

    return make


def _volumes(root: Path) -> str:
    generator = np.random.default_rng(3)
    images = generator.normal(90, 20, (6, 8, 8, 8))
    masks = np.zeros((6, 8, 8, 8), np.int64)
    for number in range(6):
        images[number, :, number % 4 :, 2:5] += 90
        masks[number, :, number % 4 :, 2:5] = 1 + number % 2
    images = images.clip(0, 255).astype(np.uint8)
    np.savez(root / "volumes.npz", images=images, masks=masks, names=np.array(["none", "left", "right"]))
    return str(root / "volumes.npz")


CLASSIFY, PICTURES, LANGUAGE = "text-classification", "image-classification", "causal-lm"
MODELS: dict[str, Model] = {
    "BERT": Model("text encoder", CLASSIFY, _saved("BertModel", "BertConfig", text=True, **_SMALL, **_TEXT),
                  _texts, ELSEWHERE),
    "RoBERTa": Model("text encoder", CLASSIFY,
                     _saved("RobertaModel", "RobertaConfig", text=True, **_SMALL, **_TEXT), _texts,
                     ELSEWHERE),
    "DistilBERT": Model(
        "text encoder", CLASSIFY,
        _saved("DistilBertModel", "DistilBertConfig", text=True, dim=16, n_layers=2, n_heads=2, hidden_dim=32,
               **_TEXT),
        _texts, ("infer", "step"),
    ),
    "CLIP, text tower": Model(
        "text encoder", CLASSIFY,
        _saved("CLIPTextModel", "CLIPTextConfig", text=True, **_SMALL, **_TEXT), _texts,
    ),
    "GPT-2": Model(
        "causal language model", LANGUAGE,
        _saved("GPT2LMHeadModel", "GPT2Config", text=True, vocab_size=len(WORDS), n_positions=24, n_embd=16,
               n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3),
        _texts,
    ),
    "LLaMA": Model(
        "causal language model", LANGUAGE,
        _saved("LlamaForCausalLM", "LlamaConfig", text=True, **{**_SMALL, "num_attention_heads": 4},
               num_key_value_heads=2, **_TEXT),
        _texts,
    ),
    "ViT": Model(
        "picture encoder", PICTURES,
        _saved("ViTForImageClassification", "ViTConfig", text=False, num_labels=3, **_SMALL, **_PICTURE),
        _pictures(8, 8), ELSEWHERE,
    ),
    "CLIP, vision tower": Model(
        "picture encoder", PICTURES,
        _saved("CLIPVisionModel", "CLIPVisionConfig", text=False, **_SMALL, **_PICTURE), _pictures(8, 8),
        ("infer", "step"),
    ),
    "Whisper, encoder": Model("speech encoder", PICTURES, _function("whisper"), _pictures(8, 32)),
    "Residual network": Model(
        "convolutional classifier, its convolutions adapted", PICTURES, _function("convolutional"),
        _pictures(16, 16, 3), (*QUICK, "portable"),
        {"targets": "*.stem,*.layers.*.first,*.layers.*.second,*.layers.*.shortcut"},
    ),
    "UNETR": Model(
        "segmentation of volumes, fused qkv", "image-segmentation", _function("unetr"), _volumes,
    ),
}  # fmt: skip


def measure(name: str, root: Path, columns: tuple[str, ...]) -> dict[str, str]:
    """Column -> ``yes``, or the reason why not, by training, exporting and comparing with torch."""
    from edge_tcur.training import TrainConfig, train

    model = MODELS[name]
    root.mkdir(parents=True, exist_ok=True)
    usual = {"rank": 2, "epochs": 1, "head_epochs": 2, "batch_size": 4, "threads": 1, "max_length": 0}
    config = TrainConfig(model.base(root), model.data(root), task=model.task, **{**usual, **model.settings})
    run = train(config, root / "run").run
    whole = _attempt(run, root / "bundle", columns)
    if len(whole) == len(columns):
        return whole
    return {column: _attempt(run, root / column, (column,))[column] for column in columns}


def _attempt(run: Any, out: Path, columns: tuple[str, ...]) -> dict[str, str]:
    """Exports for all of `columns` at once; of several, nothing where one fails."""
    from edge_tcur.errors import ExportError
    from edge_tcur_export.bundle import export_run
    from edge_tcur_export.parity import TOLERANCES
    from edge_tcur_export.settings import ExportSettings, ProgramSettings

    backends = tuple(column for column in columns if column in {"portable", "xnnpack"})
    targets = ("onnx", *(column for column in columns if column in {"step", "ort-training"}))
    targets += ("executorch",) if backends else ()
    settings = ExportSettings(targets, programs=ProgramSettings(backends or ("portable",)))
    try:
        report = export_run(run, out, settings)
    except ExportError as error:
        return {columns[0]: error.message} if len(columns) == 1 else {}
    names = {"step": ("step",), "ort-training": ("train",), "infer": ("infer",)}
    names |= {backend: (f"infer-{backend}", f"train-{backend}") for backend in backends}
    for column in columns:
        for target in names[column]:
            errors = report.parity[target]
            wanted = {"outputs"} if target.startswith("infer") else set(TOLERANCES)
            assert set(errors) >= wanted, (target, errors)
            assert all(error <= TOLERANCES.get(kind, 1e-3) for kind, error in errors.items()), (
                target,
                errors,
            )
    return dict.fromkeys(columns, "yes")
