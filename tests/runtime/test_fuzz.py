"""Mutated adapter files: a few seconds of what ``tests/benchmarks/fuzz.py`` runs by the million."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import secrets
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.errors import BadInputError
from edge_tcur_runtime.formats.adapter import (
    Adapter,
    AdapterHeader,
    parse_adapter,
    read_adapter,
    serialize_adapter,
    write_adapter,
)
from edge_tcur_runtime.formats.factors import GroupSpec, SketchFactors

SECONDS = 5.0
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_benchmark"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    for name in ("fuzz_benchmark", "mutants", "oracle"):
        sys.modules.pop(name, None)


def test_mutants_of_a_new_seed_are_judged_as_the_oracle_says(fuzz):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # python tests/benchmarks/fuzz.py --seed SEED --only NUMBER runs one of them again
    tally, count = fuzz.run_for(SECONDS, seed)
    assert tally.faults == [], f"seed {seed}"
    assert count >= 100
    reached = set(tally.verdicts)
    assert {"bad-format", "integrity", "bad-input", "accepted, fits", "accepted, of another base"} <= reached


def test_a_mutant_is_a_function_of_its_seed_and_number(fuzz):
    made = [fuzz.mutants.make(7, number) for number in range(50)]
    assert [mutant.raw for _, mutant in made] == [fuzz.mutants.make(7, number)[1].raw for number in range(50)]
    assert len({mutant.raw for _, mutant in made}) >= 45


def test_no_mutant_changes_what_the_next_one_is_made_from(fuzz):
    odd, document = repr(fuzz.mutants.ODD), {"x": [{}]}
    for number in range(300):
        fuzz.mutants.edit_json(random.Random(number), document)
    assert repr(fuzz.mutants.ODD) == odd


def test_the_seeds_are_valid_by_both_sets_of_rules(fuzz):
    for raw in fuzz.oracle.seeds():
        assert serialize_adapter(parse_adapter(raw)) == raw
        assert fuzz.oracle.is_valid(*fuzz.oracle.unpack(raw))


def test_the_oracle_notices_a_reader_that_is_too_lax_or_too_strict(fuzz):
    oracle, raw = fuzz.oracle, fuzz.oracle.seeds()[0]
    document, tensors = oracle.unpack(raw)
    read = {"tensors": tensors, "again": raw}
    changed = raw[:-1] + b"x"
    assert oracle.fault(raw, oracle.Mutant(changed, ""), None) is None
    assert oracle.fault(raw, oracle.Mutant(changed, ""), read) == "a changed file was accepted"
    same = oracle.Mutant(raw, "", (document, tensors))
    assert oracle.fault(raw, same, read) is None
    assert oracle.fault(raw, same, None) == "a valid file was refused"
    other = {**read, "again": changed}
    assert oracle.fault(raw, same, other) == "what was read is not what was written"
    for wrong in ({**document, "alpha": 1}, {**document, "rank": 3}, dict(reversed(document.items()))):
        mutant = oracle.Mutant(raw, "", (wrong, tensors))
        assert oracle.fault(raw, mutant, read) == "a file that breaks the rules was accepted"


def test_a_large_file_takes_twice_its_size_and_little_more(tmp_path):
    """Of the file, and of the tensors that are read from it; digest and checks copy nothing."""
    path = tmp_path / "large.safetensors"
    head = np.ones((6, 2**20), np.float32)
    write_adapter(path, Adapter(AdapterHeader("base", {}, "t", ("a",)), {}, {"head": head}))
    tracemalloc.start()
    read_adapter(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * path.stat().st_size + 4 * 2**20


def large_sketch(path):
    """Writes 4 MiB of two bits an entry: 16 million of them."""
    side, rank = 2**14, 512
    packed = np.full((1, side * rank // 4), 0b10010110, np.uint8)
    core = np.zeros((1, rank, rank), np.float32)
    header = AdapterHeader(
        "base", {"q": GroupSpec(("q.0",), side, side)}, "t", ("a",), "none", "identity", "sketch"
    )
    write_adapter(path, Adapter(header, {"q": SketchFactors(core, packed, packed, side, side)}))


@pytest.mark.parametrize("kind", ["good", "pattern", "sizes", "cut"])
def test_a_large_sketch_takes_twice_its_size_and_little_more(fuzz, tmp_path, kind):
    """Its vectors stay at two bits an entry until they are used, also where the file is refused."""
    path = tmp_path / "sketch.safetensors"
    large_sketch(path)
    if kind in ("pattern", "sizes"):
        document, tensors = fuzz.oracle.unpack(path.read_bytes())
        if kind == "pattern":
            tensors["q.right"] = tensors["q.right"].copy()
            tensors["q.right"][0, -1] = 0xFF
        else:
            document["groups"]["q"]["n2"] *= 2
        path.write_bytes(fuzz.oracle.forge(document, tensors))
        del document, tensors
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    expected = contextlib.nullcontext() if kind == "good" else pytest.raises(BadInputError)
    tracemalloc.start()
    with expected:
        adapter = read_adapter(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * path.stat().st_size + 4 * 2**20
    if kind == "good":
        left, right = adapter.factors["q"].left, adapter.factors["q"].right
        assert (left.shape, right.shape) == ((1, 2**14, 512), (1, 512, 2**14))
        np.testing.assert_array_equal(left[0, 0, :4], [1, 0, 0, 1])


def test_a_small_file_does_not_reserve_the_largest(tmp_path):
    path = tmp_path / "small.safetensors"
    header = AdapterHeader("base", {}, "t", ("a",))
    write_adapter(path, Adapter(header, {}, {"head": np.ones(2, np.float32)}))
    tracemalloc.start()
    read_adapter(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2**20
