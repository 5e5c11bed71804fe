"""`edge-tcur devices`: the device profiles that can be planned and exported for."""

from __future__ import annotations

import click

from edge_tcur_devices import DeviceProfile, list_profiles, load_profile
from edge_tcur_runtime.cli.framework import output_options
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

EPILOG = """\b
Examples:
  edge-tcur devices
  edge-tcur devices raspberry-pi-5-8gb
"""
HEADER = ("Name", "Kind", "Arch", "Cores", "Memory", "For one app", "Engines")


@click.command("devices", epilog=EPILOG)
@click.argument("name", required=False)
@output_options
def devices(name: str | None, sink: Sink) -> None:
    """List the device profiles, or show one with the sources of its figures.

    NAME is a shipped profile, or the path of your own TOML file.
    """
    if name is None:
        profiles = list_profiles()
        rows = [_row(profile) for profile in profiles]
        sink.result({"profiles": [profile.to_dict() for profile in profiles]}, table(HEADER, rows))
    else:
        profile = load_profile(name)
        sink.result({"profile": profile.to_dict()}, describe(profile))


def describe(profile: DeviceProfile) -> str:
    """A profile as text: every figure with its source below it."""
    figures = {
        "arch": profile.arch,
        "cores": str(profile.cores),
        "big_cores": str(profile.big_cores),
        "memory": format_size(profile.memory_bytes),
        "app_memory": format_size(profile.app_memory_bytes),
        "isa": ", ".join(profile.isa),
        "gpu": ", ".join(profile.gpu),
        "engines": ", ".join(profile.engines),
        "providers": ", ".join(profile.providers),
    }
    lines = [f"{profile.name}: {profile.title} ({profile.kind})"]
    for key, value in figures.items():
        lines += ["", f"{key:<11} {value}", f"  source: {profile.sources.get(key, 'none given')}"]
    return "\n".join(lines)


def _row(profile: DeviceProfile) -> tuple[str, ...]:
    return (
        profile.name,
        profile.kind,
        profile.arch,
        str(profile.cores),
        format_size(profile.memory_bytes),
        format_size(profile.app_memory_bytes),
        ", ".join(profile.engines),
    )
