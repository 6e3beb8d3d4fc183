"""The HTTP server under the routes: uvicorn, with an end that finishes what runs."""

import asyncio
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen3vl_jax.runtime.console import exit_now
from qwen3vl_jax.serve.guard import Guard


class _Connection(H11Protocol):
    """A connection that is closed if it sends no whole head of a request for timeout_keep_alive seconds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.timeout_keep_alive_task is None:
            given = self.timeout_keep_alive, self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(*given)


class _Server(uvicorn.Server):
    """SIGTERM or Ctrl-C: new requests are refused, and it ends after those that run; a second ends now."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        guard: Any = self.config.app
        if guard.draining:
            exit_now(128 + sig)
        guard.draining = True
        print(f"stopping after {guard.active} requests; again: now", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        guard: Any = self.config.app
        return await super().on_tick(counter) or (guard.draining and not guard.active)


def run(app: Guard, place: socket.socket, idle: float) -> None:
    """Serves until a signal. idle: seconds in which a connection must send a request."""
    options: dict[str, Any] = {"http": _Connection, "ws": "none", "lifespan": "off"}
    options |= {"log_level": "warning", "access_log": False, "server_header": False}
    config = uvicorn.Config(app, timeout_keep_alive=idle, **options)  # pyright: ignore
    _Server(config).run(sockets=[place])
