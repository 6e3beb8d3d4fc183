"""The routes: chat completions, embeddings, models, health and metrics."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import queue
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference import scoring
from qwen3vl_jax.inference.engine import EXPECTED, generate_many
from qwen3vl_jax.inference.requests import Finished, Request
from qwen3vl_jax.processing.batch import make_batch
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, to_hf_arrays
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.retrieval_prompts import embed_conversation
from qwen3vl_jax.serve.engine_thread import EngineThread, Ticket
from qwen3vl_jax.serve.guard import Guard, Limits, error_response, event
from qwen3vl_jax.serve.metrics import Metrics
from qwen3vl_jax.serve.protocol import ApiError, ChatRequest, blaming, read_chat, read_embedding
from qwen3vl_jax.serve.reply import OPEN, Delta, Reply, message

THREADS = 4  # that read images and encode prompts
Events = asyncio.Queue[tuple[int, Any]]  # (index of a choice or an input, event of its ticket)


class Server:
    """The model behind the routes; `app` is the ASGI app."""

    def __init__(
        self,
        proc: Processor,
        params: Any,
        engine: EngineThread,
        model: str,
        limits: Limits,
        max_len: int,
        max_new_tokens: int,
    ):
        self.proc, self.params, self.engine, self.model = proc, params, engine, model
        self.max_len, self.max_new_tokens = max_len, max_new_tokens
        self.embed = jax.jit(scoring.embed, static_argnames="cfg")
        self.made, self.metrics = int(time.time()), Metrics()
        self.pool = ThreadPoolExecutor(THREADS)
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
            Route("/metrics", self.report),
        ]
        handlers: Any = {ApiError: _refused, HTTPException: _no_route, Exception: _failed}
        inner = Starlette(routes=routes, exception_handlers=handlers)
        self.app = Guard(inner, limits, self.metrics, [route.path for route in routes])

    async def models(self, asked: Asked) -> Response:
        """The one model."""
        found = {
            "id": self.model,
            "object": "model",
            "created": self.made,
            "owned_by": "qwen3vl_jax",
        }
        name = asked.path_params.get("name")
        if name not in (None, self.model):
            raise ApiError(
                404, f"model: got {name!r}, expected {self.model!r}", "model", "model_not_found"
            )
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
        start, stack, body = time.perf_counter(), asked.scope["stack"], await asked.body()
        request, prompt = await self._in_pool(self._read_chat, body)
        media = sum(image.patches.nbytes for image in prompt.images)
        self.app.take(stack, request.choices - 1, media)
        self.metrics.tokens["prompt"] += len(prompt.ids)
        room = min(request.request.max_new_tokens, self.max_len - len(prompt.ids))
        whole = dataclasses.replace(request.request, arrays=prompt, max_new_tokens=room)
        seeds = [(whole.seed + i) % 2**32 for i in range(request.choices)]
        work = [
            functools.partial(self.engine.ask, dataclasses.replace(whole, seed=s)) for s in seeds
        ]
        tail = self.proc.decode(prompt.ids[-8:], False)
        replies = [Reply(self.proc, request, tail.rstrip().endswith(OPEN)) for _ in seeds]
        answer = _Answer(self, request, replies, len(prompt.ids), _submit(stack, work))
        # An engine that has stopped gives a status, not a stream.
        first = await answer.next()
        self.metrics.observe("first_token_seconds", time.perf_counter() - start)
        if request.stream:
            return StreamingResponse(answer.stream(first), media_type="text/event-stream")
        return JSONResponse(await answer.whole(first))

    async def embeddings(self, asked: Asked) -> Response:
        """/v1/embeddings."""
        request, prompts = await self._in_pool(self._read_embedding, await asked.body())
        media = sum(image.patches.nbytes for prompt in prompts for image in prompt.images)
        self.app.take(asked.scope["stack"], len(prompts) - 1, media)
        work = [
            functools.partial(self.engine.call, functools.partial(self._vector, x)) for x in prompts
        ]
        events = _submit(asked.scope["stack"], work)
        found: dict[int, Any] = {}
        while len(found) < len(prompts):
            index, vector = await events.get()
            if isinstance(vector, Finished | Exception):
                raise ApiError(500, getattr(vector, "error", vector))
            found[index] = _shortened(vector, request.dims)
        count = sum(len(prompt.ids) for prompt in prompts)
        self.metrics.tokens["prompt"] += count
        data = [
            {"object": "embedding", "index": i, "embedding": _written(found[i], request.as_base64)}
            for i in sorted(found)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": self.model, "usage": usage})

    async def _in_pool(self, function: Callable, body: bytes) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, body)

    def _read_chat(self, body: bytes) -> tuple[ChatRequest, EncodedPrompt]:
        request = read_chat(body, self.model, self.proc.sampling, self.max_new_tokens)
        options = {"tools": request.tools, "template_vars": request.template_vars}
        return request, self._encoded(request.messages, "messages", **options)

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


class _Answer:
    """One chat completion as it comes."""

    def __init__(
        self,
        server: Server,
        request: ChatRequest,
        replies: list[Reply],
        length: int,
        events: Events,
    ):
        self.server, self.request, self.replies = server, request, replies
        self.length, self.events = length, events
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = server.model

    async def next(self) -> tuple[int, list[Delta]]:
        """(index of a choice, its new deltas) of the next event. Raises ApiError."""
        index, event = await self.events.get()
        reply = self.replies[index]
        before, deltas = reply.tokens, reply.add(event)
        self.server.metrics.tokens["completion"] += reply.tokens - before
        return index, deltas

    def usage(self) -> dict[str, int]:
        count = sum(reply.tokens for reply in self.replies)
        both = {"prompt_tokens": self.length, "completion_tokens": count}
        return {**both, "total_tokens": self.length + count}

    async def whole(self, first: tuple[int, list[Delta]]) -> dict[str, Any]:
        """The response of all choices."""
        deltas: list[list[Delta]] = [[] for _ in self.replies]
        deltas[first[0]] += first[1]
        while not all(reply.finish_reason for reply in self.replies):
            index, new = await self.next()
            deltas[index] += new
        choices = [
            {"message": message(deltas[i]), **self._end(i)} for i in range(len(self.replies))
        ]
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
                    choice = {
                        "index": index,
                        "delta": delta,
                        "logprobs": None,
                        "finish_reason": None,
                    }
                    # Those of tokens go with the last delta that they gave.
                    choice |= self._end(index) if number == len(deltas) else {}
                    yield event({**head, "choices": [choice]})
                if all(reply.finish_reason for reply in self.replies):
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
    engine = EngineThread(functools.partial(generate_many, params, proc.config, **options))
    (prompt,) = proc.encode([{"role": "user", "content": "Hello"}])
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # The cache has room for a usual answer; this one is ended after some steps.
    ticket = engine.ask(Request(None, prompt, EXPECTED), events.put)
    while not isinstance(found := events.get(), Finished):
        ticket.cancelled = True
    if found.error:
        raise InputError(found.error)
    return engine


def _submit(stack: contextlib.ExitStack, work: list[Callable[..., Ticket]]) -> Events:
    """Submits to the engine, until the stack ends; their events come to the running loop."""
    events, loop = Events(), asyncio.get_running_loop()

    def post(index: int, what: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (index, what))

    for index, submit in enumerate(work):
        ticket = submit(functools.partial(post, index))
        stack.callback(setattr, ticket, "cancelled", True)
    return events


def _shortened(vector: np.ndarray, dims: int) -> np.ndarray:
    """The first dims of a unit vector, normalised again (Matryoshka)."""
    first = vector[:dims]
    return first / max(float(np.linalg.norm(first)), 1e-12)


def _written(vector: np.ndarray, as_base64: bool) -> Any:
    data = vector.astype("<f4")
    return base64.b64encode(data.tobytes()).decode() if as_base64 else data.tolist()


async def _refused(_: Asked, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _no_route(asked: Asked, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{asked.method} {asked.url.path}: {error.detail}"
    return error_response(ApiError(error.status_code, message))


async def _failed(_: Asked, error: Exception) -> Response:
    return error_response(
        ApiError(500, f"internal error ({type(error).__name__}), see the server's log")
    )
