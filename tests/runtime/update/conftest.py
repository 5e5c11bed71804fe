"""A repository simulator without sockets, and a device with a bundle and a store."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_tcur_runtime.feeds import facts_of_adapter, fit_digest
from edge_tcur_runtime.formats.adapter import parse_adapter
from edge_tcur_runtime.formats.bundle import FileEntry, open_bundle, serialize_manifest
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.offer import (
    EXTRA,
    AdapterFacts,
    BaseFacts,
    Catalogue,
    Entry,
    Offer,
    adapter_path,
    serialize_adapter_facts,
    serialize_extra,
)
from edge_tcur_runtime.store import Store

# Without these libraries (the extra `ota`, and `cryptography` to sign) there is nothing to test here.
MISSING = [name for name in ("tuf", "cryptography") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []
if not MISSING:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

    from edge_tcur_runtime.update.fetch import Counters, Limits
    from edge_tcur_runtime.update.run import ROOT_FILE, UpdateSettings, run_update

DATA = Path(__file__).parents[2] / "data"
ROLES = ("root", "targets", "snapshot", "timestamp")


class Simulator:
    """A repository in memory: honest until a test makes it lie. `files` is what a server would send."""

    def __init__(self, *, root_keys: int = 2, threshold: int = 2, repository: str = "first") -> None:
        self.signers = {
            role: [CryptoSigner.generate_ed25519() for _ in range(root_keys if role == "root" else 1)]
            for role in ROLES
        }
        root = Root(consistent_snapshot=True, unrecognized_fields={EXTRA: {"repository": repository}})
        for role, signers in self.signers.items():
            for signer in signers:
                root.add_key(signer.public_key, role)
        root.roles["root"].threshold = threshold
        self.root, self.targets = Metadata(root), Metadata(Targets())
        self.snapshot, self.timestamp = Metadata(Snapshot()), Metadata(Timestamp())
        self.days = dict.fromkeys(ROLES, 10.0)
        self.files: dict[str, bytes] = {}
        self.facts: dict[str, tuple[AdapterFacts, bytes]] = {}
        self.sign("root")
        self.files["metadata/1.root.json"] = self.root.to_bytes()
        self.publish()

    def sign(self, role: str, signers=None) -> None:
        """Signs the next version of a role."""
        metadata = getattr(self, role)
        metadata.signed.version += 1 if metadata.signatures else 0
        end = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=self.days[role])
        metadata.signed.expires = end
        metadata.signatures.clear()
        for signer in self.signers[role] if signers is None else signers:
            metadata.sign(signer, append=True)

    def add(self, raw: bytes, *, name: str = "line", version: int | None = None, **more) -> Offer:
        """Enters an adapter; `publish` makes it visible. `more` are fields of its facts."""
        adapter = parse_adapter(raw)
        known = [facts.version for facts, _ in self.facts.values() if facts.name == name]
        version = version or max(known, default=0) + 1
        base = BaseFacts(adapter.header.base_digest, adapter.header.task)
        fit = fit_digest(adapter.header.base_digest, facts_of_adapter(adapter))
        facts = AdapterFacts(name, version, "stable", 10_000, base, fit, 3, 1, "0.1.0")
        facts = replace(facts, **more)
        path = adapter_path(name, version)
        self.facts[path] = facts, raw
        target = TargetFile.from_data(path, raw, ["sha256"])
        return Offer(Entry(path, len(raw), target.hashes["sha256"]), facts)

    def release(self, raw: bytes, **more) -> Offer:
        """Adds an adapter and publishes it."""
        offer = self.add(raw, **more)
        self.publish()
        return offer

    def withdraw(self, offer: Offer) -> None:
        """Takes an adapter out of the list."""
        del self.facts[offer.entry.path]

    def publish(self) -> None:
        """Signs targets, snapshot and timestamp anew, as a publisher does."""
        targets = self.targets.signed
        targets.targets.clear()
        for path, (facts, raw) in self.facts.items():
            target = TargetFile.from_data(path, raw, ["sha256"])
            target.unrecognized_fields["custom"] = serialize_adapter_facts(facts)
            targets.targets[path] = target
            folder, _, name = path.rpartition("/")
            self.files[f"targets/{folder}/{target.hashes['sha256']}.{name}"] = raw
        offers = tuple(Offer(Entry(path, 0, ""), facts) for path, (facts, _) in self.facts.items())
        targets.unrecognized_fields[EXTRA] = serialize_extra(Catalogue(offers))
        self.sign("targets")
        self.write_from_targets()

    def write_from_targets(self) -> None:
        """Snapshot and timestamp over the targets as they are."""
        self.files[f"metadata/{self.targets.signed.version}.targets.json"] = self.targets.to_bytes()
        self.snapshot.signed.meta = {"targets.json": MetaFile(self.targets.signed.version)}
        self.sign("snapshot")
        self.write_from_snapshot()

    def write_from_snapshot(self) -> None:
        """A timestamp over the snapshot as it is."""
        self.files[f"metadata/{self.snapshot.signed.version}.snapshot.json"] = self.snapshot.to_bytes()
        self.timestamp.signed.snapshot_meta = MetaFile(self.snapshot.signed.version)
        self.sign("timestamp")
        self.files["metadata/timestamp.json"] = self.timestamp.to_bytes()

    def bump_root(self, signers=None) -> None:
        """The next root, with whatever was changed in it."""
        self.sign("root", signers)
        self.files[f"metadata/{self.root.signed.version}.root.json"] = self.root.to_bytes()

    def rotate(self, *roles: str) -> None:
        """New keys for roles, by a new root that the present one signs."""
        old = list(self.signers["root"])
        for role in roles:
            for signer in self.signers[role]:
                self.root.signed.revoke_key(signer.public_key.keyid, role)
            self.signers[role] = [CryptoSigner.generate_ed25519() for _ in self.signers[role]]
            for signer in self.signers[role]:
                self.root.signed.add_key(signer.public_key, role)
        self.bump_root([*old, *[s for s in self.signers["root"] if s not in old]])


class SimulatedTransport:
    """Reads a simulator's files; `hooks` (path ending -> function of the bytes) make it misbehave."""

    def __init__(self, files, hooks=None) -> None:
        self.files, self.hooks, self.counters = files, hooks or {}, Counters()
        self.asked: list[str] = []

    def close(self):
        pass

    def read(self, path, start=0):
        self.counters.requests += 1
        self.asked.append(path)
        content = self.files.get(path)
        for ending, hook in self.hooks.items():
            if path.endswith(ending):
                yield from hook(content)
                return
        if content is None:
            raise DownloadHTTPError(f"no {path}", 404)
        self.counters.received += len(content) - start
        yield content[start:]


class SimulatedDevice:
    """A bundle with the trusted root in it, a store, and updates from a simulator."""

    def __init__(self, folder: Path, root: bytes) -> None:
        self.bundle, self.store_path = folder / "bundle", folder / "store"
        shutil.copytree(DATA / "bundle-v1", self.bundle)
        self.ship_root(root)
        self.healthy = lambda bundle, adapter, offer: "looks well"
        self.asked: list[str] = []

    def ship_root(self, root: bytes) -> None:
        """Puts a trusted root into the bundle."""
        (self.bundle / ROOT_FILE).write_bytes(root)
        manifest = open_bundle(self.bundle, verify=False).manifest
        files = {**manifest.files, ROOT_FILE: FileEntry(len(root), digest_bytes(root))}
        (self.bundle / "manifest.json").write_bytes(serialize_manifest(replace(manifest, files=files)))

    def update(self, files, hooks=None, **settings):
        """Runs one update; `files` is a simulator or a mapping of paths."""
        files = files.files if isinstance(files, Simulator) else files
        transport = SimulatedTransport(files, hooks)
        self.asked = transport.asked
        options = UpdateSettings(limits=Limits(total_seconds=30), **settings)
        return run_update(self.bundle, self.store_path, options, health=self.healthy, transport=transport)

    @property
    def store(self) -> Store:
        return Store.open(self.store_path)

    @property
    def active(self) -> str | None:
        return self.store.active_digest()

    @property
    def state(self) -> dict:
        return json.loads(self.state_path.read_text())

    @property
    def state_path(self) -> Path:
        """The copy of the update state that holds."""
        copies = (self.store_path / "update").glob("state-?.json")
        return max(copies, key=lambda path: json.loads(path.read_text())["generation"])

    def wipe_metadata(self) -> None:
        """What an attacker, or a factory reset of a cache partition, does."""
        shutil.rmtree(self.store_path / "update" / "metadata")


@pytest.fixture(autouse=True)
def no_fsync(request, monkeypatch):
    """fsync matters to a power cut only (`test_power.py`) and takes most of the time."""
    if "power" not in request.module.__name__:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def adapters(make_variant):
    """Bytes of five adapters of the shipped bundle."""
    return [make_variant(number) for number in range(5)]


@pytest.fixture
def simulator():
    return Simulator()


@pytest.fixture
def device(tmp_path, simulator):
    return SimulatedDevice(tmp_path, simulator.files["metadata/1.root.json"])


@pytest.fixture
def make_simulator():
    return Simulator


@pytest.fixture
def make_device():
    return SimulatedDevice
