"""qwen3vl serve, asked by OpenAI's own client: each answer is the one that its prompt gets alone."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import openai
import prompt_lines
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import qwen3vl_jax as q3
from demo import evaluate
from qwen3vl_jax.cli import serve
from qwen3vl_jax.processing.retrieval_prompts import embed_conversation

ROOT = Path(__file__).parents[2]
ROWS, LINES, TOKENS = 8, 6, 24
GRID = str(ROOT / "demo" / "pictures" / "grid.png")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def demo():
    return evaluate.load(evaluate.CHECKPOINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def process(folder):
    """(the server's process, its address)."""
    limits = [
        "--rows",
        str(ROWS),
        "--max-body",
        "1",
        "--timeout",
        "120",
        "--media-root",
        str(folder),
    ]
    command = [sys.executable, "-m", "qwen3vl_jax.cli.main", "serve", "--port", "0", *limits]
    command += ["--allow-hosts", "media.example", "--dtype", "float32"]
    environ = {**os.environ, "QWEN3VL_API_KEY": "secret", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as child:
        try:
            lines = iter(child.stderr.readline, "")
            seen = ""
            while not (address := re.search(r"answers at (\S+/v1)\n", seen)):
                line = next(lines, "")
                assert line, seen
                seen += line
            yield child, address[1]
        finally:
            child.kill()


@pytest.fixture(scope="module")
def client(process):
    options = {"base_url": process[1], "api_key": "secret", "max_retries": 0, "timeout": 120}
    with openai.OpenAI(**options) as client:
        yield client


def alone(demo, messages, count, tools=None, seed=0, **sampling):
    """The engine's answer to this prompt alone: (text, finish_reason), tokens, log-probabilities.

    Its programs are those that the server keeps; tests/cli/test_batch_file.py holds it to generate.
    """
    proc, params = demo
    (prompt,) = proc.encode(messages, tools=tools)
    request = q3.Request(0, prompt, count, q3.Sampling(**sampling), seed)
    (one,) = q3.generate_many(params, proc.config, [request], stop_ids=proc.stop_ids, rows=ROWS)
    return (proc.decode(one.tokens), one.finish_reason), len(one.tokens), one.logprobs


def found_in(response):
    """As `alone`, of a response; its tokens are those of all answers."""
    choices = [(c.message.content, c.finish_reason) for c in response.choices]
    return choices, response.usage.completion_tokens


def as_openai(messages):
    """The messages in OpenAI's form: images are data URIs, but for those of videos."""

    def item(x):
        if x["type"] != "image":
            return {k: v for k, v in x.items() if k != "video_metadata"}
        data = base64.b64encode(Path(x["image"]).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [
        m if isinstance(m["content"], str) else {**m, "content": list(map(item, m["content"]))}
        for m in messages
    ]


def strict(kind, data):
    """What OpenAI's type makes of JSON, checked, and written again without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kind.model_validate(data, strict=False)
        found.model_dump(mode="json", warnings="error")
    return found


def test_answers_at_once_are_those_alone(demo, client, folder):
    """Text, images, videos, turns, whole and streamed, all at a time."""
    lines = prompt_lines.mixed(folder, LINES)
    for line in lines:
        for message in line["messages"]:
            for x in message["content"] if isinstance(message["content"], list) else []:
                x.pop("video_metadata", None)

    def ask(i):
        options = {"model": "demo", "messages": as_openai(lines[i]["messages"]), "seed": i}
        options |= {"max_completion_tokens": lines[i]["max_new_tokens"], "user": "u"}
        if i % 2:
            raw = client.chat.completions.with_raw_response.create(**options)
            return found_in(strict(ChatCompletion, json.loads(raw.http_response.text)))
        usage = {"include_usage": True}
        with client.chat.completions.create(**options, stream=True, stream_options=usage) as it:
            *chunks, last = [strict(ChatCompletionChunk, chunk.to_dict()) for chunk in it]
        assert not last.choices and all(chunk.usage is None for chunk in chunks)
        choices = [chunk.choices[0] for chunk in chunks]
        assert choices[0].delta.role == "assistant"
        text = "".join(choice.delta.content or "" for choice in choices)
        return [(text, choices[-1].finish_reason)], last.usage.completion_tokens

    with ThreadPoolExecutor(LINES) as pool:
        found = list(pool.map(ask, range(LINES)))
    for line, one in zip(lines, found):
        answer, count, _ = alone(demo, line["messages"], line["max_new_tokens"])
        assert one == ([answer], count)


def test_sampling_choices_and_log_probabilities(demo, client):
    """Each choice is that of its own seed; log-probabilities are the model's, streamed and whole."""
    messages = [{"role": "user", "content": "Say something long."}]
    sampling = {"temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5}
    ours = {"top_k": 40, "min_p": 0.001, "repetition_penalty": 1.1, "min_new_tokens": 4}
    asked = {"model": "demo", "messages": messages, "max_tokens": TOKENS, "logprobs": True}
    asked |= {"n": 3, "seed": 7, **sampling, "extra_body": ours}
    whole = client.chat.completions.create(**asked)
    choices, count = found_in(whole)
    expected = [alone(demo, messages, TOKENS, seed=7 + i, **sampling, **ours) for i in range(3)]
    assert (choices, count) == ([one[0] for one in expected], sum(one[1] for one in expected))
    assert len({text for text, _ in choices}) == 3
    streamed = [[], [], []]
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice, pieces, one in zip(whole.choices, streamed, expected):
        assert choice.logprobs.content == pieces
        assert [x.logprob for x in pieces] == one[2][: len(pieces)]
        text = b"".join(bytes(x.bytes) for x in pieces).decode(errors="replace")
        assert text == choice.message.content


def test_tools_and_templates_reach_the_prompt(demo, client, folder):
    """By the tokens of the prompt; an image may be a file below the root."""
    proc, _ = demo
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    asked = {"model": "demo", "messages": messages, "max_tokens": TOKENS, "tools": [TOOL]}
    found = client.chat.completions.create(**asked, parallel_tool_calls=True)
    answer, count, _ = alone(demo, messages, TOKENS, tools=[TOOL])
    assert found_in(found) == ([answer], count)
    length = len(proc.encode(messages, tools=[TOOL])[0].ids)
    assert found.usage.prompt_tokens == length
    content = [
        {"type": "image", "image": GRID},
        {"type": "text", "text": "Read the digits row by row."},
    ]
    messages = [{"role": "user", "content": content}]
    (folder / "grid.png").write_bytes(Path(GRID).read_bytes())
    asked = {
        "model": "demo",
        "messages": json.loads(json.dumps(messages).replace(GRID, "grid.png")),
    }
    found = client.chat.completions.create(**asked, stop=["8"])
    assert found_in(found)[0] == [("5 6 ", "stop")]
    given = {"chat_template_kwargs": {"add_vision_id": True}}
    found = client.chat.completions.create(**asked, max_tokens=1, extra_body=given)
    (prompt,) = proc.encode(messages, template_vars={"add_vision_id": True})
    assert found.usage.prompt_tokens == len(prompt.ids) > len(proc.encode(messages)[0].ids)


def test_embeddings(demo, client):
    """Those of q3.embed, in base64 and as numbers, and shortened."""
    proc, params = demo
    things = [{"text": "one"}, {"text": "two words"}]
    embed = jax.jit(q3.embed, static_argnames=("cfg", "dims"))

    def expected(thing, dims=None):
        batch = proc([embed_conversation(thing)])
        return np.asarray(embed(params, proc.config, batch, dims=dims))[0]

    asked = ["one", things[1]]
    raw = client.embeddings.with_raw_response.create(
        model="demo", input=asked, encoding_format="float"
    )
    found = strict(CreateEmbeddingResponse, json.loads(raw.http_response.text))
    assert [one.index for one in found.data] == [0, 1]
    for one, thing in zip(found.data, things):
        np.testing.assert_allclose(one.embedding, expected(thing), atol=1e-5)
    found = client.embeddings.create(model="demo", input="one", dimensions=16)
    np.testing.assert_allclose(found.data[0].embedding, expected(things[0], 16), atol=1e-5)


TEXT = [{"role": "user", "content": "a"}]
SAYS = {"type": "object", "properties": {"says": {"enum": ["yes", "no"]}}, "required": ["says"]}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": SAYS | {"additionalProperties": False}},
}
FAR = "http://127.0.0.1:1/a.png"
# (status, the key it names, a word of the message, keys of the request)
REFUSED = [
    (400, "colour", "unknown key", {"colour": 1}),
    (400, "temperature", ">= 0", {"temperature": -1}),
    (400, "temperature", ">= 0", {"temperature": "1"}),
    (400, "top_logprobs", "expected 0", {"logprobs": True, "top_logprobs": 2}),
    (400, "frequency_penalty", "expected 0", {"frequency_penalty": 0.5}),
    (400, "store", "expected False", {"store": True}),
    (400, "response_format", "json_schema", {"response_format": {"type": "xml"}}),
    (
        400,
        "response_format",
        "schema: ",
        {"response_format": FORM | {"json_schema": {"schema": {"type": 3}}}},
    ),
    (400, "thinking_budget", "from 0", {"thinking_budget": -1}),
    (400, "max_repeats", "from 2", {"max_repeats": 1}),
    (400, "n", "from 1 to 128", {"n": 0}),
    (400, "max_tokens", "from 1", {"max_tokens": 1.5}),
    (400, "max_tokens", "one of them", {"max_tokens": 1, "max_completion_tokens": 2}),
    (400, "seed", "2^32", {"seed": 2**40}),
    (400, "stop", "none empty", {"stop": [""]}),
    (400, "stream", "true or false", {"stream": 1}),
    (400, "stream_options", "only with stream", {"stream_options": {"include_usage": True}}),
    (400, "messages", "list", {"messages": "a"}),
    (400, "messages", "role", {"messages": [{"role": "clown", "content": "a"}]}),
    (400, "messages", "--max-len", {"messages": [{"role": "user", "content": "a b " * 9000}]}),
    (404, "model", "the only one", {"model": "other"}),
]
FORBIDDEN = [
    "/etc/passwd",
    "file:///etc/passwd",
    "../a.png",
    FAR,
    "http://169.254.169.254/a",
    "gs://a/b",
]


def test_an_answer_by_a_schema(client):
    """Beside free answers, whole and as a stream; without it the demo says something else."""

    def ask(**given):
        return client.chat.completions.create(model="demo", messages=TEXT, max_tokens=24, **given)

    with ThreadPoolExecutor(3) as pool:
        free, held = pool.submit(ask), pool.submit(ask, response_format=FORM)
        parts = pool.submit(lambda: list(ask(response_format=FORM, stream=True)))
    found = held.result().choices[0]
    assert json.loads(found.message.content)["says"] in ("yes", "no")
    assert found.finish_reason == "stop" and "says" not in free.result().choices[0].message.content
    streamed = (chunk.choices[0].delta.content or "" for chunk in parts.result())
    assert "".join(streamed) == found.message.content


def test_the_page_needs_no_key(process):
    """It is one file, and names no other host."""
    with urllib.request.urlopen(process[1].removesuffix("/v1")) as page:
        text = page.read().decode()
        assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}


def test_what_is_wrong_is_refused_by_name(client):
    """OpenAI's error object, with the key; files and addresses only by the rules."""
    for status, key, words, given in REFUSED:
        with pytest.raises(openai.APIStatusError) as e:
            client.post("chat/completions", body={"messages": TEXT, **given}, cast_to=object)
        assert (e.value.status_code, e.value.param) == (status, key), given
        assert words in e.value.message and e.value.type == "invalid_request_error"
    for place in FORBIDDEN:
        content = [{"type": "image_url", "image_url": {"url": place}}]
        with pytest.raises(openai.BadRequestError, match="expected"):
            client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": content}]
            )
    with pytest.raises(openai.BadRequestError, match="not token ids"):
        client.embeddings.create(model="demo", input=[1, 2])


def test_the_head_and_body_of_a_request(process, client):
    """The key, the type, the size, JSON; what is refused is in the metrics."""
    url, web = process[1], client._client
    key = {"Authorization": "Bearer secret"}
    headers = {**key, "Content-Type": "application/json"}
    chat = f"{url}/chat/completions"

    def status(content, headers=headers, method="POST", url=chat):
        found = web.request(method, url, content=content, headers=headers)
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        return found.status_code

    assert status(b"{}", {"Content-Type": "application/json"}) == 401
    assert status(b"{}", {**headers, "Authorization": "Bearer secre"}) == 401
    assert status(b"{}", {**key, "Content-Type": "text/plain"}) == 415
    for body in (b"", b"{", b"[]", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 5000):
        assert status(body) == 400
    assert status(b" " * (2**20 + 1)) == 413
    assert status(iter([b" " * 2**16] * 17)) == 413
    assert status(b"", method="GET") == 405
    assert status(b"", url=f"{url}/completions", method="GET") == 404
    assert status(b"", url=f"{url}/models/other", method="GET") == 404
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    root = url.removesuffix("/v1")
    assert web.get(f"{root}/health").json() == {"status": "ok"}
    text = web.get(f"{root}/metrics", headers=key).text
    assert 'qwen3vl_requests_total{path="/v1/chat/completions",status="413"} 2' in text
    assert "qwen3vl_requests_running 0\n" in text
    (count,) = re.findall(r"qwen3vl_first_token_seconds_count (\d+)", text)
    (most,) = re.findall(r'qwen3vl_first_token_seconds_bucket{le="\+Inf"} (\d+)', text)
    assert count == most and int(count) > LINES


def test_wrong_options_end_with_one_line(process, capsys):
    """Before anything is loaded."""
    port = process[1].split(":")[-1].removesuffix("/v1")
    for options in (["--rows", "0"], ["--port", port], ["--port", "99999"], ["--api-key", ""]):
        with pytest.raises(SystemExit) as e:
            serve.main(options)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and options[0] in err


def test_sigterm_finishes_what_runs(demo, process, client):
    """The last test of the process: a stream goes on to its end, and the exit code is 0."""
    child, _ = process
    long = {"max_tokens": 220, "extra_body": {"min_new_tokens": 220}}
    with client.chat.completions.create(model="demo", messages=TEXT, stream=True, **long) as stream:
        chunks = iter(stream)
        text = next(chunks).choices[0].delta.content
        child.send_signal(signal.SIGTERM)
        assert "stopping after 1 requests" in child.stderr.readline()
        for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason
    assert (text, reason) == alone(demo, TEXT, 220, min_new_tokens=220)[0]
    assert child.wait(30) == 0
