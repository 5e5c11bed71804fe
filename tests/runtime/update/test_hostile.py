"""What a hostile reviewer found: each test failed before its fix."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import tempfile
import threading
import time

import pytest

from edge_tcur_runtime.errors import (
    BadInputError,
    BudgetError,
    DiskError,
    EdgeError,
    ExitCode,
    HealthCheckError,
    MissingEngineError,
    NetworkError,
)
from edge_tcur_runtime.store import Store
from edge_tcur_runtime.update.fetch import (
    Deadline,
    Download,
    FileTransport,
    HttpTransport,
    Limits,
    fetch,
)
from edge_tcur_runtime.update.policy import Action, Personal


@pytest.fixture
def second(simulator, device, adapters):
    """A device on version 1, and version 2 published."""
    simulator.release(adapters[0])
    device.update(simulator)
    return simulator.release(adapters[1])


@pytest.mark.parametrize(
    "error", [DiskError("full"), MissingEngineError("no onnxruntime"), BadInputError("busy")]
)
def test_what_is_not_the_adapters_fault_never_condemns_it(simulator, device, second, error):
    """A full disk, a missing engine or a busy store, four times: afterwards it is installed all the same."""
    healthy = device.healthy

    def fails(*_):
        raise error

    device.healthy = fails
    for _ in range(4):
        with pytest.raises(type(error)):
            device.update(simulator)
    device.healthy = healthy
    assert device.update(simulator).active == second.digest


@pytest.mark.parametrize("where", ["raised", "as onnxruntime says it"])
def test_too_little_memory_is_not_the_adapters_fault(simulator, device, second, monkeypatch, where):
    """Four times too little memory in the real health check: 5, and it is installed all the same."""
    from edge_tcur_runtime.predict import Model
    from edge_tcur_runtime.update.run import _check

    pytest.importorskip("onnxruntime")
    error = MemoryError() if where == "raised" else RuntimeError("[ONNXRuntimeError] : 6 : std::bad_alloc")

    def fails(*_):
        raise error

    healthy, device.healthy = device.healthy, _check
    monkeypatch.setattr(Model, "_run", fails)
    for _ in range(4):
        with pytest.raises(BudgetError) as caught:
            device.update(simulator)
    assert caught.value.exit_code is ExitCode.BUDGET
    assert device.state["rejected"] == {}
    device.healthy = healthy
    assert device.update(simulator).active == second.digest


def test_a_name_stays_with_the_adapter_in_use_until_the_new_one_is_healthy(
    simulator, device, second, adapters
):
    """An app that predicts with the line's name must not get what is only being tried, or what failed."""
    seen = []

    def look(*_):
        seen.append(device.store.resolve("line"))
        raise HealthCheckError("no")

    device.healthy = look
    with pytest.raises(HealthCheckError):
        device.update(simulator)
    assert seen == [device.active]
    assert device.store.resolve("line") == device.active != second.digest
    device.healthy = lambda *_: "fine"
    device.update(simulator, retry=True)
    assert device.store.resolve("line") == second.digest


def test_a_failed_adapter_leaves_no_file_behind(simulator, device, second):
    def fails(*_):
        raise HealthCheckError("no")

    device.healthy = fails
    with pytest.raises(HealthCheckError):
        device.update(simulator)
    device.update(simulator)
    assert [line.digest for line in device.store.list()] == [device.active]


def test_a_broken_download_that_is_not_wanted_any_more_is_removed(simulator, device, second, adapters):
    def cut(content):
        yield content[:100]
        raise NetworkError("cut")

    with pytest.raises(NetworkError):
        device.update(simulator, {"2.safetensors": cut})
    downloads = device.store_path / "update" / "downloads"
    assert len(list(downloads.iterdir())) == 1
    simulator.release(adapters[2])
    device.update(simulator)
    assert list(downloads.iterdir()) == []


def test_check_only_does_not_forget_what_failed(simulator, device, second):
    def fails(*_):
        raise HealthCheckError("no")

    healthy, device.healthy = device.healthy, fails
    with pytest.raises(HealthCheckError):
        device.update(simulator)
    device.healthy = healthy
    before = device.state
    assert device.update(simulator, check_only=True, retry=True).action is Action.INSTALL
    assert device.state == before
    assert not device.update(simulator).changed


def test_a_rollback_by_hand_right_after_a_kill_is_respected(simulator, device, second, monkeypatch):
    """Killed between the activation and its note in the state; the user goes back; the update respects it."""

    class Kill(BaseException):
        pass

    activate = Store.activate

    def killed(self, *arguments, **options):
        activate(self, *arguments, **options)
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(Store, "activate", killed)
        with pytest.raises(Kill):
            device.update(simulator)
    assert device.active == second.digest
    first = device.store.rollback()
    assert device.update(simulator).active == first


def test_metadata_need_no_directory_for_temporary_files(simulator, device, adapters, monkeypatch):
    """A device whose only writable place is the store."""

    def none(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    offer = simulator.release(adapters[0])
    assert device.update(simulator).active == offer.digest


def test_a_short_change_of_the_store_by_another_process_is_waited_for(simulator, device, second):
    """`personalize` installs what it learned while an update is at work: neither gives up."""
    path = device.store_path / "lock"
    held = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, (held,)).start()
    assert device.update(simulator).active == second.digest


@pytest.mark.parametrize("where", ["update/lock", "lock"])
def test_a_file_system_without_locks_is_said(simulator, device, second, monkeypatch, where):
    flock = fcntl.flock

    def none(file, operation):
        if os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").endswith(
            f"store/{where}"
        ):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(EdgeError) as caught:
        device.update(simulator)
    assert caught.value.exit_code is ExitCode.DISK
    assert caught.value.hint


def test_many_addresses_that_do_not_answer_end_with_the_deadline(monkeypatch):
    """A name server of the attacker's gives a hundred addresses; each one is tried, until time is over."""
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = full.getsockname()[1]
    fillers = []
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
        fillers.append(filler)
    real = socket.getaddrinfo

    def many(host, number, *arguments, **options):
        return real("127.0.0.1", port, *arguments, **options)[:1] * 100

    monkeypatch.setattr(socket, "getaddrinfo", many)
    transport = HttpTransport("http://attacked.test/", Deadline(1.0), Limits(silence_seconds=0.3))
    began = time.monotonic()
    with pytest.raises(NetworkError, match=r"within 1 s"):
        list(transport.read("metadata/timestamp.json"))
    assert time.monotonic() - began < 3
    for thing in (*fillers, full):
        thing.close()


def test_an_address_of_a_family_that_this_device_lacks_is_passed_over(monkeypatch):
    """A name with an IPv6 address first, on a kernel without IPv6."""
    real, make = socket.getaddrinfo, socket.socket
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]

    def both(*_, **options):
        sixth = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [sixth, *real("127.0.0.1", port, **options)]

    def lacking(family, *arguments):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return make(family, *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    monkeypatch.setattr(socket, "socket", lacking)
    transport = HttpTransport("http://two.test/", Deadline(10), Limits())
    with transport._dial(("two.test", port)) as found:
        assert found.getpeername() == ("127.0.0.1", port)
    server.close()


def test_a_stick_that_is_pulled_is_a_failed_transport(tmp_path, monkeypatch):
    """The mirror gives an input/output error in the middle: 8, what arrived is kept, and a hint."""
    content = bytes(range(250)) * 800
    (tmp_path / "file").write_bytes(content)
    place = FileTransport(tmp_path, Deadline(10))

    class Pulled:
        def __init__(self, file):
            self.file, self.reads = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size):
            self.reads += 1
            if self.reads > 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self.file.read(size)

    fdopen = os.fdopen
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda *arguments: Pulled(fdopen(*arguments)))
        with pytest.raises(NetworkError) as caught:
            fetch(Download("file", 200_000, "0" * 64, tmp_path / "part"), place)
    assert "mounted" in caught.value.hint
    assert (tmp_path / "part").read_bytes() == content[:65_536]
    digest = hashlib.sha256(content).hexdigest()
    fetch(Download("file", 200_000, digest, tmp_path / "part"), place)  # the stick is back: it goes on
    assert (tmp_path / "part").read_bytes() == content
    assert place.counters.received == 200_000  # nothing was read twice


def test_old_combinations_do_not_fill_the_disk(simulator, device, second, adapters):
    """Each `combine` leaves the one before it to go back to, and none of the older ones."""
    from dataclasses import replace

    import numpy as np

    from edge_tcur_runtime.formats.adapter import parse_adapter, serialize_adapter
    from edge_tcur_runtime.origin import starting_from

    adapter = parse_adapter(adapters[0])
    factors = {
        n: f.with_core((f.core + np.float32(0.25)).astype(np.float32)) for n, f in adapter.factors.items()
    }
    header = replace(adapter.header, provenance={"personal": "true", **starting_from(adapter)})
    own = replace(adapter, header=header, factors=factors)
    own = device.store.install(serialize_adapter(own), name="personal")
    device.store.activate(own)
    combined = [device.update(simulator, personal=Personal.COMBINE).active]
    for raw in (*adapters[2:], adapters[0]):
        simulator.release(raw)
        combined.append(device.update(simulator, personal=Personal.COMBINE).active)
    held = {line.digest for line in device.store.list()}
    assert own in held  # the user's own is never removed
    assert set(combined) & held == set(combined[-2:])
    assert device.store.rollback() == combined[-2]


def test_the_root_of_a_new_repository_starts_anew(simulator, device, second, make_simulator, adapters):
    """The publisher lost two root keys; the next bundle carries the root of a new repository."""
    device.update(simulator)
    simulator.rotate("targets")
    simulator.publish()
    device.update(simulator)
    other = make_simulator(repository="other")
    offer = other.release(adapters[2])
    device.ship_root(other.files["metadata/1.root.json"])
    assert device.update(other).active == offer.digest
    with pytest.raises(EdgeError) as caught:  # the old repository is a stranger's now
        device.update(simulator)
    assert caught.value.exit_code is ExitCode.INTEGRITY


def test_a_server_cannot_make_a_device_start_anew(simulator, device, second, make_simulator, adapters):
    """Which repository it is, is read from the shipped root; what a server says of itself is nothing."""
    device.update(simulator)
    old = dict(simulator.files)
    simulator.release(adapters[2])
    device.update(simulator)
    device.wipe_metadata()
    with pytest.raises(EdgeError, match="already acted upon"):
        device.update(old)


def test_a_404_does_not_cost_the_connection(monkeypatch):
    """The root that is not there yet is asked for at every check: with TLS a second handshake each time."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = b"ok" if "there" in self.path else b"no such file"
            self.send_response(200 if "there" in self.path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    connects = []
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(
        http.client.HTTPConnection, "connect", lambda self: (connects.append(1), connect(self))[1]
    )
    transport = HttpTransport(f"http://127.0.0.1:{server.server_address[1]}/", Deadline(10), Limits())
    with pytest.raises(Exception, match="404"):
        list(transport.read("missing"))
    assert b"".join(transport.read("there")) == b"ok"
    assert len(connects) == 1
    transport.close()
    server.shutdown()
    server.server_close()
