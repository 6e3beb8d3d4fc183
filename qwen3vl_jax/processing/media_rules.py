"""Where images and videos may be read from: folders, hosts and addresses; and limits of bytes."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
from typing import Any

from qwen3vl_jax.errors import InputError

MAX_FETCH_BYTES = 64 * 2**20
FETCH_SECONDS = 20.0
_HOW = "--allow-hosts, MediaRules.hosts"
_NAT64 = ipaddress.ip_network("64:ff9b::/32")


@dataclasses.dataclass(frozen=True)
class MediaRules:
    """Where the images and videos of a prompt may be read from.

    root: the folder that local paths begin in and may not leave, links resolved; "" is no limit.
    hosts: the only hosts ("cdn.example.org", "10.0.0.7") and buckets ("gs://bucket") that are read
    from; None is any. trusted: whoever wrote the addresses may use this machine's network; if not,
    hosts with private, loopback or link-local addresses are refused unless `hosts` names them.
    max_batch_bytes: of the patches of one call of a processor.
    """

    root: str = ""
    hosts: tuple[str, ...] | None = None
    trusted: bool = True
    max_batch_bytes: int = 8 * 2**30

    def local(self, path: str, key: str) -> str:
        """The path to open for a local path. Raises InputError for one outside the root."""
        if not self.root:
            return path
        root = os.path.realpath(self.root)
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, real]) != root:
            raise InputError(f"{key}: got {short(path)}, expected a file below the media root")
        return real

    def check_host(self, host: str, port: int | None, key: str) -> None:
        """Raises InputError for a host, or a bucket (gs://name), that is not to be read from."""
        is_bucket = "://" in host
        if self._names(host, port) or (self.hosts is None and not (is_bucket and self.root)):
            return
        raise InputError(f"{key}: got {short(host)}, expected a host that is named ({_HOW})")

    def addresses(self, host: str, port: int, given: bool, key: str) -> list[tuple[Any, ...]]:
        """The addresses of a host as a socket takes them.

        given: whether it is the host that was asked for, not one that a redirect led to. Raises
        InputError if one is private, loopback or link-local and may not be used, OSError for none.
        """
        found = [place for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if self._names(host, port) or all(self._allows(str(place[0]), given) for place in found):
            return found
        raise InputError(
            f"{key}: got a private, loopback or link-local address for {short(host)}, expected a "
            f"public one, or a host that is named ({_HOW})"
        )

    def _names(self, host: str, port: int | None) -> bool:
        named = [name.strip("[]").rstrip("./").lower() for name in self.hosts or ()]
        host = host.rstrip("./").lower()
        return host in named or f"{host}:{port}" in named

    def _allows(self, address: str, given: bool) -> bool:
        ip = ipaddress.ip_address(address)
        ips: list[Any] = [ip]
        if isinstance(ip, ipaddress.IPv6Address):
            ips += [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
            if ip in _NAT64 or int(ip) >> 32 == 0:
                ips.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        ips = [each for each in ips if each is not None]
        if self.trusted and given:
            return not any(each.is_link_local for each in ips)
        local = any(getattr(each, "is_site_local", False) for each in ips)
        return not local and all(each.is_global and not each.is_multicast for each in ips)


def short(text: str, limit: int = 120) -> str:
    """A path or address as a message shows it."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
