"""Limits of the server, with an engine that does what the test says: nobody hangs, or is disturbed."""

import base64
import contextlib
import json
import socket
import threading
import time

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from demo import evaluate
from qwen3vl_jax.cli.serve import listen
from qwen3vl_jax.inference.requests import Finished
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.serve.app import Server
from qwen3vl_jax.serve.engine_thread import EngineThread
from qwen3vl_jax.serve.guard import Limits
from qwen3vl_jax.serve.http import run

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
CALL = 'I look.\n<tool_call>\n{"name": "look", "arguments": {"at": "\u00e9"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def proc():
    return Processor.from_pretrained(evaluate.CHECKPOINT)


class Engine:
    """Answers with given tokens, one of each request in turn, once `go` is set."""

    def __init__(self, tokens=(), fails=False):
        self.tokens, self.fails, self.go = list(tokens), fails, threading.Event()
        self.go.set()
        self.seen = []

    def __call__(self, requests):
        running = {}
        for request in requests:
            if request is not None:
                self.seen.append(request)
                running[request.key] = request, 0
                continue
            time.sleep(0.002)
            for key, (one, count) in list(running.items()):
                if self.fails:
                    raise RuntimeError("out of memory, as it were")
                new = self.tokens[count : count + 1] if self.go.is_set() else []
                running[key] = one, count + len(new)
                is_last = count + len(new) == len(self.tokens)
                if one.watch(new, [-0.5] * len(new)) or is_last:
                    del running[key]
                    yield Finished(key, [], [], "stop" if is_last else "cancelled")


@contextlib.contextmanager
def serving(proc, engine, requests=20, seconds=20.0, body=1 << 20, media=1 << 20, idle=5.0):
    """(a client of a server that runs in a thread, the server)."""
    limits = Limits(requests, seconds, body, media)
    server = Server(proc, None, EngineThread(engine), "m", limits, 4000, 100)
    place = listen("127.0.0.1", 0)
    place.listen()
    thread = threading.Thread(target=run, args=(server.app, place, idle), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    try:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client, server
    finally:
        engine.go.set()
        server.app.draining = True
        thread.join(20)
        assert not thread.is_alive() and not server.app.active and not server.app.media
        server.engine.stop()


def until(condition, seconds=20.0):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connect(client):
    return socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20)


def head(length, path="/v1/chat/completions"):
    lines = f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/json"
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_calls_of_tools(proc):
    """As OpenAI's types, whole and streamed."""
    engine = Engine(proc.tokenizer.encode(CALL, ""))
    with serving(proc, engine) as (client, _):
        raw = client.chat.completions.with_raw_response.create(**ASK, tools=[TOOL])
        found = ChatCompletion.model_validate_json(raw.http_response.text)
        choice = found.choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        assert (call.type, call.function.name) == ("function", "look")
        assert json.loads(call.function.arguments) == {"at": "\u00e9"}
        chunks = list(client.chat.completions.create(**ASK, tools=[TOOL], stream=True))
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk.to_dict())
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "I look."
        (call,) = [call for delta in deltas for call in delta.tool_calls or []]
        assert call.index == 0 and call.function.name == "look"
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        # Not told of the tools, the model's text is text.
        found = client.chat.completions.create(**ASK, tools=[TOOL], tool_choice="none")
        assert found.choices[0].message.content == CALL
        with pytest.raises(openai.BadRequestError) as e:
            client.chat.completions.create(**ASK, tools=[TOOL], tool_choice="required")
        assert e.value.param == "tool_choice"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_noticed(proc, stream):
    """Its answer is cancelled, and its place is free; the others go on."""
    engine = Engine([5] * 50)
    with serving(proc, engine) as (client, server):
        engine.go.clear()
        data = json.dumps({**ASK, "stream": stream}).encode()
        gone = connect(client)
        gone.sendall(head(len(data)) + data)
        until(lambda: len(engine.seen) == 1)
        assert server.app.active == 1
        gone.close()
        until(lambda: not server.app.active)
        until(lambda: not server.engine.live)
        engine.go.set()
        assert client.chat.completions.create(**ASK).usage.completion_tokens == 50
        assert server.metrics.requests["/v1/chat/completions", 499] == 1


def test_an_engine_that_fails_leaves_nobody_waiting(proc, capsys):
    """Each waiting request gets a 500, as do later ones, and /health says 503."""
    engine = Engine([5] * 50, fails=True)
    engine.go.clear()
    with serving(proc, engine) as (client, server):
        codes = []

        def ask(stream):
            with pytest.raises(openai.InternalServerError) as e:
                client.chat.completions.create(**ASK, stream=stream)
            codes.append((e.value.status_code, e.value.type))

        threads = [threading.Thread(target=ask, args=(i % 2 == 1,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert codes == [(500, "server_error")] * 5 and server.engine.ended
        ask(False)
        with pytest.raises(openai.InternalServerError):
            client.embeddings.create(model="m", input="a")
        health = str(client.base_url).replace("/v1/", "/health")
        assert client._client.get(health).status_code == 503
    assert "as it were" in capsys.readouterr().err


def test_too_many_requests_are_refused(proc):
    """429 with Retry-After, by number and by bytes of images; the others are answered."""
    engine = Engine([5] * 3)
    engine.go.clear()
    with serving(proc, engine, requests=3, media=1000) as (client, server):
        found = []
        work = lambda: found.append(client.chat.completions.create(**ASK, n=2))  # noqa: E731
        thread = threading.Thread(target=work)
        thread.start()
        until(lambda: server.app.active == 2)
        with pytest.raises(openai.RateLimitError) as e:
            client.chat.completions.create(**ASK, n=2)
        assert int(e.value.response.headers["retry-after"]) >= 1
        image = {"type": "image_url", "image_url": {"url": demo_image()}}
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": [image]}]
            )
        engine.go.set()
        thread.join(20)
        assert [c.message.content for c in found[0].choices] == [proc.decode([5] * 3)] * 2


def demo_image():
    """A data URI of the demo's image."""
    data = (evaluate.CHECKPOINT.parent / "pictures" / "grid.png").read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_clients_that_stall(proc):
    """Half a head: closed. Half a body, and an answer that takes too long: 408, or an event."""
    engine = Engine([5] * 3)
    with serving(proc, engine, seconds=1.0, idle=0.5) as (client, server):
        with connect(client) as half_head, connect(client) as half_body:
            half_head.sendall(b"POST /v1/chat")
            half_body.sendall(head(100) + b"{")
            assert client.chat.completions.create(**ASK).usage.completion_tokens == 3
            assert half_head.recv(100) == b""
            assert half_body.recv(100).startswith(b"HTTP/1.1 408 ")
        engine.go.clear()
        with pytest.raises(openai.APIStatusError) as e:
            client.chat.completions.create(**ASK)
        assert e.value.status_code == 408
        engine.tokens, engine.go = [5] * 10**6, threading.Event()
        engine.go.set()
        with pytest.raises(openai.APIError, match="longer than 1 seconds"):
            list(client.chat.completions.create(**ASK, stream=True))
        until(lambda: not server.engine.live)


def test_what_runs_is_finished(proc):
    """Draining, new requests get a 503, and a stream goes on to its end."""
    engine = Engine([5] * 40)
    with serving(proc, engine) as (client, server):
        chunks = iter(client.chat.completions.create(**ASK, stream=True))
        next(chunks)
        engine.go.clear()
        server.app.draining = True
        with pytest.raises(openai.InternalServerError) as e:
            client.chat.completions.create(**ASK)
        assert e.value.status_code == 503
        engine.go.set()
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
