"""A Google Cloud Storage of this process: objects in a dict, the JSON API that TensorStore speaks, and
the client by which etils.epath opens gs://. It renames nothing and appends to nothing.
"""

import contextlib
import io
import itertools
import json
import os
import sys
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Store:
    """{"BUCKET/NAME": (bytes, generation)}; `log` has each (kind of call, name) since it was cleared."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.log: list[tuple[str, str]] = []
        self.lock, self.count = threading.Lock(), itertools.count(1)
        self.fetched = 0  # bytes that were read

    def put(self, name: str, data: bytes, only_if: int | None = None) -> int | None:
        """The new generation; None where the object does not have the one that was expected."""
        with self.lock:
            if only_if is not None and self.objects.get(name, (b"", 0))[1] != only_if:
                return None
            self.log.append(("put", name))
            self.objects[name] = (bytes(data), next(self.count))
            return self.objects[name][1]

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        data = self.objects[name][0][start:end]
        self.log.append(("read", name))
        self.fetched += len(data)
        return data

    def names(self, under: str) -> list[str]:
        return sorted(n for n in list(self.objects) if n.startswith(under))


STORE = Store()


class FakeGcs(AbstractFileSystem):
    """What epath needs of gcsfs."""

    protocol = ("gcs", "gs")
    cachable = False

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path in STORE.objects:
            return {"name": path, "size": len(STORE.objects[path][0]), "type": "file"}
        if "/" not in path or STORE.names(path + "/"):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        under = {name[len(path) + 1 :].split("/")[0] for name in STORE.names(path + "/")}
        found = [self.info(f"{path}/{name}") for name in sorted(under)]
        if not found:
            found = [self.info(path)]
        return found if detail else [one["name"] for one in found]

    def cat_file(self, path, start=None, end=None, **kwargs):
        path = self._strip_protocol(path)
        if path not in STORE.objects:
            raise FileNotFoundError(path)
        return STORE.read(path, start or 0, end)

    def _rm(self, path):
        if STORE.objects.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        names = STORE.names(path + "/") if recursive else []
        for name in names or [path]:
            self._rm(name)

    def mkdir(self, path, create_parents=True, **kwargs):
        pass  # objects need no folders

    def makedirs(self, path, exist_ok=False):
        pass

    def mv(self, *args, **kwargs):
        raise AssertionError("renamed on gs://")

    rename = move = cp_file = copy = mv

    def _open(self, path, mode="rb", **kwargs):
        if "a" in mode or "+" in mode:
            raise AssertionError(f"opened on gs:// with mode {mode}")
        path = self._strip_protocol(path)
        return _Written(path) if "w" in mode else _Read(self, path, mode, **kwargs)


class FakeS3(FakeGcs):
    """The same objects by another scheme."""

    protocol = ("s3",)


class _Read(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return STORE.read(self.path, start, end)


class _Written(io.BytesIO):
    """An object that appears when it is closed."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def close(self):
        if not self.closed:
            STORE.put(self.name, self.getvalue())
        super().close()


class _Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # else each answer waits 40 ms

    def log_message(self, *args):
        pass

    def _asked(self):
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        _, bucket, _, *rest = parts.path.split("/b/")[1].join(["/", ""]).split("/", 3)
        name = urllib.parse.unquote(rest[0]) if rest else query.get("name", "")
        return bucket, name, query

    def _answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, found: dict, status: int = 200):
        self._answer(status, json.dumps(found).encode(), Content_Type="application/json")

    def _described(self, bucket: str, name: str) -> dict:
        data, generation = STORE.objects[f"{bucket}/{name}"]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def do_GET(self):
        bucket, name, query = self._asked()
        if not name:
            return self._list(bucket, query)
        held = STORE.objects.get(f"{bucket}/{name}")
        if held is None:
            return self._json({"error": {"code": 404, "message": "no such object"}}, 404)
        data, generation = held
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("alt") != "media":
            return self._json(self._described(bucket, name))
        told = {"x_goog_generation": generation, "x_goog_stored_content_length": len(data)}
        span = self.headers.get("Range", "")
        if not span:
            return self._answer(200, STORE.read(f"{bucket}/{name}"), **told)
        first, _, last = span.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if last and first else len(data)
        told["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return self._answer(206, STORE.read(f"{bucket}/{name}", start, end), **told)

    def _list(self, bucket: str, query: dict):
        names = [n[len(bucket) + 1 :] for n in STORE.names(f"{bucket}/{query.get('prefix', '')}")]
        first, behind = query.get("startOffset", ""), query.get("endOffset")
        names = [n for n in names if n >= first and (behind is None or n < behind)]
        self._json({"items": [self._described(bucket, n) for n in names]})

    def do_POST(self):
        bucket, name, query = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.startswith("/upload/") or query.get("uploadType") != "media":
            return self._json({"error": {"code": 400, "message": "copied on gs://"}}, 400)
        expected = query.get("ifGenerationMatch")
        if STORE.put(f"{bucket}/{name}", data, expected and int(expected)) is None:
            return self._json({"error": {"code": 412, "message": "another generation"}}, 412)
        return self._json(self._described(bucket, name))

    def do_DELETE(self):
        bucket, name, _ = self._asked()
        gone = STORE.objects.pop(f"{bucket}/{name}", None)
        self._answer(404 if gone is None else 204)


@contextlib.contextmanager
def served():
    """gs:// is STORE, for epath and for TensorStore, until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    fsspec.register_implementation("gcs", FakeGcs, clobber=True)
    fsspec.register_implementation("s3", FakeS3, clobber=True)
    cloud, storage = types.ModuleType("google.cloud"), types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: object())
    cloud.storage = storage
    sys.modules["google.cloud"], sys.modules["google.cloud.storage"] = cloud, storage
    try:
        yield STORE
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        del sys.modules["google.cloud"], sys.modules["google.cloud.storage"]
        STORE.objects.clear()
