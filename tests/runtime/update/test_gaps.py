"""What python-tuf 7.0.1 leaves open, closed by us: one named test each."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest

from edge_tcur_runtime.errors import (
    BadInputError,
    DiskError,
    ExitCode,
    IntegrityError,
    NetworkError,
    TrustError,
    UsageError,
)
from edge_tcur_runtime.update import run as run_module
from edge_tcur_runtime.update.fetch import Deadline, HttpTransport, Limits
from edge_tcur_runtime.update.floor import StateFile
from edge_tcur_runtime.update.run import UpdateSettings, run_update


@pytest.fixture
def published(simulator, device, adapters):
    """Version 1 is in use; returns what was served then. Version 2 is offered."""
    simulator.add(adapters[0])
    simulator.publish()
    device.update(simulator)
    old = dict(simulator.files)
    simulator.second = simulator.add(adapters[1])
    simulator.publish()
    return old


def test_rollback_after_the_metadata_was_wiped(simulator, device, published):
    device.update(simulator)
    device.wipe_metadata()
    with pytest.raises(TrustError, match="already acted upon") as caught:
        device.update(published)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert device.active == simulator.second.digest
    assert device.update(simulator).active == simulator.second.digest  # the wiped cache heals


def test_rollback_of_the_root_after_the_metadata_was_wiped(simulator, device, published):
    simulator.rotate("timestamp")
    simulator.publish()
    device.update(simulator)
    device.wipe_metadata()
    with pytest.raises(TrustError, match="root metadata of version 1"):
        device.update(published)


def test_the_floor_rises_only_after_the_health_check(simulator, device, published):
    from edge_tcur_runtime.errors import HealthCheckError

    before = device.state["floor"]

    def unhealthy(*_):
        raise HealthCheckError("NaN")

    device.healthy = unhealthy
    with pytest.raises(HealthCheckError):
        device.update(simulator)
    assert device.state["floor"] == before
    device.update(simulator)  # the version is skipped from now on; this update ends well
    assert device.state["floor"]["targets"] > before["targets"]


def test_a_clock_at_1970_does_not_revive_expired_metadata(simulator, device, published, monkeypatch):
    """python-tuf believes the clock; a time that has certainly passed is known from earlier updates."""
    device.update(simulator)
    device.wipe_metadata()
    simulator.days["timestamp"] = -1
    simulator.write_from_snapshot()
    stopped = SimpleNamespace(
        datetime=SimpleNamespace(now=lambda zone: datetime(1970, 1, 1, tzinfo=zone)), timezone=timezone
    )
    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", stopped)
    monkeypatch.setattr(run_module.time, "time", lambda: 0.0)
    with pytest.raises(TrustError, match="clock is behind"):
        device.update(simulator)


def test_known_good_time_never_decreases(simulator, device, published, monkeypatch):
    device.update(simulator)
    known = device.state["known_good"]
    assert abs(known - time.time()) < 60
    monkeypatch.setattr(run_module.time, "time", lambda: 0.0)
    device.update(simulator)
    assert device.state["known_good"] == known


def test_a_finished_download_is_used_offline_with_a_full_cache(simulator, device, published, monkeypatch):
    """Killed after the download, before the commit; then without a network."""
    real = run_module.Store.install

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Store, "install", killed)
    with pytest.raises(KeyboardInterrupt):
        device.update(simulator)
    monkeypatch.setattr(run_module.Store, "install", real)
    monkeypatch.setattr(socket, "socket", _no_sockets)
    result = run_update(
        device.bundle, device.store_path, UpdateSettings(offline=True), health=lambda *_: "looks well"
    )
    assert result.active == simulator.second.digest


def _no_sockets(*_arguments, **_options):
    pytest.fail("a socket was opened")


def test_offline_refuses_a_url(device):
    settings = UpdateSettings(url="http://127.0.0.1:1/", offline=True)
    with pytest.raises(UsageError, match="opens no connection"):
        run_update(device.bundle, device.store_path, settings)


def test_a_target_appears_whole_and_synced_or_not_at_all(simulator, device, published, monkeypatch):
    """A full disk during the download: exit code 7, and nothing under a final name."""

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    before = set(_files(device.store_path / "adapters"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError) as caught:
        device.update(simulator)
    assert caught.value.exit_code == ExitCode.DISK
    monkeypatch.undo()
    assert set(_files(device.store_path / "adapters")) == before
    assert device.update(simulator).active == simulator.second.digest


def _files(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_two_updaters_at_once(simulator, device, published):
    with (
        StateFile(device.store_path / "update").locked(),
        pytest.raises(BadInputError, match="another update"),
    ):
        device.update(simulator)
    assert device.update(simulator).active == simulator.second.digest


def test_a_cut_body_is_a_network_error_and_is_resumed(simulator, device, published):
    def cut(content):
        yield content[:100]
        raise NetworkError("cut", hint="again")

    with pytest.raises(NetworkError):
        device.update(simulator, {".safetensors": cut})
    part = device.store_path / "update" / "downloads" / simulator.second.entry.sha256
    assert part.stat().st_size == 100
    result = device.update(simulator)
    assert result.active == simulator.second.digest
    assert result.received < simulator.second.entry.size + 3 * 2**10  # the first 100 bytes were kept
    assert not part.exists()


def test_a_damaged_part_is_fetched_again(simulator, device, published):
    part = device.store_path / "update" / "downloads" / simulator.second.entry.sha256
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"damaged" * 20)
    assert device.update(simulator).active == simulator.second.digest


@pytest.mark.parametrize("damage", ["empty", "garbage", "no link"])
def test_a_damaged_metadata_cache_heals(simulator, device, published, damage):
    """What a badly timed kill or power cut leaves behind; with ``bootstrap=None`` this is the end."""
    folder = device.store_path / "update" / "metadata"
    for path in [*folder.glob("*.json"), *folder.glob("root_history/*.json")]:
        if damage == "no link" or path.is_symlink():
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else b"{")
    assert device.update(simulator).active == simulator.second.digest


def test_a_damaged_state_is_never_silently_begun_anew(simulator, device, published):
    for path in (device.store_path / "update").glob("state-?.json"):
        path.write_bytes(path.read_bytes().replace(b'"targets": 2', b'"targets": 1')[:-9])
    with pytest.raises(IntegrityError) as caught:
        device.update(simulator)
    assert "remove state-0.json and state-1.json" in caught.value.hint


@pytest.mark.parametrize("damage", ["torn", "empty", "another floor"])
def test_a_torn_copy_of_the_state_costs_one_write_and_heals(simulator, device, published, damage):
    """The other copy holds: the same device, and the floor before that write at least."""
    device.update(simulator)
    before, newest = device.state, device.state_path
    raw = newest.read_bytes()
    other = raw.replace(b'"root": 1', b'"root": 9')
    assert other != raw
    newest.write_bytes({"torn": raw[: len(raw) // 2], "empty": b"", "another floor": other}[damage])
    result = device.update(simulator)
    assert any(newest.name in note for note in result.notes)
    assert (device.state["device_id"], device.state["floor"]) == (before["device_id"], before["floor"])
    assert device.update(simulator).notes == ()


@pytest.mark.parametrize("damage", ["torn", "gone"])
@pytest.mark.parametrize("lost", ["newest", "both"])
def test_a_damaged_state_of_the_store_is_no_choice_of_the_user(simulator, device, published, damage, lost):
    """The store is then behind; the update must not take that for a rollback by hand, and stay behind."""
    assert device.update(simulator).active == simulator.second.digest
    copies = sorted(
        device.store_path.glob("state-?.json"), key=lambda path: json.loads(path.read_text())["generation"]
    )
    for path in copies[-1:] if lost == "newest" else copies:
        path.write_bytes(path.read_bytes()[:50]) if damage == "torn" else path.unlink()
    assert device.active != simulator.second.digest
    result = device.update(simulator)
    assert result.active == device.active == simulator.second.digest
    assert any("damaged" in note for note in result.notes)


def test_a_rollback_by_hand_is_respected_though_the_older_copy_is_damaged(simulator, device, published):
    device.update(simulator)
    device.store.rollback()
    before = device.active
    copies = device.store_path.glob("state-?.json")
    min(copies, key=lambda path: json.loads(path.read_text())["generation"]).write_bytes(b"{")
    assert device.update(simulator).active == before != simulator.second.digest


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends one byte in 50 ms: of the headers, or of the body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\nX: " + b"a" * 4000
        if "body" in self.path:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n")
            head = b" " * 4000
        for number in range(len(head)):
            try:
                self.wfile.write(head[number : number + 1])
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture
def slow_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("where", ["body", "headers"])
def test_a_slow_drip_ends_with_the_deadline(slow_server, where):
    """python-tuf bounds the silence between two bytes only; 4,000 bytes would take 200 seconds here."""
    limits = Limits(total_seconds=0.5, silence_seconds=5)
    transport = HttpTransport(slow_server, Deadline(0.5), limits)
    begin = time.monotonic()
    with pytest.raises(NetworkError, match=r"did not end within 0.5 s"):
        list(transport.read(where))
    assert time.monotonic() - begin < 1.5


def test_slow_retrieval_of_an_update(slow_server, device):
    settings = UpdateSettings(url=slow_server, limits=Limits(total_seconds=0.5))
    begin = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        run_update(device.bundle, device.store_path, settings)
    assert caught.value.exit_code == ExitCode.NETWORK
    assert time.monotonic() - begin < 2


def test_silence_ends_before_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        transport = HttpTransport(url, Deadline(30), Limits(silence_seconds=0.2))
        begin = time.monotonic()
        with pytest.raises(NetworkError, match="does not answer"):
            list(transport.read("metadata/timestamp.json"))
        assert time.monotonic() - begin < 3


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
    with pytest.raises(NetworkError) as caught:
        list(HttpTransport(url, Deadline(5), Limits()).read("metadata/timestamp.json"))
    assert caught.value.hint


def test_a_thief_of_the_timestamp_cannot_poison_the_known_good_time(simulator, device, published):
    """A date of signing in the future would make all honest metadata look expired for ever."""
    soon = int(time.time()) + 9 * 86400
    simulator.timestamp.signed.unrecognized_fields["x-edge-tcur"] = {"issued": soon}
    simulator.write_from_snapshot()
    device.update(simulator)
    assert device.state["known_good"] < time.time() + 60


def test_metadata_signed_after_they_expired_for_this_clock_are_refused(
    simulator, device, published, monkeypatch
):
    """The timestamp says when it was signed: what had expired by then is old, whatever the clock says."""
    simulator.days["snapshot"] = 1
    simulator.publish()
    later = int(time.time()) + 5 * 86400
    simulator.timestamp.signed.unrecognized_fields["x-edge-tcur"] = {"issued": later}
    simulator.write_from_snapshot()
    with pytest.raises(TrustError, match="snapshot metadata has expired"):
        device.update(simulator)
