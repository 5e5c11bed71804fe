"""The reference values that the checking process reads: the same arrays as were written."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save

from edge_tcur_export.parity import Case, _pack, read_cases


def test_cases_are_read_as_they_were_written(tmp_path):
    """Scalars stay scalars (a module trained in full may have one), transposed views their values."""
    case = Case(
        feeds={"x": np.arange(6.0).reshape(2, 3).T, "scale": np.array(2.0, np.float32)},
        outputs=np.ones((2, 4), np.float32).T,
        loss=0.5,
        gradients={"g.core": np.ones((2, 1, 1)), "scale": np.array(3.0, np.float32)},
        later=0.25,
    )
    path = tmp_path / "reference.safetensors"
    path.write_bytes(save(_pack([case, case])))
    for found in read_cases(path):
        for mine, other in ((found.feeds, case.feeds), (found.gradients, case.gradients)):
            assert set(mine) == set(other)
            for name, value in other.items():
                assert mine[name].shape == value.shape
                np.testing.assert_array_equal(mine[name], value)
        np.testing.assert_array_equal(found.outputs, case.outputs)
        assert (found.loss, found.later) == (case.loss, case.later)
