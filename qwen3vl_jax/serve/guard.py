"""What stands before the routes: the key, limits of size, time and number, and clients that go away."""

import asyncio
import contextlib
import dataclasses
import hmac
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_jax.serve.metrics import Metrics
from qwen3vl_jax.serve.protocol import ApiError
from qwen3vl_jax.storage.json_text import write_json

GONE = 499  # the status that is counted for a client that went away
_RETRY = {429: "1", 503: "10"}  # seconds after which a client may come again


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is taken from clients."""

    requests: int  # at a time: those that the engine answers, and those that wait
    seconds: float  # of a request, from its head to the end of its response
    body: int  # bytes of a request
    media: int  # bytes of the images and videos of all requests
    api_key: str = ""


class Guard:
    """An ASGI app around another: limits, errors as JSON, and a `stack` in scope that ends with a request.

    What a request holds is given back by its stack, however it ends. `draining`: new work is refused.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, paths: Collection[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.active, self.media, self.draining = 0, 0, False

    def take(self, stack: contextlib.ExitStack, requests: int, media: int = 0) -> None:
        """Counts requests, and bytes of media, until the stack ends. Raises ApiError for too many."""
        if self.active + requests > self.limits.requests or self.media + media > self.limits.media:
            raise ApiError(429, "too many requests wait; come again later", code="queue_full")
        self.active, self.media = self.active + requests, self.media + media
        stack.callback(self._give_back, requests, media)

    def _give_back(self, requests: int, media: int) -> None:
        self.active, self.media = self.active - requests, self.media - media

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, response = time.perf_counter(), _Response(send)
        with contextlib.ExitStack() as stack:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    self._check(scope, stack)
                    body = await self._body(scope, receive)
                    await self._run({**scope, "stack": stack}, body, receive, response)
            except ApiError as e:
                await response.fail(e, scope, receive)
            except TimeoutError:
                late = f"the request took longer than {self.limits.seconds:g} seconds (--timeout)"
                await response.fail(ApiError(408, late, code="timeout"), scope, receive)
            finally:
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests[path, response.status] += 1
                self.metrics.observe("request_seconds", time.perf_counter() - start)

    def _check(self, scope: Scope, stack: contextlib.ExitStack) -> None:
        """Refuses by the request's head, before its body is read. Raises ApiError."""
        headers, key = Headers(scope=scope), self.limits.api_key
        given = headers.get("authorization", "").removeprefix("Bearer ")
        is_right = hmac.compare_digest(given.encode(), key.encode())
        if key and not is_right and scope["path"] not in ("/", "/health"):
            raise ApiError(
                401, "expected Authorization: Bearer KEY, the server's", code="invalid_api_key"
            )
        if scope["method"] != "POST":
            return
        if self.draining:
            raise ApiError(503, "the server is stopping", code="stopping")
        # A page of another site cannot send this type without being asked whether it may.
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "Content-Type: expected application/json")
        length = headers.get("content-length", "0")
        self._check_size(int(length) if length.isdigit() else 0)
        self.take(stack, 1)

    def _check_size(self, size: int) -> None:
        if size > self.limits.body:
            most = f"expected at most {self.limits.body} bytes (--max-body)"
            raise ApiError(413, f"the request is too large, {most}", code="too_large")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away. Raises ApiError for one that is too large."""
        data, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            data += message.get("body", b"")
            self._check_size(len(data))
            more = message.get("more_body", False)
        return bytes(data)

    async def _run(self, scope: Scope, body: bytes | None, receive: Receive, response: Any) -> None:
        """The inner app, which is cancelled when the client goes away."""
        given = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            return given.pop() if given else await asyncio.Future()

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        if body is None:
            return
        work = asyncio.ensure_future(self.app(scope, replay, response.send))
        gone = asyncio.ensure_future(until_gone())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            # A response that is complete is a disconnect too.
            if response.complete or work.done():
                await work
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class _Response:
    """What is sent: its status, and whether it has begun and ended."""

    def __init__(self, send: Send):
        self._send, self.status, self.streams, self.complete = send, GONE, False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streams = (
                Headers(raw=message["headers"]).get("content-type", "")[:17] == "text/event-stream"
            )
        else:
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Sends an error, as the last event where a stream has begun."""
        if self.status == GONE:
            await error_response(error)(scope, receive, self.send)
        elif self.streams:
            # A client that reads nothing gets nothing.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._send({"type": "http.response.body", "body": event(error.body())})


def error_response(error: ApiError) -> JSONResponse:
    """The response that says what is wrong."""
    headers = {"Retry-After": _RETRY[error.status]} if error.status in _RETRY else None
    return JSONResponse(error.body(), error.status, headers)


def event(data: Any) -> bytes:
    """One server-sent event, of data as JSON."""
    return f"data: {write_json(data, 'event', ensure_ascii=False)}\n\n".encode()
