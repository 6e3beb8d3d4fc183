"""A chat in the terminal: turns read line by line, answers streamed, the cache kept between turns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.pictures import load_image
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.session import take_turn
from qwen3vl_jax.structs import Params

HELP = "/image PATH and /video PATH go with the next question; /new starts afresh; /quit ends"


def converse(
    params: Params,
    proc: Processor,
    system: str | None = None,
    waiting: list[dict[str, Any]] | None = None,
    read: Callable[[str], str] = input,
    **options: Any,
) -> None:
    """Reads questions until /quit or the end of input, and prints each answer as it comes.

    waiting: pictures and clips that go with the first question; options are those of `take_turn`. What
    a turn cannot use (no such file, a prompt too long) is told in one line, and the chat goes on.
    """
    opening = [{"role": "system", "content": system}] if system else []
    messages, kept, waiting = list(opening), None, list(waiting or [])
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
        elif command in ("/image", "/video"):
            try:
                if command == "/image":
                    load_image(rest.strip())
                waiting.append({"type": command[1:], command[1:]: rest.strip()})
            except InputError as e:
                print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        elif command.startswith("/"):
            print(f"error: {command}: {HELP}", file=sys.stderr)
        elif line:
            content = [*waiting, {"type": "text", "text": line}]
            try:
                answer, kept = _answered(
                    take_turn(
                        params,
                        proc,
                        [*messages, {"role": "user", "content": content}],
                        kept,
                        **options,
                    )
                )
            except InputError as e:
                print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
                waiting = []
                continue
            messages += [{"role": "user", "content": content}, proc.parse(answer).message()]
            waiting = []


def _answered(turn: Any) -> Any:
    """Prints the pieces of a turn and gives what it returns."""
    while True:
        try:
            print(next(turn), end="", flush=True)
        except StopIteration as end:
            print(flush=True)
            return end.value
