"""`TCurModel`: the names of peft, bit-equal files, plain loops and `transformers.Trainer`."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.method.config import TCurConfig, preset
from edge_tcur.tcur_model import TCurModel, collect_gradients, get_tcur_model, rehearsal
from edge_tcur_runtime.errors import BaseMismatchError, ConfigError, IntegrityError, UsageError
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
