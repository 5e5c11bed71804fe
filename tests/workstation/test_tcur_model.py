"""`TCurModel`: the names of peft, bit-equal files, plain loops and `transformers.Trainer`."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.method.config import TCurConfig, preset
from edge_tcur.method.quantized import quantize_linears
from edge_tcur.method.targets import find_targets
from edge_tcur.tcur_model import TCurModel, collect_gradients, get_tcur_model, read_config, rehearsal
from edge_tcur_runtime.errors import (
    BadInputError,
    BaseMismatchError,
    ConfigError,
    DiskError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import read_adapter

CONFIG = TCurConfig(rank=4, selection="squared-norm")


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(0, 50, (6, 7)),
        "attention_mask": torch.ones(6, 7, dtype=torch.long),
        "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
    }


def train(model, batch, steps=15, rate=0.05):
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_the_cores_train_and_the_loss_falls(bert, batch):
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    model = get_tcur_model(bert, CONFIG)
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 6 * 2 * 16
    assert total > 20 * trained
    assert "trainable params: 192" in model.describe_trainable_parameters()
    losses = train(model, batch)
    assert losses[-1] < losses[0] - 0.05
    plain = model.unload()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_a_rehearsal_gives_the_directions(bert, batch):
    """A plain loop trains a low-rank update; the adapter starts near it, and the base is as it was."""
    before, config = copy.deepcopy(bert.state_dict()), preset("update-sketch", rank=8)
    practice = rehearsal(bert, config)
    optimizer = torch.optim.AdamW(practice.parameters(), lr=0.02)
    with practice.active():
        for _ in range(10):
            optimizer.zero_grad()
            loss = bert(**batch).loss
            loss.backward()
            optimizer.step()
    base = bert(**batch).loss.item()
    model = get_tcur_model(bert, config, directions=practice.updates())
    assert model(**batch).loss.item() < 0.2 * base  # of which the rehearsal left less still
    assert all(torch.equal(value, before[name]) for name, value in model.unload().state_dict().items())


def test_what_it_does_not_know_it_asks_the_model(bert):
    assert get_tcur_model(bert, CONFIG).config.hidden_size == 32


@pytest.mark.parametrize("kind", ["gradient", "sketch", "paper", "curlora"])
def test_saving_and_loading_again_gives_the_same_bytes(kind, bert, batch, tmp_path):
    base = copy.deepcopy(bert)
    config = preset(kind, rank=4, modules_to_save=("classifier",))
    model = get_tcur_model(
        bert, config, directions=collect_gradients(bert, config, [lambda: bert(**batch).loss])
    )
    train(model, batch, rate=0.01)
    model.save_pretrained(tmp_path / "one")
    loaded = TCurModel.from_pretrained(base, tmp_path / "one")
    assert not any(value.requires_grad for value in loaded.parameters())
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "two")
    for name in ("adapter.safetensors", "tcur_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one = read_adapter(tmp_path / "one" / "adapter.safetensors")
    for name, factors in loaded.adapter().factors.items():
        for part, value in factors.stored().items():
            np.testing.assert_array_equal(value, one.factors[name].stored()[part])


def test_several_adapters_are_set_disabled_and_deleted(bert, batch, tmp_path):
    base = bert(**batch).logits.detach()
    model = get_tcur_model(bert, CONFIG, "anna")
    train(model, batch)
    anna = model(**batch).logits.detach()
    model.save_pretrained(tmp_path)
    model.add_adapter("ben.2", TCurConfig(rank=2, selection="random"))
    assert model.active_adapter == "ben.2"
    torch.testing.assert_close(model(**batch).logits, base)
    train(model, batch, steps=5)
    ben = model(**batch).logits.detach()
    model.set_adapter("anna")
    torch.testing.assert_close(model(**batch).logits, anna)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, base)
    model.load_adapter(tmp_path, "again")
    torch.testing.assert_close(model(**batch).logits, anna, atol=1e-5, rtol=1e-4)
    model.set_adapter("ben.2")
    torch.testing.assert_close(model(**batch).logits, ben)
    model.delete_adapter("ben.2")
    assert set(model.tcur_config) == {"anna", "again"}
    torch.testing.assert_close(model(**batch).logits, base)
    with pytest.raises(UsageError, match="loaded: anna, again"):
        model.set_adapter("ben.2")


def test_merging_and_unmerging(bert, batch):
    weights = {name: value.clone() for name, value in bert.state_dict().items()}
    model = get_tcur_model(bert, CONFIG)
    train(model, batch)
    adapted = model(**batch).logits.detach()
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, adapted, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="merged"):
        model.set_adapter("default")
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).logits, adapted, atol=0, rtol=0)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**batch).logits, adapted, atol=1e-5, rtol=1e-4)
    assert set(plain.state_dict()) == set(weights)


def test_the_trainer_of_transformers_trains_it(bert, batch, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_tcur_model(bert, CONFIG)
    start = model(**batch).loss.item()
    samples = [{name: value[n] for name, value in batch.items()} for n in range(6)] * 4
    options = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, options, train_dataset=samples).train()
    assert model.eval()(**batch).loss.item() < start - 0.02


def test_an_adapter_of_another_base_is_refused_and_the_model_stays(bert, tmp_path):
    other = copy.deepcopy(bert)
    get_tcur_model(bert, CONFIG).save_pretrained(tmp_path)
    with torch.no_grad():
        other.classifier.bias += 1
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(BaseMismatchError, match=r"sha256:.*sha256:"):
        TCurModel.from_pretrained(other, tmp_path)
    assert [name for name, _ in other.named_modules()] == names
    assert all(value.requires_grad for value in other.parameters())


def test_altered_files_are_refused(bert, tmp_path):
    base = copy.deepcopy(bert)
    get_tcur_model(bert, CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "adapter.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError):
        TCurModel.from_pretrained(base, tmp_path)


def test_an_unknown_setting_is_named(bert, tmp_path):
    base = copy.deepcopy(bert)
    get_tcur_model(bert, CONFIG).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tcur_config.json").read_text())
    (tmp_path / "tcur_config.json").write_text(json.dumps({**settings, "rnk": 3}))
    with pytest.raises(ConfigError, match="'rnk'"):
        TCurModel.from_pretrained(base, tmp_path)


def test_any_module_can_be_adapted():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    expected = model(x).detach()
    adapted = get_tcur_model(model, TCurConfig(rank=2, selection="leverage"))
    torch.testing.assert_close(adapted(x), expected)
    adapted(x).sum().backward()
    assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)


def test_a_refused_configuration_leaves_the_model_as_it_was(bert):
    names = [name for name, _ in bert.named_modules()]
    for config in (TCurConfig(rank=99, selection="norm"), TCurConfig(rank=2)):
        with pytest.raises(ConfigError):
            get_tcur_model(bert, config)
    assert all(value.requires_grad for value in bert.parameters())
    assert [name for name, _ in bert.named_modules()] == names


def test_a_model_is_adapted_by_one_wrapper(bert):
    model = get_tcur_model(bert, CONFIG)
    for again in (bert, model):
        with pytest.raises(UsageError, match="adapted layers already"):
            get_tcur_model(again, CONFIG)
    get_tcur_model(model.unload(), CONFIG)


class Gated(nn.Module):
    """Layers with the names that a dictionary's methods have, as gates are called."""

    def __init__(self):
        super().__init__()
        self.update, self.keys = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.keys(torch.tanh(self.update(x)))


def test_names_of_adapters_and_groups(tmp_path):
    """Whatever they are, every core is one parameter of the model and comes back."""
    model = nn.Sequential(Gated(), Gated())
    config = TCurConfig(rank=2, selection="norm")
    adapted = get_tcur_model(copy.deepcopy(model), config, "v1.0")
    for name in ("v1-0", "eval", "update"):
        adapted.add_adapter(name, config)
    cores = [name for name, _ in adapted.named_parameters() if name.endswith(".core")]
    assert len(cores) == 8
    assert sum(value.requires_grad for value in adapted.parameters()) == 2
    adapted.load_state_dict(adapted.state_dict())
    adapted.delete_adapter("v1.0")
    adapted.set_adapter("v1-0")
    assert sum(value.requires_grad for value in adapted.parameters()) == 2
    adapted.save_pretrained(tmp_path)
    TCurModel.from_pretrained(model, tmp_path)
    with pytest.raises(UsageError, match="needs a name"):
        adapted.add_adapter("", config)


def test_unloading_a_merged_model_gives_the_base_bit_by_bit(bert):
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    model = get_tcur_model(bert, CONFIG)
    for value in model.injection.parameters():
        nn.init.normal_(value)
    model.merge_adapter()
    plain = model.unload()
    assert set(plain.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_deleting_the_adapter_that_is_disabled(bert, batch):
    base = bert(**batch).logits
    model = get_tcur_model(bert, CONFIG)
    with model.disable_adapter():
        with model.disable_adapter():
            model.delete_adapter("default")
        assert model.active_adapter is None
    assert model.active_adapter is None
    assert torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"coupling": "all", "transform": "dct", "grouping": "projection"}, "coupling"),
        ({"alpha": 2.0}, "alpha is 1.0"),
        ({"frame": "raw"}, "frame is orthonormal"),
        ({"modules_to_save": ["classifier"]}, "modules are not those"),
        ({"targets": "*.query"}, "groups"),
    ],
)
def test_settings_that_are_not_the_adapters_are_refused_and_the_active_one_stays(
    bert, tmp_path, change, text
):
    model = get_tcur_model(bert, CONFIG, "first")
    model.save_pretrained(tmp_path)
    path = tmp_path / "tcur_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BaseMismatchError, match=text):
        model.load_adapter(tmp_path, "second")
    assert model.active_adapter == "first"
    assert list(model.tcur_config) == ["first"]
    assert [value.requires_grad for value in model.injection.parameters()] == [True] * 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 2.5),
        ("rank", True),
        ("rank", "3"),
        ("seed", -1),
        ("seed", None),
        ("alpha", "1"),
        ("targets", 5),
        ("selection", ["norm"]),
        ("modules_to_save", "head"),
        ("modules_to_save", [1]),
        ("layers_to_transform", "1"),
        ("layers_to_transform", 1.0),
        ("targets", [1]),
        ("targets", []),
        ("layers_to_transform", [0.5]),
        ("rank_pattern", [["*", 2]]),
        ("rank_pattern", {"*": 1.5}),
    ],
)
def test_a_setting_of_another_type_is_named(bert, tmp_path, name, value):
    get_tcur_model(bert, CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "tcur_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert name in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", [list, tuple, set])
def test_a_user_of_peft_needs_no_manual(bert, batch, capsys, tmp_path, kind):
    """peft's own wrapper, called the same way, adapts the same modules and prints the same."""
    from peft import LoraConfig, get_peft_model

    names = {"target_modules": ["query", "attention.output.dense"], "modules_to_save": ["classifier"]}
    other = get_peft_model(copy.deepcopy(bert), LoraConfig(r=4, layers_to_transform=1, **names))
    config = TCurConfig(
        rank=4, selection="norm", targets=kind(names["target_modules"]), layers_to_transform=1,
        modules_to_save=names["modules_to_save"],
    )  # fmt: skip
    model = get_tcur_model(bert, config)
    adapted = {name for group in model.injection.targets.groups for name in group.modules}
    theirs = {name for name, _ in other.named_modules() if name.endswith(".lora_A")}
    assert len(theirs) == 2
    assert adapted == {n.removesuffix(".lora_A").removeprefix("base_model.model.") for n in theirs}
    model.print_trainable_parameters()
    own = capsys.readouterr().out
    other.print_trainable_parameters()
    theirs = capsys.readouterr().out
    assert re.sub(r"[\d,.]+", "N", own) == re.sub(r"[\d,.]+", "N", theirs)
    trained = 2 * 4 * 4 + 3 * 32 + 3
    assert own.startswith(f"trainable params: {trained:,} || ")
    assert model.get_nb_trainable_parameters()[0] == trained
    assert model.get_base_model() is bert
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path / "tcur_config.json") == config == model.tcur_config["default"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_directions_are_checked_before_any_work(bert, value):
    config = TCurConfig(rank=2)
    names = [name for group in find_targets(bert, config).groups for name in group.modules]
    directions = {name: torch.ones(bert.get_submodule(name).weight.shape) for name in names}
    bad = {**directions, names[3]: torch.full((32, 32), value)}
    with pytest.raises(BadInputError, match=f"{names[3]}.*NaN"):
        get_tcur_model(bert, config, directions=bad)
    with pytest.raises(ConfigError, match=f"{names[3]}.*expected .32, 32."):
        get_tcur_model(bert, config, directions={**directions, names[3]: torch.ones(3, 3)})
    assert all(parameter.requires_grad for parameter in bert.parameters())


def test_accumulated_gradients_are_those_of_the_whole_batch(bert, batch):
    """What `transformers.Trainer` does with ``gradient_accumulation_steps``."""
    model = get_tcur_model(bert, CONFIG)
    model(**batch).loss.backward()
    expected = [value.grad.clone() for value in model.injection.parameters()]
    for value in model.injection.parameters():
        value.grad = None
    for part in (slice(0, 3), slice(3, 6)):
        (model(**{name: value[part] for name, value in batch.items()}).loss / 2).backward()
    for value, whole in zip(model.injection.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_model_that_was_cast_is_saved(bert, batch, tmp_path, kind):
    base = copy.deepcopy(bert)
    model = get_tcur_model(bert, TCurConfig(rank=2, selection="norm", grouping="shape", coupling="all"))
    train(model, batch, steps=3)
    model.to(kind).save_pretrained(tmp_path)
    loaded = TCurModel.from_pretrained(base, tmp_path)
    for one, other in zip(model.injection.parameters(), loaded.injection.parameters(), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-4, atol=1e-5)


def test_the_trainer_with_checkpoints_accumulation_autocast_and_a_second_process(bert, batch, tmp_path):
    """Each of them alone has broken adapters elsewhere; a run that is taken up goes on where it was."""
    from transformers import Trainer, TrainingArguments

    model = get_tcur_model(bert, TCurConfig(rank=4, selection="norm", grouping="shape", coupling="all"))
    start = model(**batch).loss.item()
    samples = [{name: value[n] for name, value in batch.items()} for n in range(6)] * 4
    options = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        learning_rate=0.05,
        report_to=[],
        save_strategy="epoch",
        eval_strategy="epoch",
        label_names=["labels"],
        load_best_model_at_end=True,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        dataloader_num_workers=1,
        gradient_accumulation_steps=2,
        bf16=True,
    )
    model.activation_checkpointing_enable()
    trainer = Trainer(model, options, train_dataset=samples, eval_dataset=samples[:6])
    trainer.train()
    trained = model.eval()(**batch).loss.item()
    assert trained < start - 0.02
    cores = [value.clone() for value in model.injection.parameters()]
    for value in model.injection.parameters():
        nn.init.zeros_(value)
    Trainer(model, options, train_dataset=samples, eval_dataset=samples[:6]).train(
        resume_from_checkpoint=True
    )
    for value, core in zip(model.injection.parameters(), cores, strict=True):
        assert torch.equal(value, core)


def test_a_directory_that_cannot_be_made(bert, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DiskError, match="file"):
        get_tcur_model(bert, CONFIG).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("quantised", [False, True])
def test_a_move_reaches_what_is_not_in_the_model_now(quantised):
    """The base's own modules, those of other adapters, and weights that are merged; seen by a cast."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    if quantised:
        quantize_linears(plain, keep=("4",))
    config = TCurConfig(rank=2, selection="norm", targets="0,2", modules_to_save=("4",))
    model = get_tcur_model(plain, config, "first")
    model.add_adapter("second", config)
    for value in (*model.injection.parameters(), *model.injection.adapters["first"].parameters()):
        nn.init.normal_(value)
    x, expected = torch.randn(5, 6), {}
    with torch.no_grad():
        for name in ("first", "second"):
            model.set_adapter(name)
            expected[name] = model(x)
        with model.disable_adapter():
            expected["base"] = model(x)
        model.double()
        for name in ("first", "second"):
            model.set_adapter(name)
            torch.testing.assert_close(model(x.double()).float(), expected[name], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(x.double()).float(), expected["base"], rtol=1e-4, atol=1e-5)
        model.merge_adapter(dequantize=True)
        model.float()
        torch.testing.assert_close(model(x), expected["second"], rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected["second"], rtol=1e-4, atol=1e-5)
