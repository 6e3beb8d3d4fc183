"""Requests of OpenAI's API, read and checked: plain data, no web framework."""

import base64
import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qwen3vl_jax.errors import InputError, check_int, shown
from qwen3vl_jax.inference.requests import Request
from qwen3vl_jax.inference.row_answer import check_repeats
from qwen3vl_jax.inference.sampling import Sampling
from qwen3vl_jax.processing.messages import fields
from qwen3vl_jax.processing.tokenizer import stop_list
from qwen3vl_jax.storage.json_text import read_json

MOST_CHOICES = 128  # answers to one request
MOST_INPUTS = 256  # vectors of one request
# Stop strings, and characters of one: each is looked for at every token.
MOST_STOPS, LONGEST_STOP = 16, 256
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_LIMITS = ("max_completion_tokens", "max_tokens")
# What holds an answer to a form, as `read_constraint` takes it.
CONTROL = ("response_format", "thinking_budget")
_CHAT = ("model", "messages", "tools", "tool_choice", "chat_template_kwargs", *CONTROL)
_CHAT += (
    "stream",
    "stream_options",
    "n",
    "seed",
    "stop",
    "logprobs",
    "max_repeats",
    *_LIMITS,
    *_SAMPLING,
)
_EMBEDDING = ("model", "input", "dimensions", "encoding_format", "instruction")
# Keys that OpenAI's clients send and that change nothing here, and the values that are then taken; None
# is any.
HARMLESS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "metadata")),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (True,),
    "frequency_penalty": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
}


class ApiError(InputError):
    """An error as a client gets it: a status, and OpenAI's error object."""

    def __init__(self, status: int, message: object, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        found = {"message": str(self), "type": _TYPES.get(self.status, kind)}
        return {"error": {**found, "param": self.param, "code": self.code}}


@contextlib.contextmanager
def blaming(param: str | None, code: str = "") -> Iterator[None]:
    """Turns an InputError into a 400 that names a key of the request."""
    try:
        yield
    except ApiError:
        raise
    except InputError as e:
        raise ApiError(400, e, param, code) from e


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What /v1/chat/completions is asked for; `request` is that of its first choice, without a prompt."""

    messages: list[Any]
    tools: list[Any] | None
    template_vars: dict[str, Any]
    request: Request
    choices: int
    stream: bool
    with_usage: bool
    logprobs: bool
    control: dict[str, Any]  # of CONTROL


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
    """What /v1/embeddings is asked for: things of `embed_conversation`."""

    things: list[dict[str, Any]]
    dims: int
    as_base64: bool
    instruction: str | None

    def form(self, vector: np.ndarray) -> Any:
        """A unit vector as it is asked for: its first dims, normalised again (Matryoshka)."""
        first = vector[: self.dims]
        data = (first / max(float(np.linalg.norm(first)), 1e-12)).astype("<f4")
        return base64.b64encode(data.tobytes()).decode() if self.as_base64 else data.tolist()


def read_body(data: bytes, model: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a request for `model` that are not null and not HARMLESS. Raises ApiError."""
    with blaming(None):
        body = read_json(data, "request")
    if not isinstance(body, dict):
        raise ApiError(400, f"request: got {type(body).__name__}, expected a JSON object")
    named = (*known, *HARMLESS)
    with blaming(next((key for key in body if key not in named), None), "unknown_parameter"):
        given = fields(body, named, "request: ")
    for key, allowed in HARMLESS.items():
        if key in given and key not in known and allowed not in (None, ()):
            value = given[key]
            if not any(type(value) in (type(x), float) and value == x for x in allowed):
                expected = f"expected {' or '.join(map(repr, allowed))} (it has no effect here)"
                wrong = f"{key}: got {shown(value)}, {expected}; leave it out"
                raise ApiError(400, wrong, key, "unsupported_parameter")
    check_model(given.get("model", model), model)
    return {key: value for key, value in given.items() if key in known}


def check_model(name: Any, model: str) -> None:
    """Raises ApiError for another name than the model's."""
    if name != model:
        wrong = f"model: got {shown(name)}, expected {model!r}, the only one here"
        raise ApiError(404, wrong, "model", "model_not_found")


def usage_of(prompt: int, answer: int | None = None) -> dict[str, int]:
    """OpenAI's count of tokens; answer: those of answers, where there are any."""
    answers = {} if answer is None else {"completion_tokens": answer}
    return {"prompt_tokens": prompt, **answers, "total_tokens": prompt + (answer or 0)}


def read_chat(
    data: bytes, model: str, sampling: Mapping[str, float], max_new_tokens: int
) -> ChatRequest:
    """A chat request; sampling, max_new_tokens: where it does not say. Raises ApiError."""
    given = read_body(data, model, _CHAT)
    messages = _typed(given, "messages", list, None)
    if messages is None:
        raise ApiError(400, "messages: expected a list of messages, found none", "messages")
    stream = _typed(given, "stream", bool, False)
    options = _typed(given, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options: means something only with stream", "stream_options")
    with blaming("stream_options"):
        options = fields(options, ("include_usage",), "stream_options: ")
    return ChatRequest(
        messages,
        _tools(given),
        _typed(given, "chat_template_kwargs", dict, {}),
        _request(given, sampling, max_new_tokens),
        _count(given, "n", 1, MOST_CHOICES),
        stream,
        _typed(options, "include_usage", bool, False),
        _typed(given, "logprobs", bool, False),
        {key: given[key] for key in CONTROL if key in given},
    )


def read_embedding(data: bytes, model: str, size: int) -> EmbeddingRequest:
    """A request for vectors of a model of `size` dimensions. Raises ApiError."""
    given = read_body(data, model, _EMBEDDING)
    found = given.get("input", [])
    things = found if isinstance(found, list) else [found]
    expected = "a text, an object of text, image, video, or a list of them (not token ids)"
    if len(things) > MOST_INPUTS:
        raise ApiError(400, f"input: got {len(things)}, expected at most {MOST_INPUTS}", "input")
    if not things or not all(isinstance(x, str | dict) and x for x in things):
        raise ApiError(400, f"input: got {shown(found)}, expected {expected}", "input")
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        wrong = f"encoding_format: got {shown(form)}, expected float or base64"
        raise ApiError(400, wrong, "encoding_format")
    dims = _count(given, "dimensions", size, size)
    things = [{"text": thing} if isinstance(thing, str) else thing for thing in things]
    return EmbeddingRequest(things, dims, form == "base64", _typed(given, "instruction", str, None))


def _request(given: Mapping[str, Any], sampling: Mapping[str, float], limit: int) -> Request:
    found = {key: given[key] for key in _LIMITS if key in given}
    for key in found:
        limit = _count(given, key, 1)
    if len(set(found.values())) > 1:
        raise ApiError(400, f"max_tokens: got {found}, expected one of them", "max_tokens")
    for key in _SAMPLING:
        if key in given:
            with blaming(key):
                Sampling(**{key: given[key]}).rows(1)
    chosen = {**sampling, **{key: given[key] for key in _SAMPLING if key in given}}
    with blaming("stop"):
        stop = stop_list(given.get("stop", ()))
    if len(stop) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stop):
        most = f"at most {MOST_STOPS} strings of {LONGEST_STOP} characters"
        raise ApiError(400, f"stop: expected {most}", "stop")
    # Without one, answers differ from request to request.
    seed = given.get("seed", secrets.randbits(32))
    if type(seed) is not int:
        raise ApiError(400, f"seed: got {shown(seed)}, expected a whole number", "seed")
    with blaming("max_repeats"):
        check_repeats(repeats := given.get("max_repeats", 0))
    with blaming("seed"):
        return Request(None, {}, limit, Sampling(**chosen), seed, stop, max_repeats=repeats)


def _tools(given: Mapping[str, Any]) -> list[Any] | None:
    """The tools that the model is told of. Raises ApiError."""
    tools, choice = _typed(given, "tools", list, None), given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        wrong = f"tool_choice: got {shown(choice)}, expected auto or none"
        raise ApiError(400, wrong, "tool_choice", "unsupported_parameter")
    return None if choice == "none" else tools


def _typed(given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    if (value := given.get(key, default)) is not default and type(value) is not kind:
        names = {bool: "true or false", dict: "an object", list: "a list", str: "a text"}
        raise ApiError(400, f"{key}: got {shown(value)}, expected {names[kind]}", key)
    return value


def _count(given: Mapping[str, Any], key: str, default: int, at_most: int = 2**31 - 1) -> int:
    with blaming(key):
        return check_int(key, given.get(key, default), at_most)
