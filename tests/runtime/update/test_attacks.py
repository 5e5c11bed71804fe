"""The attacks of the TUF specification against a device, one named test each.

After every one of them the device uses what it had, and an honest server serves it again.
"""

from __future__ import annotations

import copy
import json

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile

from edge_tcur_runtime.errors import ExitCode, NetworkError, TrustError


@pytest.fixture
def first(simulator, device, adapters):
    """The device uses version 1, and the repository offers version 2; returns what was served before."""
    offer = simulator.add(adapters[0])
    simulator.publish()
    assert device.update(simulator).active == offer.digest
    old = dict(simulator.files)
    simulator.second = simulator.add(adapters[1])
    simulator.publish()
    return offer, old


def refused(device, files, first, hooks=None, error=TrustError, **settings):
    """The update ends with exit code 6 (or 8) and one line of advice; the adapter in use stays."""
    with pytest.raises(error) as caught:
        device.update(files, hooks, **settings)
    assert caught.value.exit_code == (ExitCode.INTEGRITY if error is TrustError else ExitCode.NETWORK)
    assert caught.value.hint
    assert device.active == first[0].digest
    return caught.value


def recovers(device, simulator):
    assert device.update(simulator).active == simulator.second.digest


def test_arbitrary_installation_of_other_bytes(simulator, device, first, adapters):
    entry = simulator.second.entry
    name = f"targets/adapters/line/{entry.sha256}.2.safetensors"
    evil = {**simulator.files, name: adapters[3][: entry.size].ljust(entry.size, b"\0")}
    refused(device, evil, first)
    recovers(device, simulator)


def test_arbitrary_installation_by_a_stranger_with_his_own_keys(
    make_simulator, simulator, device, first, adapters
):
    stranger = make_simulator()
    for number in (0, 1, 2):
        stranger.add(adapters[number])
        stranger.publish()
    refused(device, stranger, first)
    recovers(device, simulator)


def test_arbitrary_installation_by_a_changed_list(simulator, device, first):
    name = f"metadata/{simulator.targets.signed.version}.targets.json"
    document = json.loads(simulator.files[name])
    for target in document["signed"]["targets"].values():
        target["custom"]["rank"] = 7
    refused(device, {**simulator.files, name: json.dumps(document).encode()}, first)
    recovers(device, simulator)


def test_rollback_to_an_old_state(simulator, device, first):
    recovers(device, simulator)
    with pytest.raises(TrustError):
        device.update(first[1])
    assert device.active == simulator.second.digest


def test_rollback_of_the_list_by_a_thief_of_the_online_keys(simulator, device, first):
    """New timestamp and snapshot, honestly numbered, over the old list."""
    recovers(device, simulator)
    simulator.snapshot.signed.meta = {"targets.json": MetaFile(2)}
    simulator.sign("snapshot")
    simulator.write_from_snapshot()
    with pytest.raises(TrustError):
        device.update(simulator)
    assert device.active == simulator.second.digest


def test_freeze_ends_with_the_expiry(simulator, device, first):
    """The server goes on serving what was signed long ago."""
    simulator.days["timestamp"] = -1
    simulator.write_from_snapshot()
    assert "expired" in refused(device, simulator, first).message
    simulator.days["timestamp"] = 10
    simulator.write_from_snapshot()
    recovers(device, simulator)


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_freeze_of_one_role(simulator, device, first, role):
    simulator.days[role] = -1
    simulator.publish()
    refused(device, simulator, first)
    simulator.days[role] = 10
    simulator.publish()
    recovers(device, simulator)


def test_fast_forward_is_recovered_by_new_keys(simulator, device, first):
    """A thief signs version 2^30 of everything; the publisher rotates the keys and starts anew."""
    honest = copy.deepcopy((simulator.targets, simulator.snapshot, simulator.timestamp))
    for role in ("targets", "snapshot", "timestamp"):
        getattr(simulator, role).signed.version = 2**30
    simulator.publish()
    recovers(device, simulator)
    assert device.state["floor"]["timestamp"] > 2**30
    simulator.targets, simulator.snapshot, simulator.timestamp = honest
    simulator.publish()
    with pytest.raises(TrustError):  # the small versions alone are a rollback
        device.update(simulator)
    simulator.rotate("targets", "snapshot", "timestamp")
    simulator.publish()
    assert device.update(simulator).active == simulator.second.digest
    assert device.state["floor"]["timestamp"] < 100


def test_mix_and_match_of_lists_of_two_times(simulator, device, first):
    """The present timestamp and snapshot, with the list of another time under the expected name."""
    version = simulator.targets.signed.version
    old = first[1][f"metadata/{version - 1}.targets.json"]
    refused(device, {**simulator.files, f"metadata/{version}.targets.json": old}, first)
    recovers(device, simulator)


def test_mix_and_match_of_snapshots_of_two_times(simulator, device, first):
    version = simulator.snapshot.signed.version
    old = first[1][f"metadata/{version - 1}.snapshot.json"]
    refused(device, {**simulator.files, f"metadata/{version}.snapshot.json": old}, first)
    recovers(device, simulator)


@pytest.mark.parametrize(
    "ending", ["timestamp.json", ".snapshot.json", ".targets.json", "2.root.json", ".safetensors"]
)
def test_endless_data(simulator, device, first, ending):
    sent = 0

    def endless(_content):
        nonlocal sent
        for _ in range(200):
            sent += 2**14
            yield b" " * 2**14
        pytest.fail("more than 3 MiB were taken")

    refused(device, simulator, first, {ending: endless})
    assert sent <= 512 * 2**10 + 2**15  # the largest bound, of the list
    recovers(device, simulator)


def test_extraneous_dependencies_are_not_fetched(simulator, device, first, adapters):
    """Adapters of other bases and delegated lists cost nothing: none of them is asked for."""
    for number in (2, 3):
        simulator.add(adapters[number], name=f"other{number}", base=_other_base(simulator))
    signer = CryptoSigner.generate_ed25519()
    keyid = signer.public_key.keyid
    role = DelegatedRole("evil", [keyid], 1, False, paths=["adapters/*/*"])
    simulator.targets.signed.delegations = Delegations({keyid: signer.public_key}, {"evil": role})
    simulator.publish()
    recovers(device, simulator)
    assert [path for path in device.asked if path.endswith(".safetensors")] == [
        f"targets/adapters/line/{simulator.second.entry.sha256}.2.safetensors"
    ]
    assert not any("evil" in path for path in device.asked)
    assert len(device.asked) == 5


def _other_base(simulator):
    from dataclasses import replace

    facts, _ = next(iter(simulator.facts.values()))
    return replace(facts.base, digest="sha256:" + "0" * 64)


def test_wrong_keys_for_a_role(simulator, device, first):
    """The timestamp's key signs the list."""
    simulator.sign("targets", simulator.signers["timestamp"])
    simulator.write_from_targets()
    refused(device, simulator, first)
    simulator.publish()
    recovers(device, simulator)


def test_too_few_keys_for_a_new_root(simulator, device, first):
    """One of the two root keys that must sign was stolen."""
    honest = copy.deepcopy(simulator.root)
    thief = CryptoSigner.generate_ed25519()
    simulator.root.signed.add_key(thief.public_key, "targets")
    simulator.sign("root", simulator.signers["root"][:1])
    evil = {**simulator.files, "metadata/2.root.json": simulator.root.to_bytes()}
    refused(device, evil, first)
    simulator.root = honest
    recovers(device, simulator)


def test_a_root_signed_by_its_own_keys_only(simulator, device, first, make_simulator):
    stranger = make_simulator()
    stranger.sign("root")
    refused(device, {**simulator.files, "metadata/2.root.json": stranger.root.to_bytes()}, first)
    recovers(device, simulator)


def test_too_many_roots_in_one_update(simulator, device, first):
    """A thief of the root can only move a device so far at once; the next update goes on."""
    for _ in range(40):
        simulator.rotate("timestamp")
    simulator.publish()
    refused(device, simulator, first)  # 32 in one update, and the timestamp is signed by the 41st
    recovers(device, simulator)


def test_a_server_that_answers_with_errors(simulator, device, first):
    from tuf.api.exceptions import DownloadHTTPError

    def broken(_content):
        raise DownloadHTTPError("500", 500)
        yield b""

    for ending in ("timestamp.json", ".targets.json", ".safetensors"):
        refused(device, simulator, first, {ending: broken}, error=NetworkError)
    recovers(device, simulator)
