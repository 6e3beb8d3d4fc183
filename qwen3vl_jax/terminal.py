"""A chat in the terminal: turns read line by line, answers streamed, the cache kept between turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qwen3vl_jax.cli import memory_advice, parts
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.session import Kept, take_turn
from qwen3vl_jax.structs import Params

HELP = "/image PATH and /video PATH go with the next question; /new starts afresh; /quit ends"
ADVICE = "/new, --max-pixels, --prefill-chunk, or --dtype bfloat16"
Item = dict[str, Any]


def looked(proc: Processor, item: Item, inputs: Mapping[str, Any] | None) -> Item:
    """A picture or clip, read once for the whole chat; inputs as in `take_turn`. Raises InputError."""
    names = ("allow_special", "template_vars")  # of the text
    return proc.look(item, **{k: v for k, v in (inputs or {}).items() if k not in names})


def converse(
    params: Params,
    proc: Processor,
    system: str | None = None,
    waiting: list[Item] | None = None,
    read: Callable[[str], str] = input,
    **options: Any,
) -> None:
    """Reads questions until /quit or the end of input, and prints each answer as it comes.

    waiting: pictures and clips that go with the first question; options are those of `take_turn`. What
    a turn cannot use (no such file, a prompt too long) is told in one line, and the chat goes on.
    """
    opening = [{"role": "system", "content": system}] if system else []
    inputs = options.get("inputs")
    messages, kept = list(opening), None
    waiting = [looked(proc, item, inputs) for item in waiting or ()]
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = read("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            messages, kept, waiting = list(opening), None, []
            continue
        try:
            if command in ("/image", "/video"):
                item = {"type": command[1:], command[1:]: rest.strip()}
                waiting.append(looked(proc, item, inputs))
            elif command.startswith("/"):
                raise InputError(f"{command}: {HELP}")
            elif line:
                content, waiting = [*waiting, {"type": "text", "text": line}], []
                asked = [*messages, {"role": "user", "content": content}]
                answer, kept = _answered(params, proc, asked, kept, options)
                prompt = proc.render(asked)  # which may open a <think> for the answer
                messages = [*asked, proc.parse(answer, prompt).message()]
        except InputError as e:
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            kept = kept if kept and not _gone(kept) else None


def _answered(
    params: Params,
    proc: Processor,
    asked: list[Item],
    kept: Kept | None,
    options: Mapping[str, Any],
) -> tuple[str, Kept]:
    """Prints the pieces of a turn as they come and gives what it returns; raises InputError."""
    seen = [item[item["type"]] for item in asked[-1]["content"] if item["type"] != "text"]
    patches = sum(len(one.rows) for one in seen)
    slots = options["max_new_tokens"] + patches // proc.config.vision.merge_unit
    slots += 0 if kept is None else len(kept.ids)
    turn = take_turn(params, proc, asked, kept, **options)
    with memory_advice(parts(params, proc.config, slots, patches, "about"), ADVICE):
        while True:
            try:
                print(next(turn), end="", flush=True)
            except StopIteration as end:
                print(flush=True)
                answer, keep = end.value
                break
    if not keep.ended:
        print("the answer was cut off (--max-new-tokens, --max-len)", file=sys.stderr)
    return answer, keep


def _gone(kept: Kept) -> bool:
    """Whether a turn that failed had already given the cache's memory away."""
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(kept.cache))
