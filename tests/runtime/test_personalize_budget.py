"""The budget of a run, and what the command leaves in the store."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime import budget as budget_module
from edge_tcur_runtime import fitting as fitting_module
from edge_tcur_runtime import personalize as module
from edge_tcur_runtime import trainer as trainer_module
from edge_tcur_runtime.budget import Budget, Memory
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import (
    BudgetError,
)
from edge_tcur_runtime.formats.bundle import BASE_FILE
from edge_tcur_runtime.personalize import personalize
from short_runs import ENGINE, INSTALLED, make_trainer, quick

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1, USER = DATA / "bundle-v1", DATA / "sketch-v1", DATA / "user.npz"


MIB = 2**20


pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")


# --- the budget ------------------------------------------------------------------------------------


def crossing(monkeypatch, passes, limit):
    """Lets the memory that is read cross `limit` after `passes` engine passes."""
    state = {"passes": 0}
    real = open_engine

    def opened(*arguments, **options):
        engine = real(*arguments, **options)
        step = engine.step

        def counted(*batch):
            state["passes"] += 1
            return step(*batch)

        engine.step = counted
        return engine

    def memory():
        peak = limit + 1 if state["passes"] >= passes else limit - 20 * MIB
        return Memory(peak, limit // 2, 0, 0)

    monkeypatch.setattr(module, "open_engine", opened)
    for part in (module, trainer_module, fitting_module):
        monkeypatch.setattr(part, "read_memory", memory)
    monkeypatch.setattr(budget_module, "read_memory", memory)
    return state


@pytest.mark.parametrize(
    ("passes", "what"),
    [
        (1, "by a step of one or two samples"),
        (3, "by scoring held-out samples"),
        (6, "by a training step"),
        (20, "by a training step"),
    ],
)
def test_a_budget_that_is_crossed_on_the_way_stops_the_run(bundle, user, monkeypatch, passes, what):
    limit = 400 * MIB
    state = crossing(monkeypatch, passes, limit)
    with pytest.raises(BudgetError, match=f"was exceeded {what}"):
        personalize(bundle, user, quick(budget=limit))
    assert state["passes"] == passes  # it stopped there and then


def test_a_budget_below_what_the_process_holds_is_refused_before_anything_is_loaded(
    bundle, user, monkeypatch
):
    monkeypatch.setattr(module, "open_engine", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(module, "digest_file", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(module, "read_memory", lambda: Memory(90 * MIB, 50 * MIB, 0, 0))
    size = bundle.manifest.files[BASE_FILE].size
    with pytest.raises(BudgetError, match="the base and the libraries needs about 90") as caught:
        personalize(bundle, user, quick(budget=64 * MIB))
    # The peak so far is the highest; 1/64 more for what differs from one process to the next.
    assert caught.value.hint == "give at least --budget 92MiB"
    monkeypatch.setattr(module, "read_memory", lambda: Memory(51 * MIB, 50 * MIB, 0, 0))
    needed = 50 * MIB + size + module._LIBRARIES_BYTES
    with pytest.raises(BudgetError) as caught:
        personalize(bundle, user, quick(budget=64 * MIB))
    assert caught.value.hint == f"give at least --budget {-(-needed * 65 // 64 // MIB)}MiB"


def test_the_budget_that_is_named_before_loading_is_not_refused_by_a_process_that_holds_a_little_more(
    bundle, user, monkeypatch
):
    """The need of one process is just below a whole MiB, that of the next one just above it."""
    size = bundle.manifest.files[BASE_FILE].size
    held = 70 * MIB - size - module._LIBRARIES_BYTES
    monkeypatch.setattr(module, "read_memory", lambda: Memory(held, held, 0, 0))
    with pytest.raises(BudgetError) as caught:
        personalize(bundle, user, quick(budget=MIB))
    named = int(re.fullmatch(r"give at least --budget (\d+)MiB", caught.value.hint).group(1)) * MIB
    monkeypatch.setattr(module, "read_memory", lambda: Memory(held, held + MIB // 2, 0, 0))
    module._refuse_early(bundle, user, Budget(named))


def readings(monkeypatch, *pairs):
    """Makes memory read as these (peak, resident) pairs, in MiB, one a pass."""
    rest = [Memory(peak * MIB, resident * MIB, 0, 0) for peak, resident in pairs]
    monkeypatch.setattr(trainer_module, "read_memory", lambda: rest.pop(0))
    monkeypatch.setattr(budget_module, "read_memory", lambda: rest[0])


@pytest.mark.parametrize(
    ("one", "two", "limit", "expected"),
    [
        ((100, 90), (105, 95), 400, 16),
        ((100, 90), (105, 95), 150, 8),
        ((100, 90), (105, 95), 109, 2),  # a 32nd is left free
        ((100, 90), (105, 95), 106, 1),
        ((100, 40), (100, 45), 150, 8),  # a peak of loading hides what a step adds
        ((100, 40), (100, 45), 104, 2),
        ((100, 90), (100, 90), 104, 16),
    ],
)
def test_the_micro_batch_fits_the_budget(bundle, user, monkeypatch, one, two, limit, expected):
    trainer = make_trainer(bundle, user, quick(), budget=limit * MIB)
    readings(monkeypatch, one, two)
    trainer.calibrate()
    assert trainer.micro_batch == expected


def test_a_budget_that_the_first_steps_nearly_fill_is_refused_before_training(bundle, user, monkeypatch):
    """A run takes a little more than they do: what is accepted ends under its budget."""
    limit = 400 * MIB
    state = crossing(monkeypatch, 100, limit)
    for part in (module, fitting_module, trainer_module, budget_module):
        monkeypatch.setattr(part, "read_memory", lambda: Memory(limit - 4 * MIB, limit // 2, 0, 0))
    with pytest.raises(
        BudgetError, match="cannot be met: by its first steps training takes about 396"
    ) as caught:
        personalize(bundle, user, quick(budget=limit))
    assert caught.value.hint == "give at least --budget 412MiB"
    assert state["passes"] == 2
    assert personalize(bundle, user, quick(budget=412 * MIB, epochs=1)).predicted_peak_bytes == 396 * MIB


def test_without_a_budget_nothing_is_measured_and_the_whole_batch_is_taken(bundle, user, monkeypatch):
    trainer = make_trainer(bundle, user, quick())
    monkeypatch.setattr(trainer, "_engine", None)
    trainer.calibrate()
    assert trainer.micro_batch == 16


def test_a_budget_that_is_kept_changes_the_micro_batch_and_not_the_adapter(bundle, user, monkeypatch):
    free = personalize(bundle, user, quick())
    monkeypatch.setattr(trainer_module, "choose_micro_batch", lambda *_: 4)
    tight = personalize(bundle, user, quick(budget=2**40))
    assert (free.micro_batch, tight.micro_batch) == (16, 4)
    assert (free.budget_bytes, tight.budget_bytes) == (None, 2**40)
    for group, part in tight.adapter.factors.items():
        np.testing.assert_allclose(part.core, free.adapter.factors[group].core, rtol=1e-3, atol=1e-3)


# --- the command and the store ----------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, capsys):
    """Runs `edge-tcur-device personalize` in this process; returns exit code, JSON, and the store's files."""
    store = tmp_path / "store"

    def call(*arguments, data=USER):
        with pytest.raises(SystemExit) as caught:
            run(device, ["personalize", str(V1), "--data", str(data), "--store", str(store), "--threads", "1",
                         "--engine", "ort-step", "--json", *map(str, arguments)])  # fmt: skip
        found = {path.name: path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
        return caught.value.code, json.loads(capsys.readouterr().out), found

    return call


def test_a_better_adapter_is_installed_and_becomes_the_start_of_the_next_run(cli):
    code, first, store = cli("--epochs", "8")
    assert code == 0
    assert f"{first['installed'].removeprefix('sha256:')}.safetensors" in store
    code, second, _ = cli("--epochs", "8")
    assert second["accuracy_before"] == first["accuracy_after"]
    assert second["losses"][0] < first["losses"][0]


@pytest.mark.parametrize("earlier", [False, True])
def test_an_adapter_that_is_not_better_leaves_the_store_as_it_was(cli, earlier):
    if earlier:
        cli("--epochs", "4")
    _, _, before = cli("--learning-rate", "1e-30", "--epochs", "1")
    code, result, after = cli("--learning-rate", "1e-30", "--epochs", "1")
    assert code == 0
    assert result["better"] is False
    assert result["installed"] is None
    assert after == before
    assert bool(after) is earlier


@pytest.mark.parametrize("passes", [1, 3, 20])
def test_a_budget_crossed_in_the_middle_leaves_the_store_as_it_was(cli, monkeypatch, passes):
    _, _, before = cli("--epochs", "2")
    crossing(monkeypatch, passes, 400 * MIB)
    code, result, after = cli("--budget", "400MiB")
    assert code == 5
    assert result["error"]["code"] == "budget"
    assert {name: content for name, content in after.items() if not name.startswith("checkpoint-")} == before


def test_divergence_leaves_the_store_as_it_was(cli, monkeypatch):
    real = open_engine

    def opened(*arguments, **options):
        engine = real(*arguments, **options)
        step = engine.step
        engine.step = lambda *batch: replace(step(*batch), loss=float("inf"))
        return engine

    monkeypatch.setattr(module, "open_engine", opened)
    code, result, store = cli()
    assert code == 3
    assert result["error"]["where"] == "learning_rate"
    assert "training diverged: the loss is inf" in result["error"]["message"]
    assert store == {}


COMMAND = """
import sys
sys.modules["torch"] = None
from edge_tcur_runtime.cli import main
main()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("name", ENGINE)
def test_a_budget_too_small_is_refused_and_the_one_that_is_named_will_do(tmp_path, name):
    """In a process of its own; the estimate before loading and the measured need may each speak once."""
    store, budget, named = tmp_path / "store", "1MiB", []
    while True:
        arguments = [str(V1), "--data", str(USER), "--store", str(store), "--engine", name, "--epochs", "1",
                     "--threads", "1", "--holdout", "0", "--budget", budget, "--json"]  # fmt: skip
        command = [sys.executable, "-c", COMMAND, "personalize", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = json.loads(done.stdout)
        if done.returncode == 0:
            break
        assert done.returncode == 5, done.stderr
        assert not store.exists()
        budget = re.fullmatch(r"give at least --budget (\d+MiB)", result["error"]["hint"]).group(1)
        named.append(int(budget.removesuffix("MiB")))
    assert 1 <= len(named) <= 2
    assert named == sorted(named)
    assert 0 < result["peak_rss_bytes"] <= named[-1] * MIB == result["budget_bytes"]
