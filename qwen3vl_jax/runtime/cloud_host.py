"""What Google Cloud's metadata server says of this host: its TPU slice, and when it is taken away.

Source: cloud.google.com/compute/docs/metadata. On other machines there is no such server.
"""

import http.client
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from qwen3vl_jax.runtime.chips import has_tpu

# HOST[:PORT] in place of the usual one, as Google's libraries read it.
SERVER = "GCE_METADATA_HOST"
HOSTS = "TPU_WORKER_HOSTNAMES"
EVERY = 10  # seconds between two looks
# What the server knows, and the values that say that all is well.
NOTICES = {"maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"), "preempted": ("FALSE",)}
# The header of the question and of every answer: a proxy's page has none.
_FLAVOR = "Metadata-Flavor"


def metadata(key: str, environ: Mapping[str, str] = os.environ) -> str:
    """A value of this instance, "" where there is none."""
    server = environ.get(SERVER) or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/{key}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError, http.client.HTTPException):
        asked = urllib.request.Request(url, headers={_FLAVOR: "Google"})
        with direct.open(asked, timeout=2) as answer:
            if answer.headers.get(_FLAVOR) == "Google":
                return answer.read(1 << 16).decode().strip()
    return ""


def has_server(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a metadata server is asked: a named one, or on a TPU host unless jax is told not to."""
    return SERVER in environ or (has_tpu() and not environ.get("TPU_SKIP_MDS_QUERY"))


def slice_hosts(environ: Mapping[str, str] = os.environ) -> int:
    """The hosts of the TPU slice whose chips this process uses; 1 if there is no slice."""
    on_cpu = environ.get("JAX_PLATFORMS", "").startswith("cpu")
    if on_cpu or environ.get("TPU_PROCESS_BOUNDS") == "1,1,1":
        return 1
    named = environ.get(HOSTS, "")
    if not named and has_server(environ):
        named = metadata("attributes/worker-network-endpoints", environ)
    return named.count(",") + 1


def notice(environ: Mapping[str, str] = os.environ) -> str:
    """Why this host is about to be taken away, as the server says it, or ""."""
    found = ((key, metadata(key, environ)) for key in NOTICES)
    return next((f"{key} {value}" for key, value in found if value not in ("", *NOTICES[key])), "")


@contextmanager
def watched(tell: Callable[[str], None]) -> Iterator[None]:
    """Calls `tell` from a thread, once, with a new notice that this host is about to be taken away.

    One that stands at the start is not told: a restart would end at once, again and again.
    """
    ended, telling = threading.Event(), threading.Lock()

    def look() -> None:
        before = notice()
        while not ended.wait(EVERY):
            found = notice()
            with telling:
                if found and found != before and not ended.is_set():
                    tell(found)
                    return

    if has_server():
        threading.Thread(target=look, name="metadata", daemon=True).start()
    try:
        yield
    finally:
        with telling:
            ended.set()
