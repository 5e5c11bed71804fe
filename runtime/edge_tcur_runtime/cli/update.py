"""`edge-tcur-device update`: bring the newest signed adapter, and go back by itself where it fails."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur_runtime.cli.framework import (
    DIRECTORY,
    EXISTING_FILE,
    SIZE,
    add_options,
    output_options,
    store_option,
)
from edge_tcur_runtime.errors import BadInputError, MissingEngineError, UsageError
from edge_tcur_runtime.output import Sink
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.update.install import Installed
    from edge_tcur_runtime.update.run import UpdateResult, UpdateSettings

EPILOG = """\b
Examples:
  edge-tcur-device update bundle/ --url https://updates.example.com/repo/
  edge-tcur-device update bundle/ --url https://updates.example.com/repo/ --check-only --json
  edge-tcur-device update bundle/ --url file:///media/usb/repo --offline
  edge-tcur-device update bundle/ --install --url http://127.0.0.1:8000/ --root root.json
"""
MAX_SECONDS = 7 * 86400


# These become `UpdateSettings`; collected under their names.
_options = add_options(
    click.option("--url", envvar="EDGE_TCUR_UPDATE_URL", metavar="URL",
                 help="The repository: http(s)://, file:// or a directory.  [env: EDGE_TCUR_UPDATE_URL]"),
    click.option("--channel", type=click.Choice(("stable", "beta")), default="stable", show_default=True,
                 help="beta takes stable adapters too."),
    click.option("--name", metavar="NAME", help="The line of adapters, where several fit this bundle."),
    click.option("--personal", type=click.Choice(("keep-personal", "replace", "combine")),
                 default="keep-personal", show_default=True,
                 help="What becomes of a personal adapter. It is never uploaded."),
    click.option("--check-only", is_flag=True, help="Say what would be done; change nothing."),
    click.option("--offline", is_flag=True,
                 help="Open no connection: a mirror at --url, or what was fetched before."),
    click.option("--retry", is_flag=True,
                 help="Try again what failed here or was taken out of use by hand."),
    click.option("--root", type=EXISTING_FILE, metavar="FILE",
                 help="The publisher's trusted root; default: the one in the bundle."),
    click.option("--deadline", type=click.FloatRange(min=1, max=MAX_SECONDS), metavar="SECONDS",
                 help="Time for everything; default 300, with --install 3600."),
    click.option("--max-size", type=SIZE, default="64MiB", show_default=True,
                 help="Skip an adapter that is larger."),
    click.option("--max-bundle", type=SIZE, default="4GiB", show_default=True,
                 help="With --install: refuse a bundle that is larger."),
)  # fmt: skip


@click.command(epilog=EPILOG)
@click.argument("bundle", type=DIRECTORY)
@_options
@click.option("--install", is_flag=True, help="Fetch the bundle itself first; it must not be there yet.")
@click.option("--bundle-name", metavar="NAME", help="Which published bundle, where there are several.")
@store_option
@output_options
def update(
    bundle: Path, install: bool, bundle_name: str | None, store: Path, sink: Sink, **options: Any
) -> None:
    """Check, fetch, verify and try the newest signed adapter of BUNDLE, and put it in use.

    Whatever goes wrong, the adapter in use stays: 6 says that something was not to be trusted, 8 that
    the network failed, 7 the disk, 5 that memory is short, 4 that the adapter does not work here.
    """
    if not install and not bundle.is_dir():
        hint = "'--install' with '--root' fetches a published bundle"
        raise BadInputError("there is no bundle", where=str(bundle), hint=hint)
    settings = _settings(options, install)
    installed = _install(bundle, bundle_name, store, settings, sink) if install else None
    result = _run(bundle, store, settings, sink)
    for note in result.notes:
        sink.note(f"note: {note}")
    only = "nothing was changed (--check-only)\n" if settings.check_only else ""
    sink.result(_payload(result, installed), only + _report(result, installed))


def _settings(options: dict[str, Any], install: bool) -> UpdateSettings:
    try:
        from edge_tcur_runtime.update.fetch import Limits
        from edge_tcur_runtime.update.policy import Personal
        from edge_tcur_runtime.update.run import UpdateSettings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("tuf", "securesystemslib", "urllib3"):
            raise
        hint = "pip install 'edge-tcur-runtime[ota]'"
        raise MissingEngineError(f"updates need {error.name}, which is not installed", hint=hint) from error
    seconds = options.pop("deadline")
    limits = Limits(adapter_bytes=options.pop("max_size"), bundle_bytes=options.pop("max_bundle"))
    if seconds is not None or install:
        limits = replace(limits, total_seconds=seconds or limits.bundle_seconds)
    return UpdateSettings(personal=Personal(options.pop("personal")), limits=limits, **options)


def _install(bundle: Path, name: str | None, store: Path, settings: UpdateSettings, sink: Sink) -> Installed:
    from edge_tcur_runtime.formats.adapter import read_bounded
    from edge_tcur_runtime.store import Store
    from edge_tcur_runtime.update.floor import StateFile
    from edge_tcur_runtime.update.install import install_bundle
    from edge_tcur_runtime.update.run import FOLDER, MAX_ROOT_BYTES, choose_transport

    if settings.root is None:
        raise UsageError("--install needs --root: without it nothing can be verified")
    trusted = read_bounded(settings.root, MAX_ROOT_BYTES)
    Store.open(store)
    states = StateFile(store / FOLDER)
    place = choose_transport(settings, states.folder)
    with sink.transfer("fetching the bundle") as progress, contextlib.closing(place):
        return install_bundle(
            bundle, name, trusted, states, place,
            limits=settings.limits, now=int(time.time()), progress=progress,
        )  # fmt: skip


def _run(bundle: Path, store: Path, settings: UpdateSettings, sink: Sink) -> UpdateResult:
    from edge_tcur_runtime.update.run import run_update

    with sink.transfer("fetching the adapter") as progress:
        return run_update(bundle, store, settings, progress=progress)


def _payload(result: UpdateResult, installed: Installed | None) -> dict[str, object]:
    decision, offer = result.decision, result.decision.offer
    facts = None if offer is None else offer.facts
    found = None if installed is None else {**asdict(installed), "root": str(installed.root)}
    return {
        "action": result.action.value,
        "changed": result.changed,
        "reason": decision.reason,
        "active": result.active,
        "adapter": None
        if offer is None or facts is None
        else {
            "name": facts.name,
            "version": facts.version,
            "digest": offer.digest,
            "bytes": offer.entry.size,
            "channel": facts.channel,
            "rollout_percent": facts.rollout / 100,
            "metrics": dict(facts.metrics),
        },
        "withdrawn": decision.withdrawn,
        "skipped": dict(decision.skipped),
        "health": result.health,
        "requests": result.requests,
        "received_bytes": result.received,
        "installed_bundle": found,
        "notes": list(result.notes),
    }


def _report(result: UpdateResult, installed: Installed | None) -> str:
    lines = []
    if installed is not None:
        lines.append(f"installed the bundle {installed.root} ({format_size(installed.size)})")
    lines.append(result.decision.reason)
    if result.health:
        lines.append(f"health check: {result.health}")
    lines += [f"skipped {path}: {why}" for path, why in result.decision.skipped.items()]
    lines.append(f"active: {result.active or 'base (no adapter)'}")
    lines.append(f"{result.requests} requests, {format_size(result.received)} received")
    return "\n".join(lines)
