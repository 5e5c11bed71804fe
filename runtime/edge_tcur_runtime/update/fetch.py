"""Bounded transport: the only place of this runtime that opens a socket.

python-tuf's own fetcher bounds the silence between two bytes, not the whole: a server that sends one
byte in twenty seconds holds a device for ever, and a cut body ends in an error of urllib3. Here every
wait is bounded by what is left of one deadline, and every failure is a `NetworkError`.

Nothing about the device is sent: no id, no list of what it has. Redirects are not followed; proxies of
the environment are not used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import io
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from tuf.api.exceptions import DownloadHTTPError, DownloadLengthMismatchError
from tuf.ngclient import FetcherInterface

from edge_tcur_runtime import __version__
from edge_tcur_runtime.atomic import disk_error
from edge_tcur_runtime.errors import BadInputError, EdgeError, NetworkError, TrustError, UsageError
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES

_CHUNK = 1 << 16  # bytes read at a time
_PARTIAL = 206
_RANGE_REFUSED = 416
_SMALL_BODY = 1 << 14  # of an error page: read, so that the connection can serve the next file
_AGAIN = "run it again later; nothing was changed, and what arrived is kept"
Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True)
class Limits:
    """Bounds of one update. A server can cost a device no more than this.

    Attributes:
        total_seconds: from the first connection to the last byte.
        bundle_seconds: the same where a bundle is fetched first.
        silence_seconds: longest wait for one read, a connection or a handshake.
        root_bytes, timestamp_bytes, snapshot_bytes, targets_bytes: of one metadata file.
        root_rotations: new root versions accepted in one update.
        requests: in one update; a bundle's first installation counts its chunks on top.
        index_bytes: of a bundle's index.
        bundle_bytes: of a bundle, all its files; a larger one is refused before its first chunk.
        adapter_bytes: of an adapter; a larger one is skipped.
    """

    total_seconds: float = 300.0
    bundle_seconds: float = 3600.0
    silence_seconds: float = 20.0
    root_bytes: int = 64 * 2**10
    timestamp_bytes: int = 4 * 2**10
    snapshot_bytes: int = 8 * 2**10
    targets_bytes: int = 512 * 2**10
    root_rotations: int = 32
    requests: int = 64
    index_bytes: int = 2**20
    bundle_bytes: int = 4 * 2**30
    adapter_bytes: int = MAX_FILE_BYTES


class Deadline:
    """The end of everything, in seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left; NetworkError where there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise NetworkError(
                f"the update did not end within {self.seconds:g} s",
                hint=f"{_AGAIN}; --deadline allows more time",
            )
        return left


@dataclass
class Counters:
    """What an update cost: requests, and bytes of bodies received."""

    requests: int = 0
    received: int = 0


class Transport(Protocol):
    """Reads files of a repository by their path relative to its root, e.g. ``metadata/timestamp.json``."""

    counters: Counters

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on. Nothing is read before the first `next`.

        Raises:
            DownloadHTTPError: 404 where there is no such file, and other HTTP errors.
            NetworkError: cut off, too slow, or no answer.
        """


class _DeadlineIO(io.RawIOBase):
    """A socket for reading whose every wait ends with the deadline, headers included."""

    def __init__(self, sock: socket.socket, deadline: Deadline, silence: float) -> None:
        self._sock, self._deadline, self._silence = sock, deadline, silence
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open after its connection's close

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Bytes received into `buffer`; 0 at the end."""
        self._sock.settimeout(min(self._deadline.remaining(), self._silence))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Gives up the socket."""
        self._raw.close()
        super().close()


class HttpTransport:
    """A static web server or object store. One connection, kept open while the server keeps it open."""

    def __init__(self, url: str, deadline: Deadline, limits: Limits) -> None:
        self.counters = Counters()
        self._parts: SplitResult = urlsplit(url if url.endswith("/") else f"{url}/")
        self._deadline, self._limits = deadline, limits
        self._connection: http.client.HTTPConnection | None = None
        self.allowed = limits.requests

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See `Transport.read`."""
        url = f"{self._parts.scheme}://{self._parts.netloc}{self._parts.path}{path}"
        try:
            with contextlib.closing(self._request(path, start)) as response:
                if response.status >= 400:
                    self._drain(response)
                _check_status(response, url, start)
                yield from self._body(response, url, start)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            self._deadline.remaining()
            raise _network_error(error, url) from error
        except DownloadHTTPError:
            raise  # drained, or closed
        except BaseException:
            self.close()  # the rest of an unread answer is on the line
            raise

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(self, path: str, start: int) -> http.client.HTTPResponse:
        """The answer's headers; a kept connection that the server has closed meanwhile is opened again."""
        reused = self._connection is not None
        try:
            return self._send(path, start)
        except (http.client.RemoteDisconnected, ConnectionError):
            self.close()
            if not reused:
                raise
            return self._send(path, start)

    def _send(self, path: str, start: int) -> http.client.HTTPResponse:
        self.counters.requests += 1
        if self.counters.requests > self.allowed:
            raise NetworkError(f"the update needed more than {self.allowed} requests", hint=_AGAIN)
        headers = {"User-Agent": f"edge-tcur-runtime/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        connection = self._connection or self._connect()
        self._connection = connection
        if connection.sock is not None:
            connection.sock.settimeout(self._wait())
        connection.request("GET", self._parts.path + path, headers=headers)
        return connection.getresponse()

    def _connect(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        options: dict[str, Any] = {"context": ssl.create_default_context()} if secure else {}
        host = self._parts.hostname or ""
        connection = kind(host, self._parts.port, timeout=self._wait(), **options)
        deadline, silence = self._deadline, self._limits.silence_seconds

        class Response(http.client.HTTPResponse):
            def __init__(self, sock: socket.socket, *arguments: Any, **more: Any) -> None:
                super().__init__(sock, *arguments, **more)
                self.fp.close()
                self.fp = io.BufferedReader(_DeadlineIO(sock, deadline, silence))

        connection.response_class = Response
        # http.client gives every address of a name the whole timeout; there is no public way to say otherwise
        connection._create_connection = self._dial  # type: ignore[attr-defined]
        return connection

    def _wait(self) -> float:
        return min(self._deadline.remaining(), self._limits.silence_seconds)

    def _drain(self, response: http.client.HTTPResponse) -> None:
        """Reads a short error page; a longer one ends the connection."""
        if response.length is None or response.length > _SMALL_BODY:
            self.close()
            return
        while chunk := response.read1(_CHUNK):
            self.counters.received += len(chunk)

    def _dial(self, address: tuple[str, int], *_ignored: object) -> socket.socket:
        """A connection to the first address that answers; all of them together end with the deadline."""
        failed: OSError = OSError(errno.EHOSTUNREACH, "the name has no address")
        for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            try:
                found = self._reach(socket.socket(family, kind, protocol), place)
                break
            except OSError as error:
                failed = error
        else:
            raise failed
        return found

    def _reach(self, found: socket.socket, place: Any) -> socket.socket:
        try:
            found.settimeout(self._wait())
            found.connect(place)
        except BaseException:
            found.close()
            raise
        return found

    def _body(self, response: http.client.HTTPResponse, url: str, start: int) -> Iterator[bytes]:
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise NetworkError(
                "the server sends a compressed body", where=url, hint="store files as they are"
            )
        skip = start if response.status != _PARTIAL else 0  # a server without ranges sends all of it
        expected = response.length
        got = 0
        while chunk := response.read1(_CHUNK):
            got += len(chunk)
            self.counters.received += len(chunk)
            self._deadline.remaining()
            dropped = min(skip, len(chunk))
            skip -= dropped
            if chunk[dropped:]:
                yield chunk[dropped:]
        if expected is not None and got < expected:
            raise NetworkError(
                f"the server broke off after {got} of {expected} bytes", where=url, hint=_AGAIN
            )


class FileTransport:
    """A mirror in a directory: a USB stick, a mounted share, a ``file://`` URL."""

    def __init__(self, root: Path, deadline: Deadline) -> None:
        self.counters = Counters()
        self._root, self._deadline = root, deadline

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See `Transport.read`."""
        self.counters.requests += 1
        yield from self._read(self._root / unquote(path), start)

    def close(self) -> None:
        """Nothing is kept open."""

    def _read(self, place: Path, start: int) -> Iterator[bytes]:
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise BadInputError("not a regular file", where=str(place))
            with os.fdopen(descriptor, "rb") as file:
                file.seek(start)
                while chunk := file.read(_CHUNK):
                    self._deadline.remaining()
                    self.counters.received += len(chunk)
                    yield chunk
        except FileNotFoundError as error:
            raise DownloadHTTPError(f"no such file: {place}", 404) from error
        except OSError as error:
            hint = "is the mirror still mounted? What arrived is kept"
            raise NetworkError(f"cannot read: {error.strerror}", where=str(place), hint=hint) from error


class CacheTransport(FileTransport):
    """What this device fetched before: its metadata cache, and downloads that were not yet used."""

    def __init__(self, metadata: Path, downloads: Path, deadline: Deadline) -> None:
        super().__init__(metadata, deadline)
        self._downloads = downloads

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See `Transport.read`."""
        self.counters.requests += 1
        name = Path(path).name
        if not path.startswith("metadata/"):
            yield from self._read(self._downloads / name.split(".")[0], start)
        elif name.endswith(".root.json"):
            yield from self._read(self._root / "root_history" / name, start)
        else:
            yield from self._read(self._root / ".".join(name.split(".")[-2:]), start)


class TufFetcher(FetcherInterface):  # type: ignore[misc]
    """python-tuf's view of a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._transport.read(url.removeprefix("repository:/"))

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The bytes of a metadata file; python-tuf's own way needs a place for temporary files."""
        content = bytearray()
        for chunk in self.fetch(url):
            content += chunk
            if len(content) > max_length:
                raise DownloadLengthMismatchError(f"{url}: more than the {max_length} bytes that are allowed")
        return bytes(content)


def open_transport(url: str, deadline: Deadline, limits: Limits) -> HttpTransport | FileTransport:
    """The transport for ``http://``, ``https://``, ``file://`` or the path of a directory.

    Raises:
        UsageError: another scheme, or a URL without a host.
        BadInputError: no such directory.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        try:
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"not a URL: {error}", where=url) from error
        if not host or parts.query or parts.fragment or parts.username:
            raise UsageError("expected http(s)://host/path/", where=url, hint="no user, query or fragment")
        return HttpTransport(url, deadline, limits)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise UsageError(
            "not a place to update from", where=url, hint="http://, https://, file:/// or a directory"
        )
    root = Path(unquote(parts.path) if parts.scheme else url)
    if not root.is_dir():
        raise BadInputError("there is no such directory", where=str(root), hint="is the mirror mounted?")
    return FileTransport(root, deadline)


@dataclass
class Download:
    """One file to fetch: its path in the repository, what its bytes must be, and where they go.

    Attributes:
        path: in the repository.
        size: bytes, exactly.
        sha256: hex.
        part: the file that grows; a part left over from a broken download is continued.
    """

    path: str
    size: int
    sha256: str
    part: Path
    progress: Progress = field(default=lambda _done, _size: None)


def fetch(download: Download, transport: Transport) -> None:
    """Fetches a file into `download.part`, continuing what is there; verified and synced on return.

    Raises:
        TrustError: other bytes than were promised; the part is removed.
        NetworkError: cut off, missing or too slow; the part is kept for the next try.
        DiskError: it cannot be written.
    """
    begun = download.part.exists()
    _append(download, transport)
    if _digest(download.part) == (download.size, download.sha256):
        return
    discard(download.part)
    if begun:  # what was there before may have been damaged: once more from the start
        _append(download, transport)
        if _digest(download.part) == (download.size, download.sha256):
            return
        discard(download.part)
    raise TrustError(
        f"the server's {download.path} is not what the signed metadata promises",
        hint="nothing was changed; tell the publisher, or use another mirror",
    )


def _append(download: Download, transport: Transport) -> None:
    try:
        with open(os.open(download.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            done = min(file.seek(0, os.SEEK_END), download.size)
            file.truncate(done)
            file.seek(done)
            if done < download.size:
                _receive(download, transport, file, done)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, download.part) from error


def _receive(download: Download, transport: Transport, file: Any, done: int) -> None:
    try:
        for chunk in transport.read(download.path, done):
            if done + len(chunk) > download.size:
                file.truncate(0)
                raise TrustError(
                    f"the server sends more than the {download.size} bytes that are signed",
                    where=download.path,
                    hint="nothing was changed; tell the publisher, or use another mirror",
                )
            file.write(chunk)
            done += len(chunk)
            download.progress(done, download.size)
    except DownloadHTTPError as error:
        raise NetworkError(
            f"the server has no such file ({error.status_code})", where=download.path, hint=_AGAIN
        ) from error
    if done < download.size:
        raise NetworkError(f"{done} of {download.size} bytes", where=download.path, hint=_AGAIN)


def _digest(path: Path) -> tuple[int, str]:
    state, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            size += len(chunk)
    return size, state.hexdigest()


def discard(path: Path) -> None:
    """Removes a part; DiskError where it cannot be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def _check_status(response: http.client.HTTPResponse, url: str, start: int) -> None:
    status = response.status
    if 300 <= status < 400:
        target = response.getheader("Location", "elsewhere")
        raise NetworkError(f"the server redirects to {target[:200]!r}", where=url, hint="give that URL")
    if status == _PARTIAL and not (response.getheader("Content-Range") or "").startswith(f"bytes {start}-"):
        raise NetworkError("the server answers with another range", where=url, hint=_AGAIN)
    if status == _RANGE_REFUSED:
        raise NetworkError("the server's file is shorter than what was promised", where=url, hint=_AGAIN)
    if status >= 400:
        raise DownloadHTTPError(f"{url}: HTTP {status}", status)
    if status not in (200, _PARTIAL):
        raise NetworkError(f"the server answers with HTTP {status}", where=url, hint=_AGAIN)


def _network_error(error: Exception, url: str) -> EdgeError:
    if isinstance(error, TimeoutError):
        return NetworkError("the server does not answer, or too slowly", where=url, hint=_AGAIN)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return NetworkError(f"cannot fetch: {reason or type(error).__name__}", where=url, hint=_AGAIN)
