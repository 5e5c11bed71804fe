import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import click
import pytest
import tomllib
from click.testing import CliRunner

from edge_tcur.cli.devices import devices
from edge_tcur_devices import DeviceProfile, list_profiles, load_profile
from edge_tcur_devices.loader import MAX_PROFILE_BYTES, PROFILES
from edge_tcur_runtime.errors import BadInputError, ConfigError, FileFormatError, UsageError
from edge_tcur_runtime.formats.device import FIGURES
from edge_tcur_runtime.units import format_size

DOCS = Path(__file__).parents[2] / "docs" / "devices.md"
SHIPPED = sorted(path.stem for path in PROFILES.glob("*.toml"))
OWN = """\
name = "my-board"
title = "My board"
kind = "single-board"
arch = "aarch64"
cores = 8
big_cores = 4
memory = "2GiB"
app_memory = "1.5GiB"
isa = ["neon", "fp16"]
gpu = ["none"]
engines = ["ort-step"]
providers = ["cpu"]

[sources]
memory = "the label on the chip"
"""


def own(**changes):
    document = tomllib.loads(OWN)
    document.update(changes)
    return {key: value for key, value in document.items() if value is not None}


def parse(**changes):
    return DeviceProfile.from_document(own(**changes), "my.toml")


# -- shipped profiles


def test_at_least_ten_are_shipped_and_every_kind():
    profiles = list_profiles()
    assert len(profiles) == len(SHIPPED) >= 10
    assert {profile.kind for profile in profiles} == {"phone", "jetson", "single-board", "desktop"}
    assert [profile.kind for profile in profiles][:3] == ["phone"] * 3


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_parses_under_its_file_name_and_every_figure_has_a_source(name):
    profile = load_profile(name)
    assert profile.name == name
    assert tuple(profile.sources) == FIGURES
    assert all(len(source) > 15 for source in profile.sources.values())
    assert profile.app_memory_bytes < profile.memory_bytes
    assert "conservative estimate" in profile.sources["app_memory"]


@pytest.mark.parametrize("name", SHIPPED)
def test_ort_training_only_where_it_has_packages(name):
    profile = load_profile(name)
    assert ("ort-training" in profile.engines) == (profile.kind in {"phone", "desktop"})
    assert {"ort-step", "executorch"} <= set(profile.engines)
    assert profile.providers[0] == "cpu"


# -- loading


def test_own_file_by_string_and_by_path(tmp_path, monkeypatch):
    path = tmp_path / "my.toml"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    profile = load_profile(path)
    assert profile == load_profile(str(path)) == load_profile("my.toml") == load_profile("./my.toml")
    assert (profile.memory_bytes, profile.app_memory_bytes) == (2 * 2**30, 3 * 2**29)
    assert profile.sources == {"memory": "the label on the chip"}


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match="no device profile named 'pixel8'") as caught:
        load_profile("pixel8")
    assert "did you mean 'pixel-8'?" in caught.value.hint


def test_a_hopeless_name_lists_what_there_is():
    with pytest.raises(UsageError) as caught:
        load_profile("qqqq")
    assert all(name in caught.value.hint for name in SHIPPED)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (OWN.replace("cores = 8", "cores = "), 5),
        (OWN + 'memory = "again"\n', 16),
        (OWN + 'arch = "open', 16),
        (OWN + "broken = [1,\n", 17),
    ],
)
def test_a_syntax_error_names_file_and_line(tmp_path, text, line):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not valid TOML") as caught:
        load_profile(path)
    assert caught.value.where == f"{path}:{line}"
    assert "(at line" not in caught.value.message


def test_bytes_that_are_not_text_name_the_line(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b'name = "a"\ntitle = "\xff"\n')
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        load_profile(path)
    assert caught.value.where == f"{path}:2"


def test_a_nest_too_deep_is_a_config_error(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("isa = " + "[" * 20_000)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_profile(path)


def test_missing_and_oversized_files_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="cannot read"):
        load_profile(tmp_path / "none.toml")
    path = tmp_path / "big.toml"
    path.write_text("#" * (MAX_PROFILE_BYTES + 1))
    with pytest.raises(FileFormatError, match="the limit is"):
        load_profile(path)


# -- fields


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(FileFormatError, match="unknown field 'app_memry'") as caught:
        parse(app_memry="1GiB")
    assert caught.value.where == "my.toml"
    assert caught.value.hint == "did you mean 'app_memory'?"


def test_an_unknown_source_key_names_the_nearest():
    with pytest.raises(FileFormatError, match="unknown field 'memroy'") as caught:
        parse(sources={"memroy": "a label"})
    assert caught.value.where == "my.toml: sources"
    assert caught.value.hint == "did you mean 'memory'?"


def test_sources_may_be_left_out_by_a_user():
    assert parse(sources=None).sources == {}


@pytest.mark.parametrize("key", ["name", "title", "kind", *FIGURES])
def test_every_other_field_is_required(key):
    with pytest.raises(FileFormatError, match=f"'{key}' is missing"):
        parse(**{key: None})


@pytest.mark.parametrize("key", ["memory", "app_memory"])
@pytest.mark.parametrize("size", ["2GB", "much", "-1GiB", "", "0", "0GiB", 2048, 1.5, True])
def test_bad_sizes_name_the_field(key, size):
    with pytest.raises(FileFormatError, match=f"'{key}'") as caught:
        parse(**{key: size})
    assert caught.value.where == "my.toml"


def test_more_app_memory_than_memory_is_refused():
    with pytest.raises(FileFormatError, match="more than the 'memory'"):
        parse(app_memory="2.1GiB")
    assert parse(app_memory="2GiB").app_memory_bytes == 2 * 2**30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My Board"}, "lower-case"),
        ({"name": "../x"}, "lower-case"),
        ({"kind": "tablet"}, "expected one of phone"),
        ({"arch": "riscv64"}, "expected one of aarch64"),
        ({"cores": 0}, "expected 1 to"),
        ({"cores": "8"}, "must be an integer"),
        ({"big_cores": 9}, "more than the 8 'cores'"),
        ({"isa": ["avx2"]}, "expected some of neon"),
        ({"isa": ["neon", "neon"]}, "twice"),
        ({"isa": "neon"}, "must be a list"),
        ({"gpu": []}, "is empty"),
        ({"gpu": ["none", "vulkan"]}, "names an interface too"),
        ({"engines": ["ort-steps"]}, "expected some of ort-training"),
        ({"providers": [1]}, "strings only"),
        ({"sources": "a label"}, "must be an object"),
        ({"sources": {"memory": 2}}, "must be a string"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(FileFormatError, match=re.escape(message)):
        parse(**changes)


def test_a_wrong_engine_names_the_nearest():
    with pytest.raises(FileFormatError) as caught:
        parse(engines=["ort-steps"])
    assert caught.value.hint == "did you mean 'ort-step'?"


def test_a_profile_is_frozen_and_hashable():
    profile = parse()
    with pytest.raises(FrozenInstanceError):
        profile.cores = 1
    assert hash(profile) == hash(parse())


# -- command


def invoke(*arguments):
    result = CliRunner().invoke(devices, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_lists_every_profile():
    lines = invoke().splitlines()
    assert lines[0].split()[:3] == ["Name", "Kind", "Arch"]
    assert [line.split()[0] for line in lines[2:]] == [profile.name for profile in list_profiles()]


def test_the_command_shows_one_with_its_sources():
    text = invoke("raspberry-pi-5-8gb")
    profile = load_profile("raspberry-pi-5-8gb")
    assert profile.title in text
    assert all(source in text for source in profile.sources.values())
    assert "6.0 GiB" in text


def test_a_figure_without_a_source_says_so(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(OWN)
    assert "none given" in invoke(str(path))


def test_json_carries_bytes():
    listed = json.loads(invoke("--json"))
    assert listed["schema_version"] == 1
    assert [entry["name"] for entry in listed["profiles"]] == [profile.name for profile in list_profiles()]
    shown = json.loads(invoke("jetson-nano", "--json"))["profile"]
    assert shown["memory_bytes"] == 4 * 2**30
    assert shown["isa"] == ["neon"]
    assert shown == load_profile("jetson-nano").to_dict()


def test_the_command_raises_for_an_unknown_name():
    with pytest.raises(UsageError, match="no device profile"):
        CliRunner().invoke(devices, ["pixel8"], catch_exceptions=False)


def test_the_help_has_two_examples():
    text = devices.get_help(click.Context(devices, info_name="edge-tcur devices"))
    assert text.count("  edge-tcur devices") >= 2


# -- documentation


def documented_table():
    lines = [
        "| Name | Device | Kind | Cores (big) | Memory | For one app | Engines |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{p.name}` | {p.title} | {p.kind} | {p.cores} ({p.big_cores}) | {format_size(p.memory_bytes)} "
        f"| {format_size(p.app_memory_bytes)} | {', '.join(p.engines)} |"
        for p in list_profiles()
    ]
    return "\n".join(lines)


def test_the_documented_table_is_the_shipped_one():
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(r"<!-- profiles -->\n(.*?)\n<!-- /profiles -->", text, re.DOTALL)
    assert found
    assert found.group(1) == documented_table(), f"put this table in {DOCS}:\n{documented_table()}"


def test_the_documented_profile_of_ones_own_loads(tmp_path):
    found = re.search(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    path = tmp_path / "own.toml"
    path.write_text(found.group(1))
    assert load_profile(path).name == "kiosk-2026"


def test_a_profile_may_list_every_provider_that_has_a_table(tmp_path):
    from edge_tcur_export.providers import PROVIDERS

    found = re.search(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names = ", ".join(f'"{name}"' for name in PROVIDERS)
    own = found.group(1).replace('providers = ["cpu"]', f"providers = [{names}]")
    path = tmp_path / "own.toml"
    path.write_text(own)
    assert load_profile(path).providers == tuple(PROVIDERS)


def test_the_documentation_names_every_allowed_value():
    from edge_tcur_runtime.formats import device

    text = DOCS.read_text(encoding="utf-8")
    lists = (device.KINDS, device.GPU_APIS, device.ENGINES, device.PROVIDERS, *device.ISA.values())
    missing = {value for values in lists for value in (*values, *device.ISA) if f"`{value}`" not in text}
    assert not missing
