"""A chat in the terminal: turns read line by line, answers streamed, the cache kept between turns."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.infer_arguments import input_options
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.chat_session import ChatState, take_turn
from qwen3vl_jax.inference.constraints import read_constraint
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime import console
from qwen3vl_jax.runtime.console import Status, memory_advice

HELP = (
    "/image PATH and /video PATH go with the next question; /new starts afresh; /quit ends, /help says "
    "this; Ctrl-C stops an answer, and the chat where there is none"
)
# What the keys of a terminal send that is no text: arrows, function keys, control characters.
_KEYS = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|O.|.)?|[\x00-\x08\x0b-\x1f\x7f]")
ADVICE = "/new, --max-pixels, --prefill-chunk, or --dtype bfloat16"
Item = dict[str, Any]


def run(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Talks in the terminal until the end of input."""
    directory, processor = common.open_checkpoint(args)
    sampling, inputs = common.read_sampling(args, processor), input_options(args)
    media = [load_media(processor, "image", source, inputs) for source in args.image]
    media += [load_media(processor, "video", source, inputs) for source in args.video]
    params, _ = common.load_checkpoint(args, directory, scope, status)
    names = ("max_new_tokens", "prefill_chunk", "seed", "stop")
    options = {name: getattr(args, name) for name in names}
    options |= {"max_len": common.max_length(args, processor), "sampling": sampling}
    options["constraint"] = read_constraint(processor, args.thinking_budget)
    converse(params, processor, args.system, media, inputs=inputs, **options)


def load_media(proc: Processor, kind: str, source: str, inputs: Mapping[str, Any] | None) -> Item:
    """An image or video, read once for all turns; inputs as in `take_turn`. Raises InputError."""
    of_text = ("allow_special", "template_vars")
    options = {key: value for key, value in (inputs or {}).items() if key not in of_text}
    return proc.look({"type": kind, kind: source}, **options)


def read_line(prompt: str) -> str:
    """A line of the user's, edited and recalled with the arrow keys where Python has readline."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() uses it from now on
    if sys.stdout.isatty():
        return input(prompt)
    # The answers go to a file.
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def converse(
    params: Any,
    proc: Processor,
    system: str | None = None,
    media: list[Item] | None = None,
    read: Callable[[str], str] = read_line,
    **options: Any,
) -> None:
    """Reads questions until /quit or the end of input, and prints each answer as it comes.

    media, of `load_media`, go with the first question; options are those of `take_turn`. An error of a
    turn is one line.
    """
    opening = [{"role": "system", "content": system}] if system else []
    messages, media, state = list(opening), list(media or ()), None
    variables = (options.get("inputs") or {}).get("template_vars", {})
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = _KEYS.sub("", read("> ")).strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit" or line in ("exit", "quit"):
            return
        try:
            if command == "/new":
                messages, state, media = list(opening), None, []
            elif command in ("/help", "/?"):
                print(HELP, file=sys.stderr)
            elif command in ("/image", "/video"):
                if not (path := rest.strip()):
                    raise InputError(f"{command} needs a PATH")
                media.append(load_media(proc, command[1:], path, options.get("inputs")))
                print(f"{path}: goes with the next question", file=sys.stderr)
            elif command.startswith("/"):
                raise InputError(f"{command}: no such command; {HELP}")
            elif line:
                content = [*media, {"type": "text", "text": line}]
                asked = [*messages, {"role": "user", "content": content}]
                answer, state = _answer(params, proc, asked, state, options)
                media = []
                messages = [*asked, _message(proc, answer, proc.render(asked, **variables))]
        except InputError as e:
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            # A turn that failed may have donated the cache's memory already.
            held = jax.tree.leaves(state.cache if state else None)
            if any(isinstance(x, jax.Array) and x.is_deleted() for x in held):
                state = None


def _answer(params, proc, asked, state, options) -> tuple[str, ChatState]:
    """Prints the pieces of a turn as they come, and gives what it returns. Raises InputError."""
    seen = [item[item["type"]] for item in asked[-1]["content"] if item["type"] != "text"]
    patches = sum(len(one.patches) for one in seen)
    slots = options["max_new_tokens"] + patches // proc.config.vision.merge_unit
    slots += 0 if state is None else len(state.ids)
    turn, stop = take_turn(params, proc, asked, state, **options), False

    def press(*_: Any) -> None:
        nonlocal stop
        console.interrupt_heard.set()
        # Pressed again, it ends the chat.
        if stop:
            raise KeyboardInterrupt
        stop = True

    held = console.memory_parts(params, proc.config, slots, patches, "about")
    with memory_advice(held, ADVICE), console.handling([signal.SIGINT], press), Status() as status:
        status.show("compiling and reading" if state is None else "reading", line=False)
        try:
            piece = next(turn)
            while True:
                status.stop()
                print(piece, end="", flush=True)
                piece = turn.send(stop)
        except StopIteration as end:
            print(flush=True)
            answer, state = end.value
    assert state is not None
    if stop:
        print("stopped: what was said stays in the conversation", file=sys.stderr)
    elif not answer.strip():
        print("the answer is empty", file=sys.stderr)
    elif not state.ended:
        print("the answer was cut off (--max-new-tokens, --max-len)", file=sys.stderr)
    return answer, state


def _message(proc: Processor, answer: str, prompt: str) -> Item:
    """An answer as a message; its reasoning stays in the text if the template has no place for it."""
    message = proc.parse(answer, prompt).message()
    if "reasoning_content" in message and not proc.template.writes_of_answers("reasoning_content"):
        opened = "<think>\n" if prompt.rstrip().endswith("<think>") else ""
        return {"role": "assistant", "content": opened + answer}
    return message
