"""A canary that holds a part of large outputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.canary import Canary, departs, read_canary
from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.bundle import FileEntry
from edge_tcur_runtime.formats.digest import digest_bytes

PART = {
    "input.x": np.zeros((2, 3), np.int64),
    "output.places": np.array([0, 5, 11]),
    "output.sizes": np.array([2, 3, 4]),
    "output.base": np.zeros((2, 3), np.float32),
    "output.adapter": np.ones((2, 3), np.float32),
}


def read(tmp_path, tensors):
    raw = safetensors.numpy.save(tensors)
    (tmp_path / "canary.safetensors").write_bytes(raw)
    files = {"canary.safetensors": FileEntry(len(raw), digest_bytes(raw))}
    return read_canary(tmp_path, SimpleNamespace(canary="canary.safetensors", files=files))


def test_places_and_sizes_are_read(tmp_path):
    canary = read(tmp_path, PART)
    assert canary.sizes == (2, 3, 4)
    outputs = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(canary.part(outputs), [[0, 5, 11], [12, 17, 23]])
    whole = read(tmp_path, {name: PART[name] for name in ("input.x", "output.base")})
    assert whole.places is None
    assert whole.part(outputs) is outputs


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)), wrong=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_outputs_agree_in_part_and_a_change_of_a_held_place_is_seen(sizes, wrong, data):
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=sizes).astype(np.float32)
    count = int(np.prod(sizes[1:]))
    places = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    canary = Canary({}, outputs.reshape(sizes[0], -1)[:, places], None, places, sizes)
    found = outputs.copy()
    if wrong:
        found.reshape(sizes[0], -1)[-1, places[-1]] += 100
    assert (departs(canary.part(found), canary.base) is None) == (not wrong)
    assert departs(canary.part(outputs[..., None]), canary.base) is not None  # outputs of another size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output.places": None}, "'output.places' must be int64"),
        ({"output.sizes": None}, "'output.sizes' must be int64"),
        ({"output.places": np.array([0.0, 5, 11])}, "'output.places' must be int64"),
        ({"output.places": np.zeros(0, np.int64)}, "'output.places' must be int64"),
        ({"output.places": np.array([-1, 5, 11])}, "'output.places' must be int64"),
        ({"output.places": np.array([0, 5, 12])}, "outside of outputs"),
        ({"output.sizes": np.array([2, 3, 1])}, "outside of outputs"),
        ({"output.sizes": np.array([3, 3, 4])}, "'output.base' has the shape"),
        ({"output.adapter": np.ones((2, 4), np.float32)}, "'output.adapter' has the shape"),
    ],
)
def test_places_that_contradict_the_outputs_are_refused(tmp_path, changes, message):
    tensors = {name: value for name, value in (PART | changes).items() if value is not None}
    with pytest.raises(FileFormatError, match=message):
        read(tmp_path, tensors)
