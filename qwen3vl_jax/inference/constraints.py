"""Answers under control: a budget of thinking, and JSON by a schema or a grammar. Needs no jax.

A row is masked at a step where not every token may come next: a uint32 [ceil(V/32)] with a bit for each
token that may. Masks of grammars are llguidance's (the extra `json`). Raises InputError.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from qwen3vl_jax.errors import InputError, one_line, shown, unexpected
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import Tokenizer

# What ends the thinking of a spent budget, as Qwen3's templates write it.
CLOSING = "\n</think>\n\n"
# One form of white space, that of json.dumps: of free white space an answer may never end.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BESIDE_SCHEMA = {"name", "description", "strict"}
log = logging.getLogger("qwen3vl_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """What an answer may be. One serves any number of rows, each of which has its own state.

    thinking_budget: most tokens after <think>, which the prompt or the answer opens; then CLOSING is
    forced. schema: a JSON schema; grammar: one of llguidance, in its form of Lark. Either holds for what
    comes after the thinking that the prompt opened, and needs the extra `json`.
    """

    processor: Processor = dataclasses.field(repr=False)
    thinking_budget: int | None = None
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        budget, tokenizer = self.thinking_budget, self.processor.tokenizer
        if budget is not None and not (type(budget) is int and 0 <= budget < 2**31):
            raise unexpected("thinking_budget", shown(budget), "a whole number from 0 to 2^31 - 1")
        if budget is not None and not {"<think>", "</think>"} <= tokenizer.added.keys():
            raise InputError(
                "thinking_budget: the tokenizer has no <think> and </think>; leave it out"
            )
        if self.schema is not None and self.grammar is not None:
            raise InputError("schema and grammar: give one of them")
        # Refused here, where it is wrong.
        _ = self.matcher

    @functools.cached_property
    def matcher(self) -> Any:
        """llguidance's LLMatcher at its start, to be copied; None without schema and grammar."""
        key, given = ("schema", self.schema) if self.grammar is None else ("grammar", self.grammar)
        if given is None:
            return None
        of, vocabulary = self.processor, self.processor.config.text.vocab_size
        try:
            import llguidance

            make: Any = llguidance.LLMatcher
            if key == "grammar":
                source = make.grammar_from_lark(given)
            else:
                source = make.grammar_from_json_schema(given, defaults=_JSON)
            found = make(_llguidance(of.tokenizer, vocabulary, of.stop_ids), source, log_level=0)
            fault = found.get_error()
        except ImportError as e:
            advice = "pip install 'qwen3vl-jax[json]'"
            raise InputError(f"{key}: llguidance is not installed; {advice}") from e
        except (TypeError, ValueError) as e:
            raise InputError(f"{key}: {one_line(e)}") from e
        if fault:
            raise InputError(f"{key}: {one_line(fault)}")
        return found


class _Plain:
    """A tokenizer as llguidance asks for one. Of a text no token is an added one, which it would refuse."""

    bos_token_id, is_tokenizer_wrapper = None, True

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: tuple[int, ...]) -> None:
        self.tokens = [tokenizer.token_bytes(i, False) for i in range(vocabulary)]
        self.special_token_ids = sorted(tokenizer.added.values())
        self.eos_token_id, backend = stop_ids[0], tokenizer.backend
        self.plain = tokenizers.Tokenizer(backend.model)
        self.plain.normalizer, self.plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self.plain.encode(text, add_special_tokens=False).ids


@functools.lru_cache(maxsize=4)
def _llguidance(tokenizer: Tokenizer, vocabulary: int, stop_ids: tuple[int, ...]) -> Any:
    """llguidance's form of a tokenizer, whose making takes seconds."""
    import llguidance

    plain: Any = _Plain(tokenizer, vocabulary, stop_ids)
    return llguidance.LLTokenizer(plain, eos_token=list(stop_ids))


class RowConstraint:
    """What may come next in one answer; arguments as in `start_rows`."""

    def __init__(self, constraint: Constraint, prompt: np.ndarray, stop_ids: Any) -> None:
        ends = constraint.processor.stop_ids
        self.tokenizer, self.stop_ids = constraint.processor.tokenizer, stop_ids
        self.matcher = constraint.matcher and constraint.matcher.deep_copy()
        if self.matcher and not set(ends) <= set(stop_ids):
            found, why = str(list(stop_ids)), "which end the answers of a schema or grammar"
            raise unexpected("stop_ids", found, f"{list(ends)} among them, {why}")
        self.left = constraint.thinking_budget  # tokens of thinking; None: any number
        self.open, self.close = map(self.tokenizer.added.get, ("<think>", "</think>"))
        self.forced: list[int] = []
        last = next((i for i in prompt[::-1].tolist() if not self._is_blank(i)), None)
        self.state = "thinking" if last == self.open is not None else "answer"
        if self.state == "answer" and not self.matcher and self.left is not None:
            self.state = "start"  # the answer itself may open its thinking
        self._close_if_spent()

    def free(self) -> int | None:
        """How many tokens may be any, whatever they are: 0 asks for a mask, None is no end."""
        if self.forced or self.matcher:
            return 0
        if self.state == "answer" or self.left is None:
            return None
        return self.left + (self.state == "start")

    @property
    def in_grammar(self) -> bool:
        """Whether the next token is one of the grammar."""
        return bool(self.matcher and self.state == "answer" and not self.forced)

    def take(self, token: int) -> bool:
        """Takes the next token; False for one that may not come."""
        if self.forced:
            return token == self.forced.pop(0)
        if self.state == "answer":
            return not self.matcher or self.matcher.consume_token(token)
        if self.state == "start":
            opens = token == self.open
            self.state = "thinking" if opens else "start" if self._is_blank(token) else "answer"
        elif token == self.close:
            self.state = "answer"
            self.forced = (
                self.tokenizer.encode(CLOSING.split("</think>")[1]) if self.matcher else []
            )
        elif self.left is not None:
            self.left -= 1
        self._close_if_spent()
        return True

    def _close_if_spent(self) -> None:
        if self.state == "thinking" and self.left == 0:
            self.state, self.forced = "answer", self.tokenizer.encode(CLOSING)

    def _is_blank(self, token: int) -> bool:
        return not self.tokenizer.token_bytes(token, False).strip()


# One for all rows, or one or None a row.
Constraints = Constraint | Sequence[Constraint | None] | None


def start_rows(given: Constraints, prompts: Sequence[np.ndarray], stop_ids: Any) -> list:
    """Each row's `RowConstraint` behind its prompt [T], or None; stop_ids: those that end answers."""
    rows = given if isinstance(given, Sequence) else [given] * len(prompts)
    if len(rows) != len(prompts) or not all(isinstance(row, Constraint | None) for row in rows):
        raise unexpected("constraint", shown(given), f"Constraints, 1 or {len(prompts)} (rows)")
    return [row and RowConstraint(row, prompt, stop_ids) for row, prompt in zip(rows, prompts)]


def masks_of(rows: Sequence[RowConstraint | None], vocabulary: int) -> np.ndarray | None:
    """The masks [B ceil(V/32)] uint32 of the rows' next tokens; None where each may take any.

    A row without a bit may take none.
    """
    asked = [(b, row) for b, row in enumerate(rows) if row and row.free() == 0]
    if not asked:
        return None
    masks = np.full((len(rows), -(-vocabulary // 32)), -1, np.int32)
    bits = masks.view(np.uint32)
    if matched := [(row.matcher, b) for b, row in asked if row.in_grammar]:
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask_par(_executor(), matched, masks)
    for b, row in asked:
        if row.forced:
            bits[b] = 0
            bits[b, row.forced[0] // 32] = 1 << row.forced[0] % 32
        elif not row.in_grammar:  # its grammar is yet to come
            for token in row.stop_ids:
                bits[b, token // 32] &= ~np.uint32(1 << token % 32)
        elif row.matcher.is_error():  # its mask has the stop ids then
            log.warning("row %d: %s", b, one_line(row.matcher.get_error())[:300])
            bits[b] = 0
    return bits


@functools.cache
def _executor() -> Any:
    import llguidance

    return llguidance.LLExecutor()


def read_constraint(
    processor: Processor, thinking_budget: Any = None, response_format: Any = None
) -> Constraint | None:
    """The constraint of a request's keys; None for none. response_format is OpenAI's, or a grammar's."""
    given: dict[str, Any] = {}
    found = {"type": "text"} if response_format is None else response_format
    match found:
        case {"type": "text"}:
            known = {"type"}
        case {"type": "json_object"}:
            given["schema"], known = {"type": "object"}, {"type"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema), **rest}}:
            given["schema"] = schema
            known = {"type", "json_schema"} if rest.keys() <= _BESIDE_SCHEMA else set()
        case {"type": "grammar", "grammar": str(grammar)}:
            given["grammar"], known = grammar, {"type", "grammar"}
        case _:
            found, known = {""}, set()
    if not set(found) <= known:
        forms = (
            '{"type": "text" or "json_object"}, {"type": "json_schema", "json_schema": {"schema"'
        )
        expected = f'{forms}: ..}}}} or {{"type": "grammar", "grammar": ..}}'
        raise unexpected("response_format", shown(response_format), expected)
    if not given and thinking_budget is None:
        return None
    return Constraint(processor, thinking_budget, **given)
