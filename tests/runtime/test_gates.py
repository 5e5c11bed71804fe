"""Gates: mains power, temperature, hours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.errors import IncompatibleError, UsageError
from edge_tcur_runtime.gates import Cool, Hours, MainsPower


def supply(root, name, **files):
    (root / name).mkdir(parents=True)
    for key, value in files.items():
        (root / name / key).write_text(f"{value}\n")


def test_mains_power(tmp_path):
    gate = MainsPower(tmp_path / "none")
    assert gate() is None  # a board without a battery
    gate = MainsPower(tmp_path)
    supply(tmp_path, "BAT0", type="Battery", status="Discharging")
    assert gate() == "the device runs on its battery"
    supply(tmp_path, "AC", type="Mains", online=0)
    assert gate() is not None
    (tmp_path / "AC" / "online").write_text("1\n")
    assert gate() is None
    (tmp_path / "AC" / "online").write_text("0\n")
    (tmp_path / "BAT0" / "status").write_text("Charging\n")
    assert gate() is None


def test_temperature(tmp_path):
    with pytest.raises(IncompatibleError, match="tells no temperature"):
        Cool(50, tmp_path)
    for name, value in (("thermal_zone0", 41000), ("thermal_zone1", "broken"), ("thermal_zone2", 52400)):
        supply(tmp_path, name, temp=value)
    assert Cool(60, tmp_path)() is None
    assert Cool(50, tmp_path)() == "a sensor shows 52 degrees, above 50"
    with pytest.raises(UsageError):
        Cool(0, tmp_path)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_hours(begin, end, now):
    text = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    gate = Hours.parse(text)
    assert (gate.begin, gate.end) == (begin, end)
    inside = begin <= now < end if begin < end else begin == end or now >= begin or now < end
    gate = Hours(begin, end, lambda: (now // 60, now % 60))
    assert (gate() is None) == inside


@pytest.mark.parametrize("text", ["", "1:00-2:00", "24:00-01:00", "01:60-02:00", "01:00", "01:00-02:00 "])
def test_hours_that_are_none(text):
    with pytest.raises(UsageError, match="expected HH:MM-HH:MM"):
        Hours.parse(text)
