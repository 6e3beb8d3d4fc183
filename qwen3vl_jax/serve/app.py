"""The routes: a page, chat completions, embeddings, models, health and metrics."""

import asyncio
import dataclasses
import queue
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Asked
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference import scoring
from qwen3vl_jax.inference.constraints import read_constraint
from qwen3vl_jax.inference.engine import EXPECTED, generate_many
from qwen3vl_jax.inference.requests import Finished, Request
from qwen3vl_jax.processing.batch import make_batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, to_hf_arrays
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.retrieval_prompts import embed_conversation
from qwen3vl_jax.serve.engine_thread import EngineThread
from qwen3vl_jax.serve.guard import Guard, Limits, error_response, event
from qwen3vl_jax.serve.metrics import Metrics
from qwen3vl_jax.serve.protocol import (
    ApiError,
    ChatRequest,
    blaming,
    check_model,
    read_chat,
    read_embedding,
    usage_of,
)
from qwen3vl_jax.serve.reply import OPEN, Delta, Reply, message

PAGE = Path(__file__).with_name("page.html")
THREADS = 4  # that read images and encode prompts
Events = asyncio.Queue[tuple[int, Any]]  # (index of a choice or an input, event of its ticket)


@dataclasses.dataclass
class Server:
    """The model behind the routes; `app` is the ASGI app."""

    proc: Processor
    params: Any
    engine: EngineThread
    model: str  # its name
    limits: Limits
    max_len: int  # tokens of prompt and answer
    max_new_tokens: int  # of an answer to a request that does not say

    def __post_init__(self) -> None:
        self.embed = jax.jit(scoring.embed, static_argnames="cfg")
        self.made, self.metrics, self.pool = (
            int(time.time()),
            Metrics(),
            ThreadPoolExecutor(THREADS),
        )
        routes = [
            Route("/", self.page),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
            Route("/metrics", self.report),
        ]
        handlers: Any = dict.fromkeys((ApiError, HTTPException, Exception), _refused)
        inner = Starlette(routes=routes, exception_handlers=handlers)
        self.app = Guard(inner, self.limits, self.metrics, [route.path for route in routes])

    async def page(self, _: Asked) -> Response:
        """The page to ask from a browser."""
        return FileResponse(PAGE)

    async def models(self, asked: Asked) -> Response:
        """The one model."""
        found = {
            "id": self.model,
            "object": "model",
            "created": self.made,
            "owned_by": "qwen3vl_jax",
        }
        name = asked.path_params.get("name")
        if name is not None:
            check_model(name, self.model)
        return JSONResponse({"object": "list", "data": [found]} if name is None else found)

    async def health(self, _: Asked) -> Response:
        """Whether requests are answered."""
        state = "stopped" if self.engine.ended else "stopping" if self.app.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def report(self, _: Asked) -> Response:
        """The metrics."""
        running = sum(ticket.begun for ticket in list(self.engine.live))
        waiting = max(self.app.active - running, 0)
        gauges = {"requests_running": running, "requests_waiting": waiting}
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def chat(self, asked: Asked) -> Response:
        """/v1/chat/completions."""
        start = time.perf_counter()
        request, prompt = await self._prepared(asked, self._read_chat)
        seeds = [(request.request.seed + i) % 2**32 for i in range(request.choices)]
        room = min(request.request.max_new_tokens, self.max_len - len(prompt.ids))
        whole = dataclasses.replace(request.request, arrays=prompt, max_new_tokens=room)
        events = self._submit(asked, [dataclasses.replace(whole, seed=s) for s in seeds], [prompt])
        thinking = self.proc.decode(prompt.ids[-8:], False).rstrip().endswith(OPEN)
        replies = [Reply(self.proc, request, thinking) for _ in seeds]
        answer = _Answer(self, request, replies, len(prompt.ids), events)
        # An engine that has stopped gives a status, not a stream.
        first = await answer.next()
        self.metrics.observe("first_token_seconds", time.perf_counter() - start)
        if request.stream:
            return StreamingResponse(answer.stream(first), media_type="text/event-stream")
        return JSONResponse(await answer.whole(first))

    async def embeddings(self, asked: Asked) -> Response:
        """/v1/embeddings."""
        request, prompts = await self._prepared(asked, self._read_embedding)
        events = self._submit(asked, [partial(self._vector, x) for x in prompts], prompts)
        data: list[Any] = [None] * len(prompts)
        while None in data:
            index, vector = await events.get()
            if isinstance(vector, Finished | Exception):
                raise ApiError(500, getattr(vector, "error", vector))
            data[index] = {"object": "embedding", "index": index, "embedding": request.form(vector)}
        usage = usage_of(sum(len(prompt.ids) for prompt in prompts))
        return JSONResponse({"object": "list", "data": data, "model": self.model, "usage": usage})

    async def _prepared(self, asked: Asked, read: Callable[[bytes], Any]) -> Any:
        """What `read`, in a thread of the pool, makes of a body."""
        body = await asked.body()
        return await asyncio.get_running_loop().run_in_executor(self.pool, read, body)

    def _submit(self, asked: Asked, work: list[Any], prompts: list[EncodedPrompt]) -> Events:
        """Submits to the engine until the request ends; the events come to the running loop."""
        events, loop, stack = Events(), asyncio.get_running_loop(), asked.scope["stack"]
        media = sum(image.patches.nbytes for prompt in prompts for image in prompt.images)
        self.app.take(stack, len(work) - 1, media)
        self.metrics.tokens["prompt"] += sum(len(prompt.ids) for prompt in prompts)

        def post(index: int, what: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, what))

        for index, one in enumerate(work):
            stack.callback(
                setattr, self.engine.submit(one, partial(post, index)), "cancelled", True
            )
        return events

    def _read_chat(self, body: bytes) -> tuple[ChatRequest, EncodedPrompt]:
        request = read_chat(body, self.model, self.proc.sampling, self.max_new_tokens)
        with blaming(next(iter(request.control), None)):
            constraint = read_constraint(self.proc, **request.control)
        held = dataclasses.replace(request.request, constraint=constraint)
        options = {"tools": request.tools, "template_vars": request.template_vars}
        prompt = self._encoded(request.messages, "messages", **options)
        return dataclasses.replace(request, request=held), prompt

    def _read_embedding(self, body: bytes) -> tuple[Any, list[EncodedPrompt]]:
        request = read_embedding(body, self.model, self.proc.config.text.hidden_size)
        with blaming("input"):
            asked = [embed_conversation(thing, request.instruction) for thing in request.things]
        return request, [self._encoded(one, "input") for one in asked]

    def _encoded(self, messages: list[Any], key: str, **options: Any) -> EncodedPrompt:
        with blaming(key):
            prompts = self.proc.encode(messages, **options)
        if len(prompts) != 1:
            raise ApiError(400, f"{key}: got {len(prompts)} conversations, expected one", key)
        if (length := len(prompts[0].ids)) >= self.max_len:
            most = f"prompt and answer may have {self.max_len} (--max-len)"
            wrong = f"{key}: the prompt has {length} tokens, {most}"
            raise ApiError(400, wrong, key, "context_length_exceeded")
        return prompts[0]

    def _vector(self, prompt: EncodedPrompt) -> np.ndarray:
        """The unit vector [D] of a prompt, in the engine's thread."""
        batch = make_batch(self.proc.config, **to_hf_arrays(self.proc.config, [prompt]))
        found = self.embed(self.params, self.proc.config, batch)
        return np.asarray(scoring.check_finite("embeddings", found))[0]


@dataclasses.dataclass
class _Answer:
    """One chat completion as it comes."""

    server: Server
    request: ChatRequest
    replies: list[Reply]  # a choice each
    length: int  # tokens of the prompt
    events: Events

    def __post_init__(self) -> None:
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
        }
        self.head["model"] = self.server.model

    async def next(self) -> tuple[int, list[Delta]]:
        """(index of a choice, its new deltas) of the next event. Raises ApiError."""
        index, event = await self.events.get()
        reply = self.replies[index]
        before, deltas = reply.tokens, reply.add(event)
        self.server.metrics.tokens["completion"] += reply.tokens - before
        return index, deltas

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all answers."""
        return usage_of(self.length, sum(reply.tokens for reply in self.replies))

    def _ended(self) -> bool:
        return all(reply.finish_reason for reply in self.replies)

    async def whole(self, first: tuple[int, list[Delta]]) -> dict[str, Any]:
        """The response of all choices."""
        deltas: list[list[Delta]] = [[] for _ in self.replies]
        deltas[first[0]] += first[1]
        while not self._ended():
            index, new = await self.next()
            deltas[index] += new
        choices = [{"message": message(x), **self._end(i)} for i, x in enumerate(deltas)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _end(self, index: int) -> dict[str, Any]:
        """What message or delta have beside them."""
        reply = self.replies[index]
        logprobs = {"content": reply.logprobs, "refusal": None} if self.request.logprobs else None
        reply.logprobs = []
        return {"index": index, "logprobs": logprobs, "finish_reason": reply.finish_reason or None}

    async def stream(self, first: tuple[int, list[Delta]]) -> AsyncIterator[bytes]:
        """The events of a stream."""
        begun, given = set[int](), first
        usage = {"usage": None} if self.request.with_usage else {}
        head = {**self.head, "object": "chat.completion.chunk", **usage}
        try:
            while True:
                index, deltas = given
                if index not in begun:
                    deltas = [{"role": "assistant", "content": ""}, *deltas]
                    begun.add(index)
                if self.replies[index].finish_reason:
                    deltas = [*deltas, {}]
                for number, delta in enumerate(deltas, 1):
                    choice = {"index": index, "logprobs": None, "finish_reason": None}
                    # Log-probabilities go with the last delta that their tokens gave.
                    choice |= self._end(index) if number == len(deltas) else {}
                    yield event({**head, "choices": [{**choice, "delta": delta}]})
                if self._ended():
                    break
                given = await self.next()
        except ApiError as e:
            yield event(e.body())
            return
        if self.request.with_usage:
            yield event({**head, "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"


def start_engine(proc: Processor, params: Any, rows: int, prefill_chunk: int) -> EngineThread:
    """The engine, which has answered a prompt: its programs are compiled. Raises InputError."""
    options: dict[str, Any] = {"rows": rows, "prefill_chunk": prefill_chunk}
    options |= {"stop_ids": proc.stop_ids, "decode": proc.decode}
    engine = EngineThread(partial(generate_many, params, proc.config, **options))
    (prompt,) = proc.encode([{"role": "user", "content": "Hello"}])
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # The cache has room for a usual answer; this one is ended after some steps.
    ticket = engine.submit(Request(None, prompt, EXPECTED), events.put)
    while not isinstance(found := events.get(), Finished):
        ticket.cancelled = True
    if found.error:
        raise InputError(found.error)
    return engine


async def _refused(asked: Asked, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        where = f"{asked.method} {asked.url.path}"
        error = ApiError(error.status_code, f"{where}: {error.detail}")
    internal = ApiError(500, "internal error, see the server's log")
    return error_response(error if isinstance(error, ApiError) else internal)
