"""What Google Cloud's metadata server says of this host: its TPU slice, and when it is taken away.

Source: cloud.google.com/compute/docs/metadata. On other machines there is no such server.
"""

import os
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# HOST[:PORT] in place of the usual server, as Google's own libraries read it.
SERVER = "GCE_METADATA_HOST"
HOSTS = "TPU_WORKER_HOSTNAMES"
# Seconds between two looks.
EVERY = 10
# What the server knows, and the values that say that all is well.
NOTICES = {"maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"), "preempted": ("FALSE",)}
_CHIPS = ("/dev/accel0", "/dev/vfio/0")


def metadata(key: str, environ: Mapping[str, str] = os.environ) -> str:
    """A value of this instance, "" where there is none."""
    server = environ.get(SERVER) or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/{key}"
    with suppress(OSError, ValueError):
        asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(asked, timeout=2) as answer:
            return answer.read(1 << 16).decode().strip()
    return ""


def has_server(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a metadata server is to be asked: on a host with TPU chips, or where one is named."""
    return SERVER in environ or any(Path(chip).exists() for chip in _CHIPS)


def slice_hosts(environ: Mapping[str, str] = os.environ) -> int:
    """The hosts of this host's TPU slice; 1 if there is no slice."""
    named = environ.get(HOSTS, "")
    if not named and has_server(environ):
        named = metadata("attributes/worker-network-endpoints", environ)
    return named.count(",") + 1


def notice(environ: Mapping[str, str] = os.environ) -> str:
    """Why this host is about to be taken away, as the server says it, or ""."""
    for key, well in NOTICES.items():
        value = metadata(key, environ)
        if value and value not in well:
            return f"{key} {value}"
    return ""


@contextmanager
def watched(tell: Callable[[str], None]) -> Iterator[None]:
    """Calls `tell` from a thread, once, with the notice that this host is about to be taken away."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY):
            if found := notice():
                tell(found)
                return

    if has_server():
        threading.Thread(target=look, name="metadata", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
