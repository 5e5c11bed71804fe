"""The transport against a real server on loopback: TLS, kept connections, and every odd answer."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tuf.api.exceptions import DownloadHTTPError

from edge_tcur_runtime.errors import BadInputError, NetworkError, TrustError, UsageError
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.update.fetch import (
    Deadline,
    Download,
    FileTransport,
    HttpTransport,
    Limits,
    fetch,
    open_transport,
)

BODY = b"0123456789" * 10


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers by the path: ``/status/301`` with that status, ``/chunked``, ``/zipped``, ``/range`` ..."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self):
        type(self).connections += 1
        super().setup()

    def do_GET(self):
        word = self.path.rpartition("/")[2]
        status = int(word) if word.isdigit() else 206 if word == "range" else 200
        self.send_response(status)
        if word == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"64\r\n" + BODY + b"\r\n0\r\n\r\n")
            return
        if word == "zipped":
            self.send_header("Content-Encoding", "gzip")
        if word == "range":
            self.send_header("Content-Range", "bytes 3-9/100")
        self.send_header("Location", "https://example.org/elsewhere")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_):
        pass


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


def serve(context=None):
    handler = type("Handler", (Odd,), {"connections": 0})
    server = Quiet(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, handler


@pytest.fixture
def transport():
    server, handler = serve()
    found = HttpTransport(
        f"http://127.0.0.1:{server.server_address[1]}/repo", Deadline(10), Limits(requests=8)
    )
    found.handler = handler
    yield found
    found.close()
    server.shutdown()
    server.server_close()


def test_one_connection_serves_many_files(transport):
    for path in ("a", "chunked", "b/c"):
        assert b"".join(transport.read(path)) == BODY
    assert (transport.handler.connections, transport.counters.requests) == (1, 3)
    assert transport.counters.received == 300


def test_an_unread_answer_does_not_spoil_the_next(transport):
    stream = transport.read("a")
    next(stream)
    stream.close()
    assert b"".join(transport.read("b")) == BODY


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("404", DownloadHTTPError, "404"),
        ("500", DownloadHTTPError, "500"),
        ("301", NetworkError, "redirects to 'https://example.org"),
        ("203", NetworkError, "HTTP 203"),
        ("416", NetworkError, "shorter"),
        ("range", NetworkError, "another range"),
        ("zipped", NetworkError, "compressed"),
    ],
)
def test_odd_answers(transport, path, error, words):
    with pytest.raises(error, match=words):
        list(transport.read(path))
    assert b"".join(transport.read("a")) == BODY


def test_too_many_requests(transport):
    for _ in range(8):
        list(transport.read("a"))
    with pytest.raises(NetworkError, match="more than 8 requests"):
        list(transport.read("a"))


def test_a_resumed_file_on_a_server_without_ranges(transport, tmp_path):
    part = tmp_path / "part"
    part.write_bytes(BODY[:37])
    fetch(Download("a", len(BODY), digest_bytes(BODY).removeprefix("sha256:"), part), transport)
    assert part.read_bytes() == BODY


def test_more_bytes_than_were_signed(transport, tmp_path):
    with pytest.raises(TrustError, match="more than the 50 bytes"):
        fetch(Download("a", 50, "0" * 64, tmp_path / "part"), transport)
    with pytest.raises(TrustError, match="not what the signed"):
        fetch(Download("a", len(BODY), "0" * 64, tmp_path / "part"), transport)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize(
    "url", ["ftp://h/", "http:///x", "http://u@h/", "http://h/?q", "http://h:x/", "file://h/x"]
)
def test_urls_that_are_refused(url):
    with pytest.raises(UsageError):
        open_transport(url, Deadline(1), Limits())


def test_a_directory_is_read_as_a_server_is(tmp_path):
    (tmp_path / "a file").write_bytes(BODY)
    for url in (str(tmp_path), tmp_path.as_uri()):
        transport = open_transport(url, Deadline(1), Limits())
        assert isinstance(transport, FileTransport)
        assert b"".join(transport.read("a%20file", 3)) == BODY[3:]
    with pytest.raises(DownloadHTTPError):
        list(transport.read("missing"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInputError):
        list(transport.read("folder"))
    with pytest.raises(BadInputError):
        open_transport(str(tmp_path / "missing"), Deadline(1), Limits())


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + pem)
    return path


def test_tls_is_verified(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server, _ = serve(context)
    url = f"https://127.0.0.1:{server.server_address[1]}/"
    try:
        with pytest.raises(NetworkError, match="certificate"):
            list(HttpTransport(url, Deadline(5), Limits()).read("a"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        transport = HttpTransport(url, Deadline(5), Limits())
        assert b"".join(transport.read("a")) == BODY
        assert b"".join(transport.read("chunked")) == BODY
        transport.close()
    finally:
        server.shutdown()
        server.server_close()
