"""The cases of the TUF client conformance suite, against this device.

The suite itself is not on the package index. Its cases about delegated roles have no counterpart: adapters
stand in the targets role, and delegations are not followed (`test_attacks.py`). Its cases about downloads,
rollback of a whole state and freeze are in `test_attacks.py` too.
"""

from __future__ import annotations

import json

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from edge_tcur_runtime.errors import TrustError


def versions(device):
    """Versions of what the device trusts now, by role."""
    folder = device.store_path / "update" / "metadata"
    return {
        role: Metadata.from_file(str(folder / f"{role}.json")).signed.version
        for role in ("root", "timestamp", "snapshot", "targets")
        if (folder / f"{role}.json").exists()
    }


@pytest.fixture
def refreshed(simulator, device, adapters):
    """The device is at version 2 of everything but the root."""
    simulator.offer = simulator.add(adapters[0])
    simulator.publish()
    device.update(simulator)
    assert versions(device) == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    return simulator


def refused(device, files):
    with pytest.raises(TrustError):
        device.update(files)
    assert device.active is not None
    return versions(device)


def test_basic_init_and_refresh(simulator, device):
    device.update(simulator)
    assert device.asked == [
        "metadata/2.root.json",
        "metadata/timestamp.json",
        "metadata/1.snapshot.json",
        "metadata/1.targets.json",
    ]


def test_a_timestamp_that_changes_without_a_new_version_is_not_taken(refreshed, device):
    refreshed.timestamp.signed.snapshot_meta = MetaFile(100)
    refreshed.timestamp.signatures.clear()
    refreshed.timestamp.sign(refreshed.signers["timestamp"][0])
    device.update({**refreshed.files, "metadata/timestamp.json": refreshed.timestamp.to_bytes()})
    found = Metadata.from_file(str(device.store_path / "update" / "metadata" / "timestamp.json"))
    assert found.signed.snapshot_meta.version == 2


@pytest.mark.parametrize("change", ["hash", "length", "version"])
def test_targets_that_differ_from_the_snapshot(refreshed, device, change):
    refreshed.sign("targets")
    raw = refreshed.targets.to_bytes()
    meta = MetaFile(3, length=len(raw), hashes={"sha256": "0" * 64}) if change == "hash" else MetaFile(3)
    meta = MetaFile(3, length=len(raw) - 1) if change == "length" else meta
    meta = MetaFile(4) if change == "version" else meta
    refreshed.files[f"metadata/{meta.version}.targets.json"] = raw
    refreshed.snapshot.signed.meta = {"targets.json": meta}
    refreshed.sign("snapshot")
    refreshed.write_from_snapshot()
    assert refused(device, refreshed)["targets"] == 2


@pytest.mark.parametrize("change", ["no version", "no JSON", "another signature"])
def test_an_invalid_initial_root_asks_the_server_for_nothing(simulator, device, change):
    document = json.loads(simulator.files["metadata/1.root.json"])
    if change == "no version":
        del document["signed"]["version"]
    elif change == "another signature":
        document["signatures"][0]["sig"] = "00" * 64
    device.ship_root(b"x" if change == "no JSON" else json.dumps(document).encode())
    with pytest.raises(TrustError):
        device.update(simulator)
    assert device.asked == []


def test_unknown_fields_in_the_root_are_part_of_what_is_signed(refreshed, device):
    root = refreshed.root.signed
    root.unrecognized_fields["field"] = "value"
    keyid = root.roles["root"].keyids[0]
    root.keys[keyid].unrecognized_fields["keyid_hash_algorithms"] = ["md5"]
    root.roles["root"].unrecognized_fields["another"] = {"a": 1}
    refreshed.bump_root()
    device.update(refreshed)
    assert versions(device)["root"] == 2


def test_rollback_of_the_timestamp(refreshed, device):
    refreshed.timestamp.signed.version = 0
    refreshed.write_from_snapshot()
    assert refused(device, refreshed)["timestamp"] == 2


@pytest.mark.parametrize("hashes", [False, True])
def test_rollback_of_the_snapshot(refreshed, device, hashes):
    refreshed.snapshot.signed.version = 0
    refreshed.sign("snapshot")
    refreshed.write_from_snapshot()
    if hashes:
        raw = refreshed.snapshot.to_bytes()
        refreshed.timestamp.signed.snapshot_meta = MetaFile.from_data(1, raw, ["sha256"])
        refreshed.sign("timestamp")
        refreshed.files["metadata/timestamp.json"] = refreshed.timestamp.to_bytes()
    assert refused(device, refreshed)["snapshot"] == 2


@pytest.mark.parametrize("hashes", [False, True])
def test_rollback_of_the_targets(refreshed, device, hashes):
    refreshed.targets.signed.version = 0
    refreshed.sign("targets")
    refreshed.write_from_targets()
    if hashes:
        meta = MetaFile.from_data(1, refreshed.targets.to_bytes(), ["sha256"])
        refreshed.snapshot.signed.meta = {"targets.json": meta}
        refreshed.sign("snapshot")
        refreshed.write_from_snapshot()
    assert refused(device, refreshed)["targets"] == 2


@pytest.mark.parametrize(
    ("rolled", "rotated"),
    [("timestamp", ["timestamp"]), ("snapshot", ["snapshot", "timestamp"]), ("targets", ["snapshot"])],
)
def test_fast_forward_of_one_role_is_recovered(refreshed, device, rolled, rotated):
    getattr(refreshed, rolled).signed.version = 99_999
    refreshed.publish()
    device.update(refreshed)
    assert versions(device)[rolled] == 100_000
    getattr(refreshed, rolled).signed.version = 2
    refreshed.publish()
    refused(device, refreshed)
    refreshed.rotate(*rotated)
    refreshed.publish()
    device.update(refreshed)
    assert versions(device)[rolled] < 10


def test_a_snapshot_of_another_version_than_the_timestamp_says(refreshed, device):
    refreshed.sign("snapshot")
    refreshed.files["metadata/9.snapshot.json"] = refreshed.snapshot.to_bytes()
    refreshed.timestamp.signed.snapshot_meta = MetaFile(9)
    refreshed.sign("timestamp")
    refreshed.files["metadata/timestamp.json"] = refreshed.timestamp.to_bytes()
    refused(device, refreshed)


def test_an_expired_root_is_kept_and_nothing_else_is_taken(refreshed, device):
    refreshed.days["root"] = -1
    refreshed.bump_root()
    refreshed.publish()
    found = refused(device, refreshed)
    assert found == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_an_expired_root_on_the_way_to_a_new_one_is_no_obstacle(refreshed, device):
    refreshed.days["root"] = -1
    refreshed.bump_root()
    refreshed.days["root"] = 10
    refreshed.bump_root()
    device.update(refreshed)
    assert versions(device)["root"] == 3


def test_an_expired_timestamp_in_the_cache_still_guards_against_rollback(refreshed, device):
    refreshed.timestamp.signed.version = 49
    refreshed.days["timestamp"] = -1
    refreshed.write_from_snapshot()
    refused(device, refreshed)
    refreshed.days["timestamp"] = 10
    refreshed.write_from_snapshot()
    device.update(refreshed)
    assert versions(device)["timestamp"] == 51


@pytest.mark.parametrize("good", [1, 2])
def test_a_threshold_of_the_snapshot(refreshed, device, good):
    """Two of three keys must sign."""
    signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    for signer in signers:
        refreshed.root.signed.add_key(signer.public_key, "snapshot")
    refreshed.root.signed.roles["snapshot"].threshold = 2
    refreshed.bump_root()
    refreshed.signers["snapshot"] = signers[:good]
    refreshed.publish()
    if good == 2:
        device.update(refreshed)
        assert versions(device)["snapshot"] == 3
    else:
        assert refused(device, refreshed)["snapshot"] == 2


def test_a_threshold_above_the_number_of_keys(refreshed, device):
    refreshed.root.signed.roles["snapshot"].threshold = 6
    refreshed.bump_root()
    refreshed.publish()
    refused(device, refreshed)


def test_a_key_that_the_root_names_and_does_not_hold(refreshed, device):
    refreshed.root.signed.roles["snapshot"].keyids.append("0" * 64)
    refreshed.root.signed.roles["snapshot"].threshold = 2
    refreshed.bump_root()
    refreshed.publish()
    refused(device, refreshed)


def test_the_same_signature_twice_does_not_reach_a_threshold_of_two(refreshed, device):
    refreshed.root.signed.roles["targets"].threshold = 2
    refreshed.bump_root()
    refreshed.publish()
    name = f"metadata/{refreshed.targets.signed.version}.targets.json"
    document = json.loads(refreshed.files[name])
    document["signatures"] *= 2
    refused(device, {**refreshed.files, name: json.dumps(document).encode()})


def test_roots_must_follow_one_by_one(refreshed, device):
    refreshed.bump_root()
    refreshed.bump_root()
    files = dict(refreshed.files)
    files["metadata/2.root.json"] = files["metadata/3.root.json"]
    with pytest.raises(TrustError):
        device.update(files)
    del files["metadata/2.root.json"]
    device.update(files)  # the third without the second is not found
    assert versions(device)["root"] == 1


def test_metadata_of_another_role_under_this_name(refreshed, device):
    refreshed.files["metadata/timestamp.json"] = refreshed.files["metadata/2.snapshot.json"]
    assert refused(device, refreshed)["timestamp"] == 2


@pytest.mark.parametrize("change", [["root"], ["root", "timestamp"], ["targets"], ["snapshot", "targets"]])
def test_key_rotations_are_followed(refreshed, device, change):
    for _ in range(3):
        refreshed.rotate(*change)
    refreshed.publish()
    device.update(refreshed)
    assert versions(device)["root"] == 4


def test_the_new_root_must_be_signed_by_the_old_keys_too(refreshed, device):
    """A rotation that forgets the signatures of the keys before."""
    refreshed.rotate("root")
    refreshed.sign("root")
    refreshed.root.signed.version = 2
    refreshed.root.signatures.clear()
    for signer in refreshed.signers["root"]:
        refreshed.root.sign(signer, append=True)
    refreshed.files["metadata/2.root.json"] = refreshed.root.to_bytes()
    assert refused(device, refreshed)["root"] == 1
