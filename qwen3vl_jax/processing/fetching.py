"""Where images and videos may be read from, and downloads: the bytes of an http(s) URL within limits."""

import contextlib
import dataclasses
import functools
import http.client
import ipaddress
import os
import socket
import string
import threading
import time
from concurrent.futures import Future
from typing import Any
from urllib import error, parse, request

from qwen3vl_jax.errors import InputError, one_line, unexpected

MAX_FETCH_BYTES = 64 * 2**20
FETCH_SECONDS = 20.0
_NAMED = "a host that is named (--allow-hosts, MediaRules.hosts)"
_NAT64 = ipaddress.ip_network("64:ff9b::/32")
_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclasses.dataclass(frozen=True)
class MediaRules:
    """Where the images and videos of a prompt may be read from.

    root: the folder that local paths begin in and may not leave, links resolved; "" is no limit.
    hosts: the only hosts ("cdn.example.org", "10.0.0.7") and buckets ("gs://bucket") to read from; None is
    any. trusted: whoever wrote the addresses may use this machine's network; if not, private, loopback and
    link-local hosts are refused unless `hosts` names them. max_bytes, seconds: of one download, from a
    Processor's max_fetch_bytes and fetch_seconds. max_batch_bytes: of the patches of one call.
    """

    root: str = ""
    hosts: tuple[str, ...] | None = None
    trusted: bool = True
    max_batch_bytes: int = 8 * 2**30
    max_bytes: int = MAX_FETCH_BYTES
    seconds: float = FETCH_SECONDS

    def local(self, path: str, key: str) -> str:
        """The path to open for a local path. Raises InputError for one outside the root."""
        if not self.root:
            return path
        root = os.path.realpath(self.root)
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, real]) != root:
            raise unexpected(key, short(path), "a file below the media root")
        return real

    def check_host(self, host: str, port: int | None, key: str) -> None:
        """Raises InputError for a host, or a bucket (gs://name), that is not to be read from."""
        is_open = self.hosts is None and not (self.root and "://" in host)
        if not is_open and not self._names(host, port):
            raise unexpected(key, short(host), _NAMED)

    def addresses(self, host: str, port: int, given: bool, key: str) -> list[tuple[Any, ...]]:
        """The addresses of a host for a socket; given: no redirect led here. Raises InputError, OSError."""
        found = [place for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if self._names(host, port) or all(self._allows(str(place[0]), given) for place in found):
            return found
        private = f"a private, loopback or link-local address for {short(host)}"
        raise unexpected(key, private, f"a public one, or {_NAMED}")

    def _names(self, host: str, port: int | None) -> bool:
        named = [name.strip("[]").rstrip("./").lower() for name in self.hosts or ()]
        host = host.rstrip("./").lower()
        return host in named or f"{host}:{port}" in named

    def _allows(self, address: str, given: bool) -> bool:
        ip = ipaddress.ip_address(address)
        ips: list[Any] = [ip]
        if isinstance(ip, ipaddress.IPv6Address):
            held = (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ()))
            ips += [each for each in held if each is not None]
            if ip in _NAT64 or int(ip) >> 32 == 0:
                ips.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if self.trusted and given:
            return not any(each.is_link_local for each in ips)
        local = any(getattr(each, "is_site_local", False) for each in ips)
        return not local and all(each.is_global and not each.is_multicast for each in ips)


def short(text: str, limit: int = 120) -> str:
    """A path or address as a message shows it."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def fetch(url: str, rules: MediaRules | None = None) -> bytes:
    """Bytes of a URL within the rules; messages hold nothing that the server sent. Raises InputError."""
    name, rules = short(url), rules or MediaRules()
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_read(_opener(url, name, rules), url, name, rules))
        except Exception as e:
            if isinstance(e, error.HTTPError):
                e.close()
            result.set_exception(e)

    # A socket's own timeout starts again with each byte that drips in; none covers a name look-up.
    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(rules.seconds)
    except InputError:
        raise
    except Exception as e:
        reason, code = getattr(e, "reason", e), getattr(e, "code", None)
        if isinstance(reason, TimeoutError):
            why = f"no answer within {rules.seconds:g} seconds"
        elif code in _REDIRECTS or "unknown url type" in str(reason):
            why = "redirected away from http(s), or without end"
        elif code is not None:
            why = f"the server answered {code} {http.client.responses.get(code, '')}".rstrip()
        else:
            # Other errors may repeat what the server sent.
            is_known, shown = isinstance(reason, OSError), "no address of http(s), or no answer"
            why = f"cannot be fetched: {one_line(reason) if is_known else shown}"
        raise InputError(f"{name}: {why}") from e


def _read(opener: Any, url: str, name: str, rules: MediaRules) -> bytes:
    deadline = time.monotonic() + rules.seconds
    # Spaces and letters beyond ASCII are written as a browser sends them.
    parts, quote = parse.urlsplit(url), functools.partial(parse.quote, safe=string.punctuation)
    quoted = parts._replace(path=quote(parts.path), query=quote(parts.query)).geturl()
    asked = request.Request(quoted, headers={"User-Agent": "qwen3vl-jax"})
    data = bytearray()
    with opener.open(asked, timeout=rules.seconds) as response:
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > rules.max_bytes:
                limit = f"{name}: longer than the limit of {rules.max_bytes} bytes"
                advice = "download it and give the file, or raise Processor.max_fetch_bytes"
                raise InputError(f"{limit}; {advice}")
            if time.monotonic() > deadline:
                raise TimeoutError
        expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and len(data) != int(expected):
        raise InputError(f"{name}: the answer ended after {len(data)} of its bytes")
    return bytes(data)


def _opener(url: str, name: str, rules: MediaRules) -> request.OpenerDirector:
    """An opener for http(s) only, which asks the rules before each connection."""
    first = parse.urlsplit(url).hostname or ""

    def connect(address: tuple[str, int], timeout: Any, source: Any) -> socket.socket:
        """A connection to an address that the rules allow; the name is not looked up again."""
        host, port = address
        last = OSError("the host has no address")
        for place in rules.addresses(host, port, host.lower() == first, name):
            try:
                return socket.create_connection(place[:2], timeout, source)
            except OSError as e:
                last = e
        raise last

    class Handler(request.HTTPHandler, request.HTTPSHandler):
        def http_open(self, req: Any) -> Any:
            parts = parse.urlsplit(req.full_url)
            https, plain = http.client.HTTPSConnection, http.client.HTTPConnection
            # The connection may be to a proxy; the port is the URL's own.
            kind = https if req.type == "https" else plain
            host, port = parts.hostname or "", parts.port
            port = port or (https if parts.scheme == "https" else plain).default_port
            rules.check_host(host, port, name)
            is_direct = req.host == parts.netloc
            # A proxy looks the host up; what is known of it here is checked.
            if not is_direct:
                with contextlib.suppress(OSError):
                    rules.addresses(host, port, host == first, name)

            def connection(*args: Any, **options: Any) -> Any:
                made: Any = kind(*args, **options)
                if is_direct:
                    made._create_connection = connect
                return made

            return self.do_open(connection, req)

        https_open = http_open

    opener = request.OpenerDirector()
    errors = request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler
    for handler in (request.ProxyHandler, Handler, _Redirects, *errors):
        opener.add_handler(handler())
    return opener


class _Redirects(request.HTTPRedirectHandler):
    def http_error_302(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any) -> Any:
        """Follows a redirect, and closes the answer if that fails."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except Exception:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
