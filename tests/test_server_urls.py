"""Fetching URLs: off by default, and never a way into the network behind the server."""

import asyncio
import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minim3.server import urls
from minim3.server.errors import BadRequest
from minim3.server.media import load_media
from minim3.server.settings import ServerSettings

PUBLIC = ServerSettings(allow_urls=True)

INSIDE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "127.255.255.254", "localhost", "localhost.",
    "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[2001:0:1:2::80ff:fffe]", "[fe80::1]", "[fec0::1]", "[fc00::1]",
    "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[100::1]",
]  # fmt: skip


def fetch(url: str, settings: ServerSettings = PUBLIC, max_bytes: int = 10**6) -> bytes:
    async def run() -> bytes:
        async with asyncio.timeout(20):
            return await urls.fetch(url, settings, max_bytes=max_bytes)

    return asyncio.run(run())


def refusal(url: str, settings: ServerSettings = PUBLIC, **options: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        fetch(url, settings, **options)
    assert len(caught.value.message) < 500
    return caught.value


@pytest.fixture
def nothing_connects(monkeypatch: Any) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(asyncio, "open_connection", refuse)


def resolve_to(monkeypatch: Any, answers: dict[str, list[list[str]]]) -> list[str]:
    """Name servers that answer differently each time they are asked; returns the list of the names asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        found = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


# --- what is refused before anything is connected to ---


def test_urls_are_off_by_default(nothing_connects: None) -> None:
    error = refusal("http://example.com/a.png", ServerSettings())
    assert error.code == "url_not_allowed"
    assert "data URL" in error.message


@pytest.mark.parametrize("host", INSIDE)
def test_addresses_inside_are_refused_however_they_are_written(nothing_connects: None, host: str) -> None:
    """Loopback, private, link-local (the metadata of clouds), shared, multicast, reserved, and IPv6 around them."""
    for scheme in ("http", "https"):
        assert refusal(f"{scheme}://{host}/latest/meta-data").code in ("url_not_allowed", "url_failed")


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "64:ff9b::808:808"])
def test_public_addresses_are_public(address: str) -> None:
    assert urls.is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/", "file:///etc/passwd", "gopher://example.com/", "//example.com/", "example.com",
        "http://user:password@example.com/", "http://user@example.com/", "http://example.com:22/",
        "http://example.com:80443/", "http:///a", "http://", "http://exa mple.com/", "http://example.com/\r\nX: y",
        "http://[::1/", "http://a" + "a" * 9000, "http://-bad-/", "http://exam\\ple.com/", "http://example.com\x00.evil/",
        "http://xn--\udcff/",
    ],
)  # fmt: skip
def test_strange_urls_are_refused(nothing_connects: None, url: str) -> None:
    assert refusal(url).code == "url_not_allowed"


def test_a_name_with_one_address_inside_is_refused(nothing_connects: None, monkeypatch: Any) -> None:
    """A name server that mixes addresses would otherwise win by luck."""
    resolve_to(monkeypatch, {"mixed.example": [["93.184.216.34", "10.0.0.1"]]})
    assert refusal("http://mixed.example/").code == "url_not_allowed"


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: Any) -> None:
    """DNS rebinding: public when it is checked, 127.0.0.1 when it is used."""
    asked = resolve_to(monkeypatch, {"rebinding.example": [["93.184.216.34"], ["127.0.0.1"]]})
    connected = []

    async def connect(address: str, port: int, **options: Any) -> None:
        connected.append((address, port, options["server_hostname"]))
        raise OSError("enough")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    assert refusal("https://rebinding.example/").code == "url_failed"
    assert connected == [("93.184.216.34", 443, "rebinding.example")]
    assert asked == ["rebinding.example"]
    assert refusal("https://rebinding.example/").code == "url_not_allowed"


@pytest.mark.parametrize(
    ("url", "allowed", "passes"),
    [
        ("http://a.example/", ("a.example",), True),
        ("http://A.EXAMPLE./", ("a.example",), True),
        ("http://b.a.example/", ("a.example",), False),
        ("http://b.a.example/", (".a.example",), True),
        ("http://a.example/", (".a.example",), False),
        ("http://evila.example/", (".a.example",), False),
        ("http://a.example.evil.example/", ("a.example",), False),
        ("http://a.example:8080/", ("a.example",), False),
        ("http://a.example:8080/", ("a.example:8080",), True),
        ("http://a.example/", ("a.example:8080",), False),
        ("http://93.184.216.34/", ("93.184.216.0/24",), True),
        ("http://93.184.217.34/", ("93.184.216.0/24",), False),
        ("http://[2606:2800::1]/", ("2606:2800::/32",), True),
    ],
)
def test_the_list_of_hosts(url: str, allowed: tuple[str, ...], passes: bool) -> None:
    settings = ServerSettings(allow_urls=True, allowed_hosts=allowed)
    if passes:
        urls.check_url(url, settings)
    else:
        with pytest.raises(BadRequest, match=r"allowed hosts|port"):
            urls.check_url(url, settings)


def test_an_allowed_name_does_not_open_the_addresses_inside(nothing_connects: None, monkeypatch: Any) -> None:
    """Whoever controls the name would control what is fetched; the address itself must be named."""
    resolve_to(monkeypatch, {"files.example": [["10.0.0.7"]]})
    named = ServerSettings(allow_urls=True, allowed_hosts=("files.example",))
    assert refusal("http://files.example/", named).code == "url_not_allowed"
    both = ServerSettings(allow_urls=True, allowed_hosts=("files.example", "10.0.0.0/24"))
    with pytest.raises(AssertionError, match="a connection was opened"):
        fetch("http://files.example/", both)


# --- what servers answer ---


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Host:
    """An HTTP server on 127.0.0.1 that sends what the test wants; `requests` are those that came."""

    def __init__(self, answer: Callable[[socket.socket, str], None]) -> None:
        self.requests: list[str] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.settings = ServerSettings(allow_urls=True, allowed_hosts=(f"127.0.0.1:{self.port}",))
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while b"\r\n\r\n" not in request and (data := connection.recv(65536)):
                request += data
            self.requests.append(request.decode())
            with contextlib.suppress(OSError):  # the client had enough
                self._answer(connection, request.split(b" ")[1].decode())

    def close(self) -> None:
        self._listener.close()


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.fixture
def host() -> Iterator[Host]:
    def answer(connection: socket.socket, path: str) -> None:
        plain = {
            "/ok": ok(b"body"),
            "/empty": ok(b""),
            "/until-closed": b"HTTP/1.0 200 OK\r\n\r\nbody",
            "/chunked": CHUNKED + b"4\r\nbody\r\n0\r\n\r\n",
            "/redirect": moved("/ok"),
            "/redirect-301": moved(f"http://127.0.0.1:{connection.getsockname()[1]}/ok?x=%20y", 301),
            "/loop": moved("/loop"),
            "/inside": moved("http://127.0.0.1:1/"),
            "/metadata": moved("http://169.254.169.254/latest/meta-data/"),
            "/file": moved("file:///etc/passwd"),
            "/strange": moved("http://["),
            "/nowhere": b"HTTP/1.1 302 Moved\r\nContent-Length: 0\r\n\r\n",
            "/missing": b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret",
            "/large": ok(b"x" * 20_000),
            "/large-chunks": CHUNKED + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 9,
            "/stated": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            "/gzip": ok(b"body", "Content-Encoding: gzip"),
            "/cut": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbody",
            "/garbage": b"\x00\x01\x02\r\n\r\n",
            "/endless-headers": b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * 100_000 + b"\r\n\r\n",
            "/nothing": b"",
        }  # fmt: skip
        if path == "/trickle":
            for byte in ok(b"body"):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        else:
            connection.sendall(plain[path.split("?")[0]])

    server = Host(answer)
    yield server
    server.close()


@pytest.mark.parametrize("path", ["/ok", "/until-closed", "/chunked", "/redirect", "/redirect-301"])
def test_what_is_allowed_is_fetched(host: Host, path: str) -> None:
    assert fetch(host.url + path, host.settings) == b"body"
    assert "\r\naccept-encoding: identity" in host.requests[0].lower()
    assert "cookie" not in host.requests[0].lower()
    assert "authorization" not in host.requests[0].lower()


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/loop", "url_failed", "more than 3 redirects"),
        ("/inside", "url_not_allowed", "not on the list"),
        ("/metadata", "url_not_allowed", "not on the list"),
        ("/file", "url_not_allowed", "only http"),
        ("/strange", "url_failed", "no URL"),
        ("/nowhere", "url_failed", "302"),
        ("/missing", "url_failed", "404"),
        ("/large", "media_too_large", "more than 10000 bytes"),
        ("/large-chunks", "media_too_large", "more than 10000 bytes"),
        ("/stated", "media_too_large", "more than 10000 bytes"),
        ("/gzip", "url_failed", "compressed"),
        ("/cut", "url_failed", "failed"),
        ("/garbage", "url_failed", "failed"),
        ("/endless-headers", "url_failed", "failed"),
        ("/nothing", "url_failed", "failed"),
    ],
)
def test_answers_that_are_refused(host: Host, path: str, code: str, words: str) -> None:
    error = refusal(host.url + path, host.settings, max_bytes=10_000)
    assert error.code == code
    assert words in error.message
    assert "secret" not in error.message


def test_after_a_redirect_the_addresses_are_checked_again(host: Host) -> None:
    """Without a list of hosts: the first address is let through by name, the second must be public by itself."""
    open_first = ServerSettings(allow_urls=True, allowed_hosts=(f"127.0.0.1:{host.port}", "169.254.169.254:81"))
    error = refusal(host.url + "/metadata", open_first)
    assert error.code == "url_not_allowed"
    assert "169.254.169.254" in error.message


def test_a_server_that_trickles_meets_the_time_limit(host: Host) -> None:
    settings = ServerSettings(allow_urls=True, allowed_hosts=host.settings.allowed_hosts, media_seconds=0.5)
    part = {"type": "image_url", "image_url": {"url": host.url + "/trickle"}}
    start = time.monotonic()
    with pytest.raises(BadRequest) as caught:
        asyncio.run(load_media([{"role": "user", "content": [part]}], settings))
    assert caught.value.code == "media_timeout"
    assert time.monotonic() - start < 5


def test_a_picture_behind_a_url_is_loaded() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(file, "PNG")
    server = Host(lambda connection, _: connection.sendall(ok(file.getvalue(), "Content-Type: image/png")))
    parts = [
        {"type": "image_url", "image_url": {"url": url}} for url in (f"{server.url}/a.png", data_url(file.getvalue()))
    ]
    (message,) = asyncio.run(load_media([{"role": "user", "content": parts}], server.settings))
    assert [part["image"].shape for part in message["content"]] == [(3, 56, 56)] * 2
    server.close()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
