"""Fetching what a client's URL names, without becoming the client's way into the network behind the server.

Off unless `allow_urls` is set. Then for every request, the ones after redirects too: http or https; a host of the
allow-list, if there is one; the name is resolved once, every address it resolves to must be public, and the connection
goes to one of just these addresses (a name that resolves differently a moment later changes nothing). No proxies, no
cookies, no credentials, no compressed answers; limits on redirects, bytes and, for everything together, time.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from minim3.server.errors import BadRequest
from minim3.server.settings import ServerSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL_CHARACTERS = 8192
_READ_BYTES = 64 * 1024
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SAFE = "%/:=&?~+!$,;'@()*[]"  # what stands in a URL as it is, escapes among it
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?")


async def fetch(url: str, settings: ServerSettings, *, max_bytes: int) -> bytes:
    """The body behind a URL. Whoever calls sets the time limit (`asyncio.timeout`).

    Raises:
        BadRequest: fetching is off, the URL or where it leads is not allowed, the answer is not 200 or is too large, or
            the connection fails.
    """
    if not settings.allow_urls:
        raise refused(url, "URLs are not fetched here; send a data URL")
    for _ in range(settings.max_redirects + 1):
        try:
            status, location, body = await _get(url, settings, max_bytes)
        except (OSError, h11.ProtocolError, ssl.SSLError, asyncio.IncompleteReadError) as error:
            raise failed(url, f"the connection failed ({type(error).__name__})") from None
        if status == 200:
            return body
        if status not in _REDIRECTS or location is None:
            raise failed(url, f"the server answered {status}")
        try:
            url = urljoin(url, location)
        except ValueError:
            raise failed(url, "it redirects to something that is no URL") from None
    raise failed(url, f"more than {settings.max_redirects} redirects")


def refused(url: str, why: str) -> BadRequest:
    return BadRequest(f"{_shown(url)}: {why}", param="messages", code="url_not_allowed")


def failed(url: str, why: str) -> BadRequest:
    return BadRequest(f"{_shown(url)} cannot be fetched: {why}", param="messages", code="url_failed")


def _shown(url: str) -> str:
    """The URL as errors show it: without its query, which may hold a key, and not endless."""
    text = url.split("?", 1)[0]
    return repr(text if len(text) <= 200 else text[:200] + "...")


def check_url(url: str, settings: ServerSettings) -> tuple[SplitResult, str, int]:
    """The parts of a URL that may be fetched, its host in plain letters, and its port.

    Raises:
        BadRequest: another scheme, credentials, a strange host or port, or a host outside the allow-list.
    """
    if len(url) > _MAX_URL_CHARACTERS or any(character <= " " or character == "\x7f" for character in url):
        raise refused(url, "it is longer than a URL, or holds white space or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
        if not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:  # also UnicodeError
        raise refused(url, "it cannot be read") from None
    if parts.scheme not in _PORTS:
        raise refused(url, "only http and https are fetched")
    if parts.username is not None or parts.password is not None:
        raise refused(url, "it holds a user name")
    if _literal(host) is None and not _HOST.fullmatch(host):
        raise refused(url, "its host is no name and no address")
    usual = _PORTS[parts.scheme]
    port = usual if port is None else port
    named = any(_names(entry, host, port, usual) for entry in settings.allowed_hosts)
    if settings.allowed_hosts and not named:
        raise refused(url, f"the host {host}{'' if port == usual else f':{port}'} is not on the list of allowed hosts")
    if port != usual and not named:
        raise refused(url, f"port {port} is not {usual}")
    return parts, host, port


def _names(entry: str, host: str, port: int, usual: int) -> bool:
    """Whether an entry of the allow-list names this host: "host", "host:port", ".domain", an address, a network."""
    entry = entry.strip().lower()
    address, network = _literal(host), _network(entry)
    if network is not None:
        return address is not None and port == usual and address in network
    name, _, its_port = entry.partition(":") if entry.count(":") <= 1 else (entry, "", "")
    if str(port) != (its_port or str(usual)):
        return False
    return host.endswith(name) and host != name[1:] if name.startswith(".") else host == name


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet: not private, loopback, link-local, shared, multicast, reserved or
    unspecified, nor an IPv6 form that leads to such an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address.teredo is not None:
            inner = address.teredo[1]
        if address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1):  # the last: ::a.b.c.d
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _may_connect(address: Address, port: int, allowed: Sequence[str]) -> bool:
    """Public, or named by its own address or network (a name on the list does not open what it resolves to)."""
    if is_public(address):
        return True
    for entry in allowed:
        network = _network(entry.strip())
        if network is not None and address in network:
            return True
        if entry.strip() == f"{address}:{port}":
            return True
    return False


async def resolve(url: str, host: str, port: int, settings: ServerSettings) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of a host, all of which may be connected to.

    Raises:
        BadRequest: it has no address, or one that is not public.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
    except (socket.gaierror, UnicodeError):
        raise failed(url, f"the host {host} has no address") from None
    addresses: list[tuple[socket.AddressFamily, str]] = list(
        dict.fromkeys((family, str(target[0])) for family, _, _, _, target in found)
    )
    for _, text in addresses:
        # A scope ("fe80::1%eth0") is link-local whatever follows.
        if "%" in text or not _may_connect(ipaddress.ip_address(text), port, settings.allowed_hosts):
            raise refused(url, f"the host {host} is not on the public internet")
    return addresses


async def _get(url: str, settings: ServerSettings, max_bytes: int) -> tuple[int, str | None, bytes]:
    """One request: status, Location, body (empty unless the status is 200)."""
    parts, host, port = check_url(url, settings)
    addresses = await resolve(url, host, port, settings)
    context = ssl.create_default_context() if parts.scheme == "https" else None
    reader, writer = await _connect(addresses, port, context, host)
    try:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=32 * 1024)
        shown_host = f"[{host}]" if ":" in host else host
        request = h11.Request(
            method="GET",
            target=quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""),
            headers=[
                ("Host", shown_host if port == _PORTS[parts.scheme] else f"{shown_host}:{port}"),
                ("User-Agent", "minim3"),
                ("Accept", "image/*, video/*, */*;q=0.1"),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
            ],
        )
        writer.write(connection.send(request) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        return await _read(url, connection, reader, max_bytes)
    finally:
        writer.close()


async def _connect(
    addresses: Sequence[tuple[socket.AddressFamily, str]], port: int, context: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the first address that answers; TLS is checked against the host's name."""
    last: OSError | None = None
    for family, address in addresses:
        try:
            return await asyncio.open_connection(
                address, port, family=family, ssl=context, server_hostname=host if context else None
            )
        except OSError as error:
            last = error
    assert last is not None
    raise last


async def _read(
    url: str, connection: h11.Connection, reader: asyncio.StreamReader, max_bytes: int
) -> tuple[int, str | None, bytes]:
    body = bytearray()
    status, location = 0, None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.lower(): value.decode("latin-1") for name, value in event.headers}
            location = headers.get(b"location")
            if status != 200:
                return status, location, b""
            if headers.get(b"content-encoding", "identity").strip().lower() != "identity":
                raise failed(url, "the answer is compressed")
            length = headers.get(b"content-length", "")
            if length.isdecimal() and int(length) > max_bytes:
                raise _too_large(url, max_bytes)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                raise _too_large(url, max_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return status, location, bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise failed(url, "the connection was closed early")


def _too_large(url: str, max_bytes: int) -> BadRequest:
    return BadRequest(f"{_shown(url)} has more than {max_bytes} bytes", param="messages", code="media_too_large")
