"""`edge-tcur publish`: sign adapters and bundles, and write them as a static directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_tcur.cli.publish_options import key_options, open_repository, repo_option
from edge_tcur_runtime.cli.framework import (
    COUNT,
    DIRECTORY,
    EXISTING_DIRECTORY,
    EXISTING_FILE,
    HELP_NAMES,
    SIZE,
    output_options,
)
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

WARN_DAYS = {"root": 30, "targets": 14, "snapshot": 5, "timestamp": 3}
RENEW = dict.fromkeys(WARN_DAYS, "run 'edge-tcur publish refresh'") | {
    "root": "run 'edge-tcur publish refresh --all' with the root's keys"
}
METADATA_BYTES = 8 * 2**10  # what an update may cost besides its adapter

if TYPE_CHECKING:
    from edge_tcur.publish.operations import RoleStatus
    from edge_tcur_runtime.formats.offer import Catalogue, Offer

EPILOG = """\b
Examples:
  edge-tcur publish init repo/
  edge-tcur publish add run/adapter.safetensors --repo repo/ --base bundle/ --name banking
  edge-tcur publish add run/adapter.safetensors --repo repo/ --base bundle/ --channel beta --rollout 10%
  edge-tcur publish rollout banking 2 50% --repo repo/
  edge-tcur publish withdraw banking 2 --repo repo/
  edge-tcur publish status --repo repo/
"""


def _percent(_context: object, _option: object, text: str | None) -> int | None:
    """Hundredths of a percent from ``10%``, ``10`` or ``0.5%``."""
    if text is None:
        return None
    try:
        value = round(float(text.strip().removesuffix("%")) * 100)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r} is not a percentage such as 10%") from error
    if not 0 <= value <= 10_000:
        raise click.BadParameter(f"{text} is not between 0% and 100%")
    return value


def _metrics(_context: object, _option: object, texts: tuple[str, ...]) -> dict[str, float]:
    """Name -> number from ``accuracy=0.93``."""
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER") from error
        if not separator or abs(found[name]) > 1e9 or found[name] != found[name]:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER")
    return found


@click.group(context_settings=HELP_NAMES, epilog=EPILOG)
def publish() -> None:
    """Publish signed adapters over the air: a static directory that any web server can serve.

    Keys are ed25519 files with a passphrase: from --passphrase-file, the environment
    (EDGE_TCUR_PASSPHRASE, EDGE_TCUR_ROOT_PASSPHRASE) or a prompt. Every command takes --json, --quiet
    and --debug. See docs/ota.md.
    """


def _by_role(_context: object, _option: object, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Role and value from ``targets=hsm:``."""
    pairs = [text.partition("=") for text in texts]
    for role, separator, value in pairs:
        if not separator or not value or role not in WARN_DAYS:
            raise click.BadParameter(f"{role}{separator}{value}: not ROLE=..., of {', '.join(WARN_DAYS)}")
    return [(role, value) for role, _, value in pairs]


def _external(
    signers: list[tuple[str, str]], public_keys: list[tuple[str, str]]
) -> dict[str, list[tuple[str, Path]]]:
    """Role -> its signers' URIs and public keys, paired in the order given."""
    found = dict[str, list[tuple[str, Path]]]()
    for role in WARN_DAYS:
        uris = [uri for name, uri in signers if name == role]
        pems = [Path(pem) for name, pem in public_keys if name == role]
        if len(uris) != len(pems):
            raise UsageError(f"{role}: {len(uris)} --signer and {len(pems)} --public-key belong together")
        if uris:
            found[role] = list(zip(uris, pems, strict=True))
    return found


@publish.command(
    epilog="\b\nExamples:\n  edge-tcur publish init repo/\n"
    "  edge-tcur publish init repo/ --signer targets=hsm: --public-key targets=token.pub.pem"
)
@click.argument("repo", type=DIRECTORY)
@click.option("--root-keys", type=click.IntRange(1, 16), default=3, show_default=True,
              help="How many keys the root has.")  # fmt: skip
@click.option("--root-threshold", type=click.IntRange(1, 16), default=2, show_default=True,
              help="How many of them must sign.")  # fmt: skip
@click.option("--root-days", type=click.IntRange(1, 3650), default=365, show_default=True,
              help="Days until the root expires.")  # fmt: skip
@click.option("--targets-days", type=click.IntRange(1, 3650), default=180, show_default=True,
              help="The same for the list of adapters.")  # fmt: skip
@click.option("--snapshot-days", type=click.IntRange(1, 3650), default=30, show_default=True,
              help="The same for the snapshot.")  # fmt: skip
@click.option("--timestamp-days", type=click.IntRange(1, 3650), default=14, show_default=True,
              help="The same for the timestamp: how long a device can be kept on an old state.")  # fmt: skip
@click.option("--signer", "signers", multiple=True, callback=_by_role, metavar="ROLE=URI",
              help="A key of securesystemslib in place of a new key file; repeatable.")  # fmt: skip
@click.option("--public-key", "public_keys", multiple=True, callback=_by_role, metavar="ROLE=PEM",
              help="The public key of each --signer, in the same order.")  # fmt: skip
@key_options
@output_options
def init(
    repo: Path, keys: dict[str, Any], sink: Sink, root_keys: int, root_threshold: int,
    signers: list[tuple[str, str]], public_keys: list[tuple[str, str]], **days: int,
) -> None:  # fmt: skip
    """Make keys and an empty signed repository in REPO. Nothing is ever overwritten."""
    opened = open_repository(repo, keys, new=True)
    until = {name.removesuffix("_days"): value for name, value in days.items()}
    change = opened.create(root_keys, root_threshold, until, _external(signers, public_keys))
    names = [entry.name for entry in change.ring.keys.values()]
    payload = {"repo": str(repo), "keys_at": str(opened.keys.folder), "keys": names, "root_version": 1}
    human = (
        f"made {repo} (serve it) and {opened.keys.folder} (never serve it): {', '.join(names)}\n"
        f"move the root's keys to offline media, and ship the root with your bundles: "
        f"edge-tcur publish trust BUNDLE --repo {repo}"
    )
    sink.result(payload, human)


@publish.command(
    epilog="\b\nExample:\n  edge-tcur publish add run/adapter.safetensors --repo repo/ --base bundle/"
)
@click.argument("adapter", type=EXISTING_FILE)
@repo_option
@click.option("--base", "bundle", type=EXISTING_DIRECTORY, metavar="BUNDLE",
              help="The bundle it is for: it is tried, and its canary answers are signed.")  # fmt: skip
@click.option("--name", metavar="NAME", help="The line of adapters.  [default: the file's name]")
@click.option("--channel", type=click.Choice(("stable", "beta")), default="stable", show_default=True,
              help="Who gets it; beta devices take stable ones too.")  # fmt: skip
@click.option("--rollout", default="100%", show_default=True, callback=_percent, metavar="PERCENT",
              help="Part of the devices that take it; each decides by a number of its own.")  # fmt: skip
@click.option("--min-runtime", "runtime", metavar="VERSION",
              help="Least edge-tcur-runtime.  [default: this one's]")  # fmt: skip
@click.option("--metric", "metrics", multiple=True, callback=_metrics, metavar="NAME=NUMBER",
              help="A figure, e.g. accuracy=0.93; repeatable. A run's own are taken too.")  # fmt: skip
@click.option("--data", metavar="TEXT", help="What it was trained on, for its model card.")
@click.option("--note", metavar="TEXT", help="Anything else for its model card.")
@key_options
@output_options
def add(
    adapter: Path, repo: Path, bundle: Path | None, keys: dict[str, Any], sink: Sink, **said: Any
) -> None:
    """Publish the file ADAPTER as the next version of its line, with a model card."""
    from edge_tcur.publish.facts import Description
    from edge_tcur.publish.operations import add_adapter

    done = add_adapter(open_repository(repo, keys), adapter, Description(**said), bundle)
    if not done.canary:
        sink.note("note: without --base its answers are not signed; devices check for finite outputs only")
    if done.put_back:
        sink.note("note: it was published before; its file was missing or damaged and was put back")
    facts = done.offer.facts
    payload = {**_offer(done.offer), "superseded": list(done.superseded), "canary": done.canary,
               "put_back": done.put_back}  # fmt: skip
    human = (
        f"published {facts.name} version {facts.version} ({format_size(done.offer.entry.size)}), "
        f"{facts.channel}, {facts.rollout / 100:g} %\n"
        f"model card: {repo}/cards/{facts.name}-{facts.version}.md"
    )
    sink.result(payload, human)


@publish.command(epilog="\b\nExample:\n  edge-tcur publish withdraw banking 2 --repo repo/")
@click.argument("name")
@click.argument("version", type=COUNT)
@repo_option
@key_options
@output_options
def withdraw(name: str, version: int, repo: Path, keys: dict[str, Any], sink: Sink) -> None:
    """Take VERSION of the line NAME back. Devices that use it go to the next best one, or the base."""
    from edge_tcur.publish.operations import withdraw as run

    offer = run(open_repository(repo, keys), name, version)
    sink.result({"withdrawn": offer.entry.path, "digest": offer.digest}, f"withdrew {offer.entry.path}")


@publish.command(epilog="\b\nExample:\n  edge-tcur publish rollout banking 2 50% --repo repo/")
@click.argument("name")
@click.argument("version", type=COUNT)
@click.argument("percent", callback=_percent)
@click.option("--channel", type=click.Choice(("stable", "beta")), help="Move it to this channel too.")
@repo_option
@key_options
@output_options
def rollout(
    name: str, version: int, percent: int, channel: str | None, repo: Path, keys: dict[str, Any], sink: Sink
) -> None:
    """Change which part of the devices takes VERSION of the line NAME. Who has it keeps it."""
    from edge_tcur.publish.operations import set_rollout

    offer = set_rollout(open_repository(repo, keys), name, version, percent, channel)
    human = f"{offer.entry.path}: {offer.facts.channel}, {offer.facts.rollout / 100:g} %"
    sink.result(_offer(offer), human)


@publish.command(epilog="\b\nExamples:\n  edge-tcur publish rotate timestamp --repo repo/\n"
                 "  edge-tcur publish rotate targets snapshot timestamp --repo repo/\n"
                 "  edge-tcur publish rotate root --signer hsm: --public-key token.pub.pem --replaces root-1 "
                 "--repo repo/")  # fmt: skip
@click.argument("roles", nargs=-1, required=True, metavar="ROLE...")
@click.option("--signer", metavar="URI", help="A private key URI of securesystemslib, for one role.")
@click.option("--public-key", type=EXISTING_FILE, metavar="PEM", help="The public key of --signer.")
@click.option("--replaces", metavar="KEY",
              help="Of the root: the key that --signer takes the place of; else it joins.")  # fmt: skip
@repo_option
@key_options
@output_options
def rotate(
    roles: tuple[str, ...], signer: str | None, public_key: Path | None, replaces: str | None, repo: Path,
    keys: dict[str, Any], sink: Sink,
) -> None:  # fmt: skip
    """Give each ROLE (root, targets, snapshot, timestamp) new keys. The root's present keys sign it.

    After a theft replace targets, snapshot and timestamp together: devices then forget the versions
    that the thief may have signed.
    """
    from edge_tcur.publish.operations import rotate as run

    if (signer is None) != (public_key is None):
        raise UsageError("--signer and --public-key belong together")
    external = None if signer is None or public_key is None else (signer, public_key)
    change = run(open_repository(repo, keys, new=True), roles, external, replaces)
    version = change.root.signed.version
    human = f"new keys for {', '.join(roles)}; root version {version}"
    sink.result({"roles": list(roles), "root_version": version}, human)


@publish.command(epilog="\b\nExample:\n  edge-tcur publish refresh --repo repo/")
@click.option("--all", "everything", is_flag=True, help="Sign every role anew, the root too.")
@repo_option
@key_options
@output_options
def refresh(everything: bool, repo: Path, keys: dict[str, Any], sink: Sink) -> None:
    """Sign anew what expires soon, and the timestamp always. Run it every day or so."""
    from edge_tcur.publish.operations import refresh as run

    roles = run(open_repository(repo, keys), everything=everything)
    sink.result({"signed": list(roles)}, f"signed anew: {', '.join(roles)}")


@publish.command(epilog="\b\nExample:\n  edge-tcur publish trust bundle/ --repo repo/")
@click.argument("bundle", type=EXISTING_DIRECTORY)
@repo_option
@key_options
@output_options
def trust(bundle: Path, repo: Path, keys: dict[str, Any], sink: Sink) -> None:
    """Ship the repository's root with BUNDLE, so that its devices can verify updates."""
    from edge_tcur.publish.bundles import trust as run

    digest = run(bundle, open_repository(repo, keys))
    sink.result({"bundle": str(bundle), "root_digest": digest}, f"{bundle} trusts the root {digest}")


@publish.command("bundle", epilog="\b\nExample:\n  edge-tcur publish bundle bundle/ --repo repo/ --name mini")
@click.argument("bundle", type=EXISTING_DIRECTORY)
@click.option("--name", default="bundle", show_default=True, metavar="NAME", help="Its name.")
@click.option("--chunk", type=SIZE, default="4MiB", show_default=True, help="Size of a chunk.")
@repo_option
@key_options
@output_options
def publish_bundle(bundle: Path, name: str, chunk: int, repo: Path, keys: dict[str, Any], sink: Sink) -> None:
    """Publish BUNDLE itself, in chunks, for first installation. Updates never fetch it again."""
    from edge_tcur.publish.bundles import add_bundle

    with sink.transfer("writing chunks") as progress:
        opened = open_repository(repo, keys)
        offer, index = add_bundle(opened, bundle, name, chunk=chunk, progress=progress)
    payload = {"bundle": offer.entry.path, "version": offer.facts.version, "bytes": index.size,
               "chunks": index.count}  # fmt: skip
    human = f"published {offer.entry.path}: {format_size(index.size)} in {index.count} chunks"
    sink.result(payload, human)


@publish.command(epilog="\b\nExample:\n  edge-tcur publish status --repo repo/ --json")
@repo_option
@key_options
@output_options
def status(repo: Path, keys: dict[str, Any], sink: Sink) -> None:
    """Show what is published, when signatures expire, and what an update costs a device."""
    from edge_tcur.publish.leftovers import damaged, unreferenced
    from edge_tcur.publish.operations import metadata_size
    from edge_tcur.publish.operations import status as run

    opened = open_repository(repo, keys)
    roles, change = run(opened)
    cost, catalogue, left = metadata_size(change), change.catalogue, unreferenced(opened, change)
    payload = {
        "roles": {role: asdict(state) for role, state in roles.items()},
        "adapters": [_offer(offer) for offer in catalogue.adapters],
        "bundles": [offer.entry.path for offer in catalogue.bundles],
        "metadata_bytes": cost,
        "skipped": dict(catalogue.skipped),
        "unreferenced": left,
        "damaged": list(broken := damaged(opened, change)),
    }
    rows = [(role, str(s.version), f"{s.days_left:.1f}", f"{s.threshold} of {', '.join(s.keys)}")
            for role, s in roles.items()]  # fmt: skip
    lines = [table(("role", "version", "days left", "keys"), rows), "", _listing(catalogue.adapters)]
    lines.append(f"an update costs a device its adapter and {format_size(cost)} of metadata")
    lines += _leftovers(left, repo)
    for warning in _warnings(roles, catalogue, broken, cost):
        sink.note(f"warning: {warning}")
    sink.result(payload, "\n".join(lines))


@publish.command(epilog="\b\nExample:\n  edge-tcur publish clean --repo repo/ --days 30")
@click.option("--days", type=click.FloatRange(0, 3650), default=7, show_default=True,
              help="Keep what was written, or replaced, more recently.")  # fmt: skip
@repo_option
@key_options
@output_options
def clean(days: float, repo: Path, keys: dict[str, Any], sink: Sink) -> None:
    """Remove files that nothing refers to any more, such as the chunks of replaced bundles.

    Nothing goes while a bundle was published less than --days ago: devices may still fetch the one before.
    """
    from edge_tcur.publish.leftovers import clean as run

    removed = run(open_repository(repo, keys), days)
    size = sum(removed.values())
    human = f"removed {len(removed)} files ({format_size(size)}) older than {days:g} days"
    sink.result({"removed": list(removed), "bytes": size}, human)


def _warnings(
    roles: Mapping[str, RoleStatus], catalogue: Catalogue, broken: Mapping[str, str], cost: int
) -> list[str]:
    """What a publisher should know of the state, each with what to do."""
    found = [
        f"{path} {reason}; until edge-tcur is updated no file counts as unreferenced"
        for path, reason in catalogue.skipped.items()
    ]
    found += [f"{place} is missing or damaged; {command} puts it back" for place, command in broken.items()]
    found += [
        f"{role} expires in {state.days_left:.1f} days; {RENEW[role]}"
        for role, state in roles.items()
        if state.days_left < WARN_DAYS[role]
    ]
    if cost > METADATA_BYTES:
        found.append(
            f"with {len(catalogue.adapters)} adapters listed an update takes {format_size(cost)} of "
            f"metadata, more than {format_size(METADATA_BYTES)}; take out those that no device needs "
            "('edge-tcur publish withdraw NAME VERSION'), or give some lines a repository of their own"
        )
    return found


def _leftovers(left: dict[str, int], repo: Path) -> list[str]:
    if not left:
        return []
    size = format_size(sum(left.values()))
    return [f"nothing refers to {len(left)} files ({size}): 'edge-tcur publish clean --repo {repo}'"]


def _offer(offer: Offer) -> dict[str, object]:
    facts = offer.facts
    return {
        "path": offer.entry.path,
        "digest": offer.digest,
        "bytes": offer.entry.size,
        "name": facts.name,
        "version": facts.version,
        "channel": facts.channel,
        "rollout_percent": facts.rollout / 100,
        "base_digest": facts.base.digest,
        "task": facts.base.task,
        "rank": facts.rank,
        "runtime": facts.runtime,
        "metrics": dict(facts.metrics),
    }


def _listing(offers: tuple[Offer, ...]) -> str:
    rows = []
    for offer in offers:
        facts = offer.facts
        reach = f"{facts.rollout / 100:g} %"
        size = format_size(offer.entry.size)
        rows.append((facts.name, str(facts.version), facts.channel, reach, facts.base.task, size))
    header = ("adapter", "version", "channel", "rollout", "task", "size")
    return table(header, rows) if rows else "no adapters"
