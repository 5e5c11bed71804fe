"""`edge-tcur-device adapters`: install, list, activate, roll back and remove adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_tcur_runtime.cli.compare import compare
from edge_tcur_runtime.cli.framework import (
    EXISTING_DIRECTORY,
    EXISTING_FILE,
    HELP_NAMES,
    output_options,
    store_option,
)
from edge_tcur_runtime.output import Sink, table, visible
from edge_tcur_runtime.units import format_size

if TYPE_CHECKING:
    from edge_tcur_runtime.formats.adapter import Adapter
    from edge_tcur_runtime.store import Store, StoredAdapter

EPILOG = """\b
Examples:
  edge-tcur-device adapters install banking.safetensors --name banking --bundle bundle/
  edge-tcur-device adapters activate banking
  edge-tcur-device adapters rollback
"""

_bundle_option = click.option(
    "--bundle",
    type=EXISTING_DIRECTORY,
    metavar="DIR",
    help="Refuse an adapter of another base than this one's; one that is put in use must work with it.",
)


def _open(store: Path, sink: Sink, *, create: bool = False) -> Store:
    from edge_tcur_runtime.store import Store

    opened = Store.open(store, create=create)
    for warning in opened.warnings:
        sink.note(f"warning: {warning}")
    return opened


def _base_of(bundle: Path | None) -> str | None:
    """Digest of a bundle's base from its manifest, no weights read."""
    if bundle is None:
        return None
    from edge_tcur_runtime.formats.bundle import open_bundle

    return open_bundle(bundle, verify=False).manifest.base_digest


def _check_with(bundle: Path | None) -> Callable[[Adapter], None] | None:
    """The health check with a bundle, every file of which is verified then; None without one."""
    if bundle is None:
        return None

    def check(adapter: Adapter) -> None:
        from edge_tcur_runtime.examine import examine
        from edge_tcur_runtime.formats.bundle import open_bundle

        examine(open_bundle(bundle), adapter)

    return check


def _in_use(store: Store, sink: Sink) -> None:
    state = store.state
    payload = {"active": state.in_use, "previous": state.fallback, "pending": state.pending is not None}
    trial = " (on trial: the first prediction confirms it, or the one before comes back)"
    sink.result(payload, f"active: {state.in_use or 'base (no adapter)'}{trial if state.pending else ''}")


@click.group(context_settings=HELP_NAMES, epilog=EPILOG)
def adapters() -> None:
    """Install, list, activate and roll back adapters.

    REF is a name, a digest or at least 6 of its hex digits, "active", "previous", or "base" for
    the base without an adapter. A damaged or foreign adapter is refused, and an interrupted
    command leaves the store as it was.
    """


@adapters.command(
    epilog="\b\nExample:\n  edge-tcur-device adapters install banking.safetensors --name banking"
)
@click.argument("file", type=EXISTING_FILE)
@click.option("--name", metavar="NAME", help="A name for it; taken over from the adapter that had it.")
@_bundle_option
@store_option
@output_options
def install(file: Path, name: str | None, bundle: Path | None, store: Path, sink: Sink) -> None:
    """Verify FILE and keep it in the store. What is active stays active."""
    base = _base_of(bundle)
    opened = _open(store, sink, create=True)
    digest = opened.install_file(file, name=name, expected_base=base)
    payload = {"digest": digest, "name": name, "active": digest == opened.active_digest()}
    ref = name or digest
    sink.result(payload, f"installed {digest}\nuse it with: edge-tcur-device adapters activate {ref}")


@adapters.command("list", epilog="\b\nExample:\n  edge-tcur-device adapters list --json")
@store_option
@output_options
def list_adapters(store: Path, sink: Sink) -> None:
    """Show the adapters in the store, the active one first."""
    found: list[StoredAdapter] = []
    active = None
    if store.exists():
        opened = _open(store, sink)
        found, active = opened.list(), opened.active_digest()
    human = _listing(found) if found else "no adapters installed"
    lines = [asdict(line) for line in found]
    sink.result({"store": str(store), "active": active, "adapters": lines}, human)


def _listing(found: list[StoredAdapter]) -> str:
    rows = [
        (
            line.name or "-",
            _status(line),
            line.digest,
            format_size(line.size),
            f"{line.trained_numbers:,}",
            line.task or "-",
            (line.base_digest or "-")[:19],
        )
        for line in found
    ]
    return table(("name", "status", "digest", "size", "trained", "task", "base"), rows)


def _status(line: StoredAdapter) -> str:
    words = {
        "damaged": line.problem is not None,
        "active": line.active,
        "on trial": line.pending,
        "previous": line.previous,
    }
    return ", ".join(word for word, holds in words.items() if holds) or "-"


@adapters.command(epilog="\b\nExamples:\n  edge-tcur-device adapters activate banking\n"
                  "  edge-tcur-device adapters activate base")  # fmt: skip
@click.argument("ref")
@_bundle_option
@store_option
@output_options
def activate(ref: str, bundle: Path | None, store: Path, sink: Sink) -> None:
    """Use the adapter REF from now on; "base" uses the base without an adapter.

    With --bundle it must pass its health check there. Without, it is on trial until the first
    prediction, which confirms it or goes back to the one before.
    """
    from edge_tcur_runtime.trial import put_in_use

    opened, base = _open(store, sink), _base_of(bundle)
    put_in_use(opened, ref, _check_with(bundle), expected_base=base)
    _in_use(opened, sink)


@adapters.command(epilog="\b\nExample:\n  edge-tcur-device adapters rollback")
@_bundle_option
@store_option
@output_options
def rollback(bundle: Path | None, store: Path, sink: Sink) -> None:
    """Go back to the previous adapter; a second rollback undoes the first.

    A damaged one is refused, with --bundle also one that fails its health check there.
    """
    opened, check = _open(store, sink), _check_with(bundle)
    target = opened.state.fallback
    if check is not None and target is not None:
        check(opened.verified(target))
    opened.rollback()
    _in_use(opened, sink)


@adapters.command(epilog="\b\nExample:\n  edge-tcur-device adapters remove banking")
@click.argument("ref")
@store_option
@output_options
def remove(ref: str, store: Path, sink: Sink) -> None:
    """Delete the adapter REF from the store. The active one is refused."""
    digest = _open(store, sink).remove(ref)
    sink.result({"removed": digest}, f"removed {digest}")


@adapters.command(epilog="\b\nExample:\n  edge-tcur-device adapters show active")
@click.argument("ref")
@store_option
@output_options
def show(ref: str, store: Path, sink: Sink) -> None:
    """Verify the adapter REF and show what it holds."""
    opened = _open(store, sink)
    digest = opened.resolve(ref)
    payload = {"digest": digest, **_describe(opened.load(ref))}
    sink.result(payload, "\n".join(f"{key}: {_text(value)}" for key, value in payload.items()))


def _describe(adapter: Adapter) -> dict[str, object]:
    header = adapter.header
    return {
        "base_digest": header.base_digest,
        "task": header.task,
        "labels": list(header.labels),
        "groups": {
            name: {
                "weights": len(spec.parameters),
                "n1": spec.n1,
                "n2": spec.n2,
                "rank": adapter.factors[name].rank,
            }
            for name, spec in header.groups.items()
        },
        "core_numbers": adapter.trained_numbers,
        "extra_numbers": adapter.extra_numbers,
        "provenance": dict(header.provenance),
    }


def _text(value: object) -> str:
    """A value of `_describe` for people."""
    if isinstance(value, list):
        shown = ", ".join(map(visible, value[:8]))
        return shown if len(value) <= 8 else f"{shown}, ... ({len(value)})"
    if isinstance(value, dict):
        return "".join(f"\n  {visible(key)}: {_text(inner)}" for key, inner in value.items()).replace(
            "\n    ", " "
        )
    return visible(str(value))


adapters.add_command(compare)
