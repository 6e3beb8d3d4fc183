"""Downloads: the bytes of an http(s) URL, within limits of size and time, from allowed hosts."""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.processing.media_rules import FETCH_SECONDS, MAX_FETCH_BYTES, MediaRules, short

_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(
    url: str,
    max_bytes: int = MAX_FETCH_BYTES,
    timeout: float = FETCH_SECONDS,
    rules: MediaRules | None = None,
) -> bytes:
    """Bytes of a URL, at most `max_bytes`, within `timeout` seconds, redirects included.

    No message holds anything that the server sent. Raises InputError.
    """
    name = short(url)
    result: list[bytes | Exception] = []

    def work() -> None:
        try:
            opener = _opener(url, name, rules or MediaRules())
            result.append(_read(opener, url, name, max_bytes, timeout))
        except Exception as e:
            if isinstance(e, urllib.error.HTTPError):
                e.close()
            result.append(e)

    # A socket's own timeout starts again with each byte that drips in; none covers a name look-up.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout)
    found = result[0] if result else TimeoutError()
    if isinstance(found, bytes):
        return found
    if isinstance(found, InputError):
        raise found
    raise InputError(f"{name}: {_why(found, timeout)}") from found


def _why(error: Exception, timeout: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} seconds"
    code = getattr(error, "code", None)
    if code in _REDIRECTS or "unknown url type" in str(reason):
        return "redirected away from http(s), or without end"
    if code is not None:
        return f"the server answered {code} {http.client.responses.get(code, '')}".rstrip()
    # Other errors may repeat what the server sent.
    if isinstance(reason, OSError):
        return f"cannot be fetched: {one_line(reason)}"
    return "cannot be fetched: no address of http(s), or no answer"


def _read(opener: Any, url: str, name: str, max_bytes: int, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    # Spaces and letters beyond ASCII are written as a browser sends them.
    parts = urllib.parse.urlsplit(url)
    quoted = {
        part: urllib.parse.quote(getattr(parts, part), safe=string.punctuation)
        for part in ("path", "query")
    }
    request = urllib.request.Request(
        parts._replace(**quoted).geturl(), headers={"User-Agent": "qwen3vl-jax"}
    )
    with opener.open(request, timeout=timeout) as response:
        data = bytearray()
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > max_bytes:
                raise InputError(
                    f"{name}: longer than the limit of {max_bytes} bytes; download it and give the "
                    "file, or raise Processor.max_fetch_bytes"
                )
            if time.monotonic() > deadline:
                raise TimeoutError
        expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and len(data) != int(expected):
        raise InputError(f"{name}: the answer ended after {len(data)} of its bytes")
    return bytes(data)


def _opener(url: str, name: str, rules: MediaRules) -> urllib.request.OpenerDirector:
    """An opener for http(s) only, which asks the rules before each connection."""
    first = urllib.parse.urlsplit(url).hostname or ""
    connect = functools.partial(_connect, first=first, name=name, rules=rules)

    class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        def http_open(self, req: Any) -> Any:
            return self.reach(http.client.HTTPConnection, req)

        def https_open(self, req: Any) -> Any:
            return self.reach(http.client.HTTPSConnection, req)

        def reach(self, kind: Any, req: Any) -> Any:
            parts = urllib.parse.urlsplit(req.full_url)
            host = parts.hostname or ""
            port = parts.port or (443 if parts.scheme == "https" else 80)
            rules.check_host(host, port, name)
            is_direct = req.host == parts.netloc
            if not is_direct:  # the proxy looks the host up; what is known of it here is checked
                with contextlib.suppress(OSError):
                    rules.addresses(host, port, host == first, name)

            def connection(*args: Any, **options: Any) -> Any:
                made = kind(*args, **options)
                if is_direct:
                    made._create_connection = connect
                return made

            return self.do_open(connection, req)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Handler(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any) -> Any:
        """Follows a redirect, and closes the answer if that fails."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except Exception:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _connect(
    address: tuple[str, int], timeout: Any, source: Any, *, first: str, name: str, rules: MediaRules
) -> socket.socket:
    """A connection to an address that the rules allow; the name is not looked up again."""
    host, port = address
    error: OSError | None = None
    for place in rules.addresses(host, port, host.lower() == first, name):
        try:
            return socket.create_connection(place[:2], timeout, source)
        except OSError as e:
            error = e
    raise error or OSError("the host has no address")
