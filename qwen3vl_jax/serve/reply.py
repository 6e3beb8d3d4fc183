"""An answer's tokens, as they come, into the parts of OpenAI's message."""

import uuid
from typing import Any

from qwen3vl_jax.inference.requests import Finished
from qwen3vl_jax.processing.parse_reply import parse_calls
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream
from qwen3vl_jax.serve.protocol import ApiError, ChatRequest
from qwen3vl_jax.storage.json_text import write_json

OPEN, CLOSE, CALL = "<think>", "</think>", "<tool_call>"
Delta = dict[str, Any]


class Reply:
    """One choice: tokens in, deltas out, which together are the whole message.

    thinking: the prompt has opened <think>. Text that may yet be part of a tag, and line breaks that may
    be at the end of a part, are held. Calls of tools come at the end.
    """

    def __init__(self, proc: Processor, asked: ChatRequest, thinking: bool):
        self.proc, self.asked = proc, asked
        self.text = TextStream(proc.tokenizer, asked.request.stop_strings)
        self.part = ""  # not known yet
        self.thought, self.held, self.sent = thinking, "", ""
        self.tokens, self.finish_reason = 0, ""
        self.logprobs: list[dict[str, Any]] = []  # not yet in a delta

    def add(self, event: Any) -> list[Delta]:
        """The deltas of an event of the engine; the last event sets finish_reason. Raises ApiError."""
        if not isinstance(event, Finished):
            tokens, logprobs = event
            self.tokens += len(tokens)
            pairs = [x for x in zip(tokens, logprobs) if x[0] not in self.proc.stop_ids]
            if self.asked.logprobs:
                self.logprobs += [self._logprob(*pair) for pair in pairs]
            self.held += self.text.push(token for token, _ in pairs)
            return self._deltas(False)
        if event.finish_reason not in ("stop", "length", "repetition"):
            raise ApiError(500, event.error or "the answer was cancelled")
        self.held += self.text.flush()
        self.finish_reason = event.finish_reason
        return self._deltas(True)

    def _deltas(self, ended: bool) -> list[Delta]:
        found: list[Delta] = []
        if not self.part:
            begins = self.held.lstrip()
            if not ended and len(begins) < len(OPEN) and OPEN.startswith(begins):
                return []
            opens = begins.startswith(OPEN)
            self.thought |= opens
            self.part = "reasoning_content" if self.thought else "content"
            self.held = begins.removeprefix(OPEN) if opens else self.held
        if self.part == "reasoning_content":
            text, close, rest = self.held.partition(CLOSE)
            found += self._release(text, CLOSE, bool(close) or ended, True)
            if not close:
                return found
            self.part, self.held, self.sent = "content", rest, ""
        if self.part == "content":
            at = self.held.find(CALL) if self.asked.tools else -1
            text, rest = (self.held, "") if at < 0 else (self.held[:at], self.held[at:])
            tag = CALL if self.asked.tools else ""
            found += self._release(text, tag, ended or at >= 0, self.thought or at >= 0)
            self.held, self.part = self.held + rest, "content" if at < 0 else "calls"
        return found + self._calls() if self.part == "calls" and ended else found

    def _release(self, text: str, tag: str, is_last: bool, strips: bool) -> list[Delta]:
        """The delta of a part's text that is certain; strips: line breaks at its end are not of it."""
        if self.thought and not self.sent:
            text = text.lstrip("\n")
        known = text
        if not is_last:
            ends = (n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n]))
            known = text[: len(text) - next(ends, 0)]
        if strips or (tag and not is_last):
            known = known.rstrip("\n")
        self.held, self.sent = text[len(known) :], self.sent + known
        return [{self.part: known}] if known else []

    def _calls(self) -> list[Delta]:
        """The calls, and what else is text behind the first of them."""
        reply = parse_calls(self.sent + self.held, self.thought)
        rest = reply.content.lstrip("\n")[len(self.sent.lstrip("\n")) :]
        found: list[Delta] = [{"content": rest}] if rest else []
        for index, call in enumerate(reply.tool_calls):
            arguments = write_json(call.arguments, "arguments", ensure_ascii=False)
            function = {"name": call.name, "arguments": arguments}
            name = f"call_{uuid.uuid4().hex[:24]}"
            given = {"index": index, "id": name, "type": "function", "function": function}
            found.append({"tool_calls": [given]})
            self.finish_reason = "tool_calls"
        return found

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        data = self.proc.tokenizer.token_bytes(token, False)
        text = self.proc.decode([token], False)
        return {"token": text, "logprob": value, "bytes": list(data), "top_logprobs": []}


def message(deltas: list[Delta]) -> dict[str, Any]:
    """The whole message of all deltas of a choice."""
    found: dict[str, Any] = {"role": "assistant", "refusal": None}
    for key in ("content", "reasoning_content"):
        parts = [delta[key] for delta in deltas if key in delta]
        found[key] = "".join(parts) if parts else None
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if calls:
        found["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
    elif found["content"] is None:
        found["content"] = ""
    return {k: v for k, v in found.items() if v is not None or k != "reasoning_content"}
