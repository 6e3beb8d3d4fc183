"""The engine in a thread of its own: work comes in by a queue, and what becomes of it by callbacks."""

import contextlib
import dataclasses
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from qwen3vl_jax.inference.requests import Finished, Request

# As `generate_many`; a request's key is its ticket.
Generate = Callable[[Iterator[Request | None]], Iterator[Finished]]
STOPPED = "the engine has stopped; the server's log says why"


class Ticket:
    """One piece of work. `post` gets what becomes of it, in the engine's thread.

    Of a request that is (tokens, log-probabilities) as they come, and at the end a `Finished`. Of a
    function it is the value that it returns, or an exception. `cancelled` may be set by any thread.
    """

    def __init__(self, post: Callable[[Any], Any]):
        self.post, self.cancelled, self.begun = post, False, False

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
        """The `watch` of a request."""
        if tokens:
            self.begun = True
            self.send((tokens, logprobs))
        return self.cancelled

    def send(self, event: Any) -> None:
        """Posts, if anybody still listens: an event loop may be closed by now."""
        with contextlib.suppress(RuntimeError):
            self.post(event)


class EngineThread:
    """Answers what is submitted until it is stopped or fails; `ended` is then True, and all is refused.

    The mesh of the thread that makes it is ambient in its own.
    """

    def __init__(self, generate: Generate):
        self.generate, self.mesh = generate, jax.sharding.get_mesh()
        self.live: set[Ticket] = set()
        self.inside: set[Ticket] = set()  # requests that the engine has
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.lock, self.ended = threading.Lock(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, work: Request | Callable[[], Any], post: Callable[[Any], Any]) -> Ticket:
        """Submits a request, or a function, which runs between the steps of answers."""
        ticket = Ticket(post)
        with self.lock:
            if not self.ended:
                self.live.add(ticket)
                self.inbox.put((ticket, work))
                return ticket
        ticket.send(Finished(ticket, [], [], "error", STOPPED))
        return ticket

    def stop(self) -> None:
        """Ends the thread when all that was submitted is done."""
        self.inbox.put(None)
        self.thread.join()

    def _run(self) -> None:
        try:
            with jax.set_mesh(self.mesh):
                for answer in self.generate(self._requests()):
                    self._end(answer.key, answer)
        except BaseException:
            traceback.print_exc()
        with self.lock:
            self.ended = True
        for ticket in list(self.live):
            self._end(ticket, Finished(ticket, [], [], "error", STOPPED))

    def _end(self, ticket: Ticket, event: Any) -> None:
        self.live.discard(ticket)
        self.inside.discard(ticket)
        ticket.send(event)

    def _requests(self) -> Iterator[Request | None]:
        """What was submitted; None while there is nothing and the engine has answers to go on with."""
        while True:
            try:
                found = self.inbox.get(block=not self.inside)
            except queue.Empty:
                yield None
                continue
            if found is None:
                return
            ticket, work = found
            if isinstance(work, Request):
                self.inside.add(ticket)
                yield dataclasses.replace(work, key=ticket, watch=ticket.add)
                continue
            self._end(ticket, None if ticket.cancelled else _value(work))
            if self.inside:
                # A step of the others comes first.
                yield None


def _value(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as e:
        traceback.print_exc()
        return e
