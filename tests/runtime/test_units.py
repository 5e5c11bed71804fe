"""Sizes: binary units only, and what is printed reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.errors import ExitCode, UsageError
from edge_tcur_runtime.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KiB", 1024),
        ("256MiB", 256 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("2tib", 2**41),
    ],
)
def test_sizes_are_read_in_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "9" * 400, "MiB", "256MB", "1G", "-1", "1e3", "1,5MiB", "0x10", "1 2MiB", "nan"]
)
def test_anything_else_is_refused_with_a_hint(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.exit_code is ExitCode.USAGE
    assert "256MiB" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**30, "1.0 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(size, text):
    assert format_size(size) == text


@given(st.integers(0, 2**45))
def test_what_is_printed_reads_back_within_its_precision(size):
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)


@given(st.integers(0, 2**53))
def test_plain_bytes_read_back_exactly(size):
    assert parse_size(str(size)) == size
