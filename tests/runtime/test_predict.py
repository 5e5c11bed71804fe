"""`Model`: one base in memory, adapters swapped under running predictions, never a mixture of two."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.engines import session
from edge_tcur_runtime.errors import (
    BaseMismatchError,
    DataError,
    FileFormatError,
    IncompatibleError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter, read_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.factors import Factors, SketchFactors
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import blank_adapter, bundle_adapter
from edge_tcur_runtime.predict import Model

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1 = DATA / "bundle-v1", DATA / "sketch-v1"

pytestmark = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")


@pytest.fixture(scope="module")
def canary():
    return read_canary(V1)


def read_canary(root):
    """(inputs, base's outputs, adapter's outputs) that the exporter computed with torch."""
    tensors = load_file(root / "canary.safetensors")
    inputs = {name.removeprefix("input."): tensors[name] for name in tensors if name.startswith("input.")}
    return inputs, tensors["output.base"], tensors["output.adapter"]


@pytest.fixture
def model(bundle):
    return Model(bundle, threads=1)


def personal(bundle, seed=0, scale=0.05):
    """Another adapter of the bundle's base."""
    own, generator = bundle_adapter(bundle), np.random.default_rng(seed)
    factors = {
        group: part.with_core((part.core + generator.normal(0, scale, part.core.shape)).astype(np.float32))
        for group, part in own.factors.items()
    }
    return Adapter(own.header, factors, own.extras)


# --- outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [V1, SKETCH_V1], ids=["indices", "sketch"])
def test_the_canary_answers_as_torch_did(root):
    bundle, (inputs, base, adapted) = open_bundle(root), read_canary(root)
    model = Model(bundle, threads=1)
    np.testing.assert_allclose(model.outputs(inputs), base, rtol=1e-4, atol=1e-5)
    model.attach(bundle_adapter(bundle))
    np.testing.assert_allclose(model.outputs(inputs), adapted, rtol=1e-4, atol=1e-5)
    assert np.abs(base - adapted).max() > 0.1  # the two can be told apart


def test_packed_weights_answer_the_same_and_are_held_where_they_are_asked_for(bundle, canary, monkeypatch):
    entries = []
    real = session.session_options

    def noted(*arguments, **options):
        made = real(*arguments, **options)
        entries.append(made.get_session_config_entry("session.disable_prepacking"))
        return made

    monkeypatch.setattr(session, "session_options", noted)
    packed, plain = (Model(bundle, threads=1, prepack=choice) for choice in (True, False))
    assert entries == ["0", "1"]
    for adapter in (None, bundle_adapter(bundle)):
        packed.attach(adapter)
        plain.attach(adapter)
        expected = plain.outputs(canary[0])
        np.testing.assert_allclose(packed.outputs(canary[0]), expected, rtol=1e-5, atol=1e-6)


def test_the_adapter_file_of_version_1_answers_as_torch_did(model, canary):
    model.attach(read_adapter(DATA / "adapter-v1.safetensors"))
    np.testing.assert_allclose(model.outputs(canary[0]), canary[2], rtol=1e-4, atol=1e-5)


def test_swapping_there_and_back_gives_each_ones_outputs_exactly(bundle, canary):
    adapters = {"base": None, "bundle": bundle_adapter(bundle), "personal": personal(bundle)}
    fresh = {}
    for name, adapter in adapters.items():
        single = Model(bundle, threads=1)
        single.attach(adapter)
        fresh[name] = single.outputs(canary[0])
    model = Model(bundle, threads=1)
    for name in ("base", "bundle", "personal", "base", "personal", "bundle", "bundle", "base"):
        model.attach(adapters[name])
        np.testing.assert_array_equal(model.outputs(canary[0]), fresh[name])
    assert len({value.tobytes() for value in fresh.values()}) == 3


def padded(indices, size):
    """Two more indices in each block."""
    more = [np.append(block, np.setdiff1d(np.arange(size), block)[:2]) for block in indices]
    return np.sort(more).astype(np.int32)


def test_an_adapter_of_another_rank_runs_on_the_same_graph(model, bundle, canary):
    """A core padded with rows and columns of zeros is the same update."""
    own = bundle_adapter(bundle)
    factors = {}
    for group, part in own.factors.items():
        spec = own.header.groups[group]
        rows, cols = padded(part.rows, spec.n1), padded(part.cols, spec.n2)
        core = np.zeros((len(part.core), 5, 5), np.float32)
        for slice_, old in enumerate(part.core):
            block = slice_ * part.blocks // len(core)
            places = [
                np.searchsorted(new[block], of[block]) for new, of in ((cols, part.cols), (rows, part.rows))
            ]
            core[slice_][np.ix_(*places)] = old
        factors[group] = Factors(core, rows, cols)
    model.attach(Adapter(own.header, factors, own.extras))
    np.testing.assert_allclose(model.outputs(canary[0]), canary[2], rtol=1e-4, atol=1e-5)


def test_a_sketch_of_another_rank_runs_on_the_same_graph(sketched):
    """Vectors that a core of zeros joins add nothing."""
    own, (inputs, _, adapted) = bundle_adapter(sketched), read_canary(SKETCH_V1)
    factors = {
        group: SketchFactors.pack(
            np.pad(part.core, ((0, 0), (0, 3), (0, 3))),
            np.pad(part.left, ((0, 0), (0, 0), (0, 3)), constant_values=1),
            np.pad(part.right, ((0, 0), (0, 3), (0, 0)), constant_values=-1),
        )
        for group, part in own.factors.items()
    }
    model = Model(sketched, threads=1)
    model.attach(Adapter(own.header, factors, own.extras))
    np.testing.assert_allclose(model.outputs(inputs), adapted, rtol=1e-4, atol=1e-5)


def test_swapping_sketches_there_and_back_gives_the_base_its_own_module_again(sketched):
    """The classifier is trained in full: without an adapter its own values answer."""
    model, (inputs, _, _) = Model(sketched, threads=1), read_canary(SKETCH_V1)
    base = model.outputs(inputs)
    seen = []
    for adapter in (bundle_adapter(sketched), personal(sketched), None):
        model.attach(adapter)
        seen.append(model.outputs(inputs))
    np.testing.assert_array_equal(seen[2], base)
    assert len({value.tobytes() for value in seen}) == 3


@pytest.mark.parametrize("batch_size", [1, 3, 80, 1000])
def test_predictions_do_not_depend_on_the_batch(model, user, batch_size):
    found = model.predict(user.samples, batch_size=batch_size)
    expected = model.predict(user.samples)
    assert [item.label for item in found] == [item.label for item in expected]
    np.testing.assert_allclose([item.scores for item in found], [item.scores for item in expected], atol=1e-5)


def test_scores_are_probabilities_in_the_order_of_the_labels(model, user):
    for item in model.predict(user.samples[:10]):
        assert sum(item.scores) == pytest.approx(1, abs=1e-5)
        assert len(item.scores) == len(model.labels) == 4
        assert item.label == model.labels[int(np.argmax(item.scores))]


def test_huge_outputs_still_give_probabilities(model, user, monkeypatch):
    monkeypatch.setattr(model, "outputs", lambda inputs: np.array([[1e30, 0, -1e30, 0]], np.float32))
    (item,) = model.predict(user.samples[:1])
    assert item.scores == (1, 0, 0, 0)


def test_no_samples_give_no_predictions(model, user):
    assert model.predict(user.samples[:0]) == []


def test_accuracy_is_the_part_answered_correctly(model, user):
    found = model.predict(user.samples)
    right = [item.label == label for item, label in zip(found, user.labels, strict=True)]
    answers, score = model.evaluate(user)
    assert answers == found
    assert model.score(user) == score == sum(right) / 80
    answered = replace(user, labels=tuple(item.label for item in found))
    assert model.score(answered) == 1


def test_accuracy_of_data_that_cannot_be_scored_is_refused(model, user):
    with pytest.raises(DataError, match="unknown label 'cat'"):
        model.score(replace(user, labels=("cat",) * 80))
    with pytest.raises(DataError, match="no labels"):
        model.score(replace(user, labels=None))
    with pytest.raises(DataError, match="empty"):
        model.score(user.select([]))


def test_samples_of_the_wrong_kind_are_refused(model):
    with pytest.raises(DataError, match="expected images"):
        model.predict(["a text"])
    with pytest.raises(DataError, match=r"expected \[n, 8, 8, 1\]"):
        model.predict(np.zeros((2, 9, 8), np.uint8))


# --- adapters that do not fit ----------------------------------------------------------------------


def renamed(adapter, **changes):
    return replace(adapter, header=replace(adapter.header, **changes))


def test_an_adapter_of_another_base_is_refused_and_the_one_in_use_stays(model, bundle, canary):
    model.attach(bundle_adapter(bundle))
    before = model.outputs(canary[0])
    other = "sha256:" + "0" * 64
    with pytest.raises(BaseMismatchError) as caught:
        model.attach(renamed(personal(bundle), base_digest=other))
    assert other in caught.value.message
    assert bundle.manifest.base_digest in caught.value.message
    assert caught.value.hint
    np.testing.assert_array_equal(model.outputs(canary[0]), before)


def without_a_group(adapter):
    groups = dict(list(adapter.header.groups.items())[1:])
    return Adapter(replace(adapter.header, groups=groups), {name: adapter.factors[name] for name in groups})


def with_other_blocks(adapter):
    """The rows and columns of one group's first block for all of its weights; the header says the same."""
    one = adapter.factors["16x16"]
    factors = {**adapter.factors, "16x16": replace(one, rows=one.rows[:1], cols=one.cols[:1])}
    return replace(adapter, factors=factors)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: renamed(a, labels=("0", "1", "2", "cat")), "labels"),
        (lambda a: renamed(a, labels=("1", "0", "2", "3")), "labels"),
        (lambda a: renamed(a, task="text-classification"), "task"),
        (lambda a: renamed(a, coupling="none"), "coupling"),
        (lambda a: renamed(a, coupling="all"), "coupling"),
        (lambda a: renamed(a, transform="dct"), "transform"),
        (lambda a: renamed(a, frame="sketch"), "factors"),
        (without_a_group, "groups"),
        (with_other_blocks, "groups"),
        (lambda a: replace(a, extras={"head": np.zeros(4, np.float32)}), "head"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_what_differs(model, bundle, change, what):
    with pytest.raises(IncompatibleError, match=f"the adapter's {what} differ"):
        model.attach(change(bundle_adapter(bundle)))


def test_rows_and_columns_are_refused_where_sketches_are_fed(sketched):
    own = bundle_adapter(sketched)
    parts = {
        group: Factors(part.core, *(np.tile(np.int32([0, 1]), (part.blocks, 1)) for _ in range(2)))
        for group, part in own.factors.items()
    }
    with pytest.raises(IncompatibleError, match="the adapter's factors differ from the bundle's") as caught:
        build_feeds(sketched.manifest, replace(renamed(own, frame="raw"), factors=parts))
    for part in ("rows", "cols", "left", "right"):
        assert part in caught.value.message


@pytest.mark.parametrize("extras", [{}, {"module.classifier.bias": np.zeros(4, np.float32)}])
def test_an_adapter_without_the_modules_trained_in_full_is_refused(sketched, extras):
    with pytest.raises(IncompatibleError, match=r"the adapter's head differ.*module\.classifier\.weight"):
        build_feeds(sketched.manifest, replace(bundle_adapter(sketched), extras=extras))


def test_what_differs_is_shown_and_not_what_is_alike(bundle):
    own = bundle_adapter(bundle)
    name = list(own.header.groups)[-1]
    spec = own.header.groups[name]
    groups = {**own.header.groups, name: replace(spec, n1=spec.n1 + 1)}
    with pytest.raises(IncompatibleError) as caught:
        build_feeds(bundle.manifest, renamed(own, groups=groups))
    assert name in caught.value.message
    assert next(iter(groups)) not in caught.value.message
    assert str(spec.n1 + 1) in caught.value.message


# --- graphs that do not fit ------------------------------------------------------------------------


def test_a_bundle_without_an_inference_graph_is_refused(bundle):
    bare = replace(bundle, manifest=replace(bundle.manifest, graphs={"step": "step.onnx"}))
    with pytest.raises(IncompatibleError, match="no inference graph") as caught:
        Model(bare)
    assert "--target onnx" in caught.value.hint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "infer.onnx").write_bytes(b"junk" * 99), "Protobuf parsing failed"),
        (lambda root: (root / "infer.onnx").unlink(), "doesn't exist"),
        (lambda root: (root / "base.bin").write_bytes(b""), "out of bounds"),
        (
            lambda root: shutil.copyfile(root / "step.onnx", root / "infer.onnx"),
            "the graph has no default for",
        ),
    ],
)
def test_a_graph_that_cannot_be_used_is_named_with_the_reason(tmp_path, damage, message, resealed):
    root = shutil.copytree(V1, tmp_path / "bundle")
    damage(root)
    with pytest.raises(IncompatibleError, match=message) as caught:
        Model(resealed(root), threads=1)
    assert caught.value.where == str(root / "infer.onnx")


def test_a_bundle_that_does_not_say_how_to_read_samples_is_refused(bundle):
    vague = replace(bundle, manifest=replace(bundle.manifest, preprocessing={}))
    with pytest.raises(FileFormatError, match="'kind' is missing"):
        Model(vague, threads=1)


def test_labels_that_are_not_the_graphs_are_refused(bundle, user):
    short = replace(bundle, manifest=replace(bundle.manifest, labels=("0", "1")))
    with pytest.raises(IncompatibleError, match=r"4 outputs .* 2 labels"):
        Model(short, threads=1).predict(user.samples[:1])


# --- threads ---------------------------------------------------------------------------------------


def test_predictions_under_swapping_are_always_one_adapters_and_never_a_mixture(bundle, canary):
    """Eight threads predict while another swaps; the cores are so unlike that a mixture would show."""
    inputs = {name: value[:1] for name, value in canary[0].items()}
    adapters = [None, bundle_adapter(bundle), *(personal(bundle, seed, 0.5) for seed in range(3))]
    model, known = Model(bundle, threads=1), {}
    for index, adapter in enumerate(adapters):
        model.attach(adapter)
        known[model.outputs(inputs).tobytes()] = index
    assert len(known) == len(adapters)
    seen, strange, stop = set(), [], threading.Event()

    def predict():
        while not stop.is_set():
            found = model.outputs(inputs).tobytes()
            if found in known:
                seen.add(known[found])
            else:
                strange.append(found)

    workers = [threading.Thread(target=predict) for _ in range(8)]
    for worker in workers:
        worker.start()
    generator = np.random.default_rng(0)
    for _ in range(400):
        model.attach(adapters[generator.integers(len(adapters))])
        stop.wait(0.001)
    stop.set()
    for worker in workers:
        worker.join(timeout=30)
    assert strange == []
    assert seen == set(range(len(adapters)))


def test_a_prediction_under_way_keeps_its_adapter_when_the_caller_lets_go_of_it(bundle, canary):
    model = Model(bundle, threads=1)
    expected = []
    for seed in range(20):
        adapter = personal(bundle, seed)
        model.attach(adapter)
        del adapter
        expected.append(model.outputs(canary[0]))
    for seed in range(20):
        model.attach(personal(bundle, seed))
        np.testing.assert_array_equal(model.outputs(canary[0]), expected[seed])


def test_a_data_set_can_be_made_in_memory(model):
    images = np.zeros((2, 8, 8), np.uint8)
    dataset = Dataset("image", images, ("0", "1"), "memory", ("a", "b"))
    assert model.score(dataset) in (0, 0.5, 1)


# --- several adapters, and the canary ---------------------------------------------------------------------


def test_named_adapters_are_used_by_their_block_alone(bundle, canary):
    inputs = canary[0]
    model, first, second = Model(bundle, threads=1), personal(bundle, 1, 0.5), personal(bundle, 2, 0.5)
    base = model.outputs(inputs)
    model.load("first", first)
    model.load("second", second)
    assert model.loaded == ("first", "second")
    assert np.array_equal(model.outputs(inputs), base)
    with model.adapter("first"):
        one = model.outputs(inputs)
        with model.adapter("second"):
            two = model.outputs(inputs)
            with model.adapter(None):
                assert np.array_equal(model.outputs(inputs), base)
        assert np.array_equal(model.outputs(inputs), one)
        model.unload("first")  # the block goes on with it
        assert np.array_equal(model.outputs(inputs), one)
    assert len({base.tobytes(), one.tobytes(), two.tobytes()}) == 3
    assert np.array_equal(model.outputs(inputs), base)
    for call in (lambda: model.adapter("first").__enter__(), lambda: model.unload("secon")):
        with pytest.raises(UsageError, match="no adapter") as caught:
            call()
    assert "did you mean 'second'" in caught.value.hint


def test_eight_threads_each_with_its_own_adapter(bundle, canary):
    """No request fails, and none is answered by another thread's adapter."""
    inputs = {name: value[:1] for name, value in canary[0].items()}
    model, expected = Model(bundle, threads=1), {}
    for number in range(8):
        model.load(f"user{number}", personal(bundle, number, 0.5))
        with model.adapter(f"user{number}"):
            expected[number] = model.outputs(inputs).tobytes()
    assert len(set(expected.values())) == 8

    def work(number):
        for _ in range(150):
            with model.adapter(f"user{number}"):
                if model.outputs(inputs).tobytes() != expected[number]:
                    return number
        return None

    with ThreadPoolExecutor(8) as pool:  # an exception of a thread comes out of `map`
        wrong = [number for number in pool.map(work, range(8)) if number is not None]
    assert wrong == []


def changed_base(tmp_path, resealed):
    root = tmp_path / "bundle"
    shutil.copytree(V1, root)
    content = np.frombuffer((root / "base.bin").read_bytes(), np.float32).copy()
    content[: len(content) // 2] *= 1.5
    (root / "base.bin").write_bytes(content.tobytes())
    return resealed(root)


def test_a_base_that_computes_something_else_is_refused_at_load(tmp_path, resealed):
    bundle = changed_base(tmp_path, resealed)
    with pytest.raises(
        IncompatibleError, match=r"the base gives outputs that are off by .* canary"
    ) as caught:
        Model(bundle, threads=1)
    assert caught.value.exit_code == 4
    Model(bundle, threads=1, check=False)


def test_the_adapter_of_the_bundle_must_answer_as_it_was_exported(bundle, monkeypatch):
    model = Model(bundle, threads=1)
    model.load("own", bundle_adapter(bundle))
    run = model._run
    monkeypatch.setattr(model, "_run", lambda inputs, feeds: run(inputs, feeds) * np.float32(1.5))
    with pytest.raises(IntegrityError, match="the adapter gives outputs that are off by") as caught:
        model.load("own", bundle_adapter(bundle))
    assert caught.value.exit_code == 6
    monkeypatch.setattr(model, "_run", lambda inputs, feeds: run(inputs, feeds) * np.float32("nan"))
    with pytest.raises(IntegrityError, match="gives NaN or infinity"):
        model.load("other", personal(bundle))
    assert model.loaded == ("own",)


def test_an_adapter_that_is_not_applied_is_noticed(bundle, monkeypatch):
    """ONNX Runtime answers as the base, without a word, where the factors do not arrive."""
    model = Model(bundle, threads=1)
    run = model._run
    monkeypatch.setattr(model, "_run", lambda inputs, feeds: run(inputs, {}))
    with pytest.raises(IntegrityError, match="the adapter changes nothing"):
        model.load("other", personal(bundle))
    model.load("blank", blank_adapter(bundle))  # a core of zero is the base


def test_cores_that_do_not_arrive_are_noticed_beside_a_head_that_does(sketched, monkeypatch):
    """What is trained in full changes the answers by itself; the cores must change them too."""
    model, own = Model(sketched, threads=1), bundle_adapter(sketched)
    assert own.extras
    groups = {group: part.with_core(part.core + np.float32(0.5)) for group, part in own.factors.items()}
    other = replace(own, factors=groups)
    model.load("other", other)
    run = model._run
    idle = {f"{group}.core": np.zeros_like(part.core) for group, part in own.factors.items()}
    monkeypatch.setattr(model, "_run", lambda inputs, feeds: run(inputs, {**feeds, **idle} if feeds else {}))
    with pytest.raises(IntegrityError, match="the adapter changes nothing"):
        model.load("unfed", other)
    model.load("blank", blank_adapter(sketched))
