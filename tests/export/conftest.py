"""Exported bundles, made once for all files of this room, and what the tests do with them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edge_tcur.method.adapted import DEFAULT, inject
from edge_tcur.method.config import PRESETS
from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, train
from edge_tcur.training.evaluate import apply_adapter
from edge_tcur_export.bundle import export_run
from edge_tcur_export.lowering import import_executorch
from edge_tcur_export.parity import TOLERANCES
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.settings import TARGETS, ExportSettings, ProgramSettings
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import STEP_VARIANTS, open_bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import SKETCH_PARTS, Factors, SketchFactors, factor_parts

STEPS = {"step", *STEP_VARIANTS}
VARIANTS = {"recompute": True, "last_blocks": 1}


@dataclass(frozen=True)
class Exported:
    """A run, the report of its export and the opened bundle."""

    run: object
    report: object
    bundle: object

    def base(self):
        """The base, loaded again."""
        config = self.run.config
        options = {"max_length": config.max_length}
        return load_base(config.base, find_task(config.task), self.run.labels, options)

    def graph(self, role):
        """A graph without the base."""
        return onnx.load(self.bundle.graph(role), load_external_data=False)

    def session(self):
        """The inference graph, as any ONNX Runtime opens it."""
        return onnxruntime.InferenceSession(self.bundle.graph("infer"), providers=["CPUExecutionProvider"])


def export(config, root, targets=TARGETS, programs=None, **more):
    run = train(config, root / "run").run
    settings = ExportSettings(targets, programs=programs or ProgramSettings(), **more)
    report = export_run(run, root / "bundle", settings)
    return Exported(run, report, open_bundle(root / "bundle"))


@pytest.fixture(scope="session")
def export_vit(vit_dir, digits_npz, tmp_path_factory):
    """Trains and exports the Vision Transformer with settings of the method."""

    def call(name, settings, targets=("onnx", "step"), **more):
        settings = {"task": "image-classification", "rank": 2, "epochs": 2, "threads": 1, **settings}
        config = TrainConfig(str(vit_dir), str(digits_npz), **settings)
        return export(config, tmp_path_factory.mktemp(name), targets, **more)

    return call


@pytest.fixture(scope="session")
def vit(export_vit):
    return export_vit("vit", {}, TARGETS)


@pytest.fixture(scope="session")
def bert(bert_dir, texts_csv, tmp_path_factory):
    config = TrainConfig(str(bert_dir), str(texts_csv), rank=2, epochs=4, batch_size=4, threads=1)
    return export(config, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def words(bert_dir, texts_csv, tmp_path_factory):
    """`bert` after one epoch, with the step graph's variants."""
    config = TrainConfig(str(bert_dir), str(texts_csv), rank=2, epochs=1, batch_size=4, threads=1)
    return export(config, tmp_path_factory.mktemp("words"), **VARIANTS)


@pytest.fixture(scope="session")
def paper(export_vit):
    """The paper's preset, with the step graph's variants."""
    return export_vit("paper", {**PRESETS["paper"], "targets": "*.k_proj,*.v_proj,*.fc2"}, **VARIANTS)


def without_torch(code, *arguments):
    """Runs `code` where torch cannot be imported; its last line, as JSON."""
    code = f"import sys; sys.modules['torch'] = None\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def inputs_of(exported, samples, length=None):
    generator = np.random.default_rng(samples)
    if "pixel_values" in exported.bundle.manifest.inputs:
        return {"pixel_values": generator.normal(size=(samples, 1, 8, 8)).astype(np.float32)}
    mask = np.ones((samples, length), np.int64)
    mask[1:, length // 2 + 1 :] = 0
    return {"input_ids": generator.integers(2, 17, (samples, length)), "attention_mask": mask}


def random_factors(exported, rank, seed):
    """Factors of another rank, other rows and columns (or sketches) than the run's."""
    generator = np.random.default_rng(seed)
    manifest, result = exported.bundle.manifest, {}

    def indices(size, blocks):
        return np.stack([np.sort(generator.permutation(size)[:rank]) for _ in range(blocks)]).astype(np.int32)

    for name, group in manifest.groups.items():
        n3 = len(group.parameters)
        core = (3 * generator.normal(size=(n3, rank, rank))).astype(np.float32)
        if set(manifest.parts) & set(SKETCH_PARTS):
            shapes = ((n3, group.n1, rank), (n3, rank, group.n2))
            left, right = (generator.integers(-1, 2, shape).astype(np.int8) for shape in shapes)
            result[name] = SketchFactors.pack(core, left, right)
        else:
            rows, cols = (indices(size, group.blocks) for size in (group.n1, group.n2))
            scale = np.float32(1 if group.blocks < n3 else 4)  # uncoupled weights get less of an update
            result[name] = Factors(scale * core, rows, cols)
    return result


def random_extras(exported, seed):
    """Values of the head and of modules trained in full."""
    generator = np.random.default_rng(seed)
    extras = exported.bundle.manifest.extras
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in extras.items()}


def torch_outputs(base, inputs):
    with torch.no_grad():
        return base.model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()


def outputs_under(exported, adapter, inputs):
    """torch's outputs of the base under an adapter."""
    base = exported.base()
    apply_adapter(base, exported.run, adapter)
    with torch.no_grad():
        return base.model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


PERSONALIZE = """
import json
from pathlib import Path
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.adapter import write_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import blank_adapter, bundle_adapter, personalize
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings
bundle = open_bundle(Path(sys.argv[1]))
data = load_dataset(Path(sys.argv[2]), "image", image_size=(8, 8), channels=1)
rate = float(sys.argv[4])
settings = PersonalizeSettings(epochs=6, engine="ort-step", threads=1, holdout=0.2,
                               optimizer=AdamWSettings(learning_rate=rate))
start = {"base": blank_adapter, "adapter": bundle_adapter}[sys.argv[5]](bundle)
result = personalize(bundle, data, settings, start=start)
write_adapter(Path(sys.argv[3]), result.adapter)
print(json.dumps({"losses": result.losses, "engine": result.engine, "after": result.accuracy_after,
                  "digests": [result.base_digest_before, result.base_digest_after]}))
"""


def check_personalisation(exported, data, path, rate, start):
    """A device fine-tunes the factors alone, and what it writes answers in the graph as in torch."""
    bundle = exported.bundle
    files = {part.name: digest_file(part) for part in bundle.root.iterdir()}
    result = without_torch(PERSONALIZE, bundle.root, data, path, rate, start)
    assert result["engine"] == "ort-step"
    assert np.mean(result["losses"][-3:]) < np.mean(result["losses"][:3])
    assert result["digests"][0] == result["digests"][1]
    assert files == {part.name: digest_file(part) for part in bundle.root.iterdir()}
    personal, own = read_adapter(path), exported.run.adapter()
    assert set(personal.factors) == set(own.factors)
    for name, factors in personal.factors.items():
        for part, value in vars(factors).items():
            assert np.array_equal(value, getattr(own.factors[name], part)) == (part != "core"), (name, part)
    assert set(personal.extras) == set(own.extras)
    assert not any(np.array_equal(value, own.extras[name]) for name, value in personal.extras.items())
    inputs = inputs_of(exported, 5)
    found = exported.session().run(["logits"], {**inputs, **build_feeds(bundle.manifest, personal)})[0]
    close(found, outputs_under(exported, personal, inputs))


def check_parity(exported):
    """Every graph agrees with torch."""
    parity = exported.report.parity
    assert set(parity) == {"infer", *(STEPS | {"train"}) & set(exported.bundle.manifest.graphs)}
    for role in set(parity) - {"infer"}:
        gives = {value.name for value in exported.graph(role).graph.output}
        # Of a large vocabulary a step gives no outputs (`vocabulary.py`).
        assert set(parity[role]) == set(TOLERANCES) - ({"outputs"} if "logits" not in gives else set())
    for quantities in parity.values():
        assert all(0 <= error <= TOLERANCES[quantity] for quantity, error in quantities.items())


def check_manifest(exported, groups, extras=frozenset()):
    """The manifest says what is fed: of each group its weights, blocks and rank, and the extras."""
    manifest, method = exported.bundle.manifest, exported.run.config.method()
    assert (manifest.coupling, manifest.transform) == (method.coupling, method.domain)
    assert manifest.parts == factor_parts(method.frame)
    found = {
        name: (len(group.parameters), group.blocks, group.rank) for name, group in manifest.groups.items()
    }
    assert found == groups
    header = exported.run.adapter().header
    assert {name: spec.parameters for name, spec in header.groups.items()} == {
        name: group.parameters for name, group in manifest.groups.items()
    }
    assert set(manifest.extras) == set(extras)
    assert (manifest.base_extras is not None) == bool(extras)


def check_answers(exported):
    """Nothing fed is the base, the adapter fed is the adapter."""
    inputs = inputs_of(exported, 3)
    session, base = exported.session(), exported.base()
    plain = torch_outputs(base, inputs)
    close(session.run(["logits"], inputs)[0], plain)
    assert {value.name for value in session.get_inputs()} == set(inputs)  # the rest has defaults
    adapter = exported.run.adapter()
    found = session.run(["logits"], {**inputs, **build_feeds(exported.bundle.manifest, adapter)})[0]
    expected = outputs_under(exported, adapter, inputs)
    assert np.abs(expected - plain).max() > 1e-4
    close(found, expected)


def check_other_factors(exported, rank, samples):
    """Factors of another rank than the run's, and other rows, columns or sketches, may be fed."""
    base, inputs = exported.base(), inputs_of(exported, samples)
    factors, extras = random_factors(exported, rank, seed=rank), random_extras(exported, seed=rank)
    feeds = {f"{name}.{part}": array for name, own in factors.items() for part, array in own.feeds().items()}
    found = exported.session().run(["logits"], {**inputs, **feeds, **extras})[0]
    method = exported.run.config.method()
    plain = torch_outputs(base, inputs)
    injection = inject(base.model, method, keep=base.head, factors=factors)
    with torch.no_grad():
        for name, parameter in (injection.adapters[DEFAULT].saved | base.head_parameters()).items():
            parameter.copy_(torch.from_numpy(extras[name]))
    expected = torch_outputs(base, inputs)
    assert np.abs(expected - plain).max() > 1e-3
    close(found, expected)


def read_ptd(raw):
    """name -> array of the bytes of a .ptd file, by ExecuTorch's own reader."""
    import_executorch()
    with quiet_torch():
        from executorch.exir._serialize._cord import Cord
        from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

        payload = FlatTensorSerializer().deserialize(Cord(raw))
    kinds = {6: np.float32, 3: np.int32, 4: np.int64, 11: np.bool_}
    return {
        name: np.frombuffer(payload.buffers[entry.buffer_index], kinds[int(entry.tensor_layout.scalar_type)])
        .reshape(entry.tensor_layout.sizes)
        for name, entry in payload.named_data.items()
    }  # fmt: skip


@pytest.fixture(scope="session")
def kit():
    """The functions of this file, for the tests."""
    return SimpleNamespace(
        export=export,
        without_torch=without_torch,
        inputs_of=inputs_of,
        random_factors=random_factors,
        random_extras=random_extras,
        torch_outputs=torch_outputs,
        outputs_under=outputs_under,
        close=close,
        check_parity=check_parity,
        check_manifest=check_manifest,
        check_answers=check_answers,
        check_other_factors=check_other_factors,
        check_personalisation=check_personalisation,
        read_ptd=read_ptd,
    )


@pytest.fixture
def train_module(tmp_path, monkeypatch):
    """Trains a run on a class of a module's source, with pictures of 4 x 4 in three classes."""
    images = np.random.default_rng(0).integers(0, 255, (30, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.arange(30) % 3)
    monkeypatch.chdir(tmp_path)

    def call(source, module, name, **settings):
        (tmp_path / f"{module}.py").write_text(source)
        usual = {"task": "image-classification", "rank": 2, "epochs": 1, "threads": 1}
        config = TrainConfig(f"{module}:{name}", "pictures.npz", **usual, **settings)
        return train(config, tmp_path / "run").run

    return call
