"""A publisher's command line, a device's command line, and a real static HTTP server between them."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run

collect_ignore_glob = ["test_*.py"] if None in (find_spec("tuf"), find_spec("cryptography")) else []
DATA = Path(__file__).parents[1] / "data"
PASSPHRASE = "correct horse battery"


class Server:
    """Serves a directory on loopback as any static server does, and counts."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        outer = self
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.sent = 0
        self.fault = lambda handler, content: content
        self.ranges = ranges

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.requests.append(self.path)
                outer.headers.append(dict(self.headers))
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content, start = path.read_bytes(), 0
                asked = self.headers.get("Range")
                if asked and outer.ranges:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                body = outer.fault(self, content[start:])
                if body is None:
                    self.close_connection = True
                    return
                self.wfile.write(body)
                outer.sent += len(body)
                if len(body) < len(content) - start:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self) -> None:
        self.requests.clear()
        self.sent = 0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Runs ``publish ...`` or ``update ...`` in this process; exit code and the JSON object printed."""
    monkeypatch.setenv("EDGE_TCUR_PASSPHRASE", PASSPHRASE)
    monkeypatch.setenv("EDGE_TCUR_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("EDGE_TCUR_UPDATE_URL", raising=False)

    def go(*arguments):
        arguments = [str(argument) for argument in arguments]
        group = edge_tcur if arguments[0] in ("publish", "train", "export") else device
        with pytest.raises(SystemExit) as caught:
            run(group, [*arguments, "--json"])
        out, _ = capsys.readouterr()
        return caught.value.code, json.loads(out)

    return go


@pytest.fixture
def ok(call):
    """The same, for commands that must succeed."""

    def go(*arguments):
        code, payload = call(*arguments)
        assert code == 0, payload
        assert payload["schema_version"] == 1
        return payload

    return go


@pytest.fixture
def repo(tmp_path, ok):
    """An empty signed repository; its keys are beside it."""
    ok("publish", "init", tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def bundle(tmp_path, repo, ok):
    """The shipped bundle, with the repository's root in it."""
    shutil.copytree(DATA / "bundle-v1", tmp_path / "bundle")
    ok("publish", "trust", tmp_path / "bundle", "--repo", repo)
    return tmp_path / "bundle"


@pytest.fixture
def adapters(tmp_path, make_variant):
    """Files of five adapters of the shipped bundle."""
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"adapter-{number}.safetensors")
        paths[-1].write_bytes(make_variant(number))
    return paths


@pytest.fixture
def server(repo):
    found = Server(repo)
    yield found
    found.close()


@pytest.fixture
def make_server():
    made = []

    def make(folder, **options):
        made.append(Server(folder, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()
