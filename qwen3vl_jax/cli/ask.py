"""infer.py without another mode: answers one conversation, and prints the answer as it comes."""

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import qwen3vl_jax as q3
from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.draw import draw_answer, images_of, pixel_marks
from qwen3vl_jax.cli.infer_arguments import check_media, input_options, read_messages
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference.constraints import Constraint, read_constraint
from qwen3vl_jax.inference.row_answer import RowAnswer, check_repeats
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, EncodedVideo, to_hf_arrays
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.tokenizer import TextStream
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.console import Clock, Status, memory_advice, memory_of_batch
from qwen3vl_jax.storage.json_text import write_json


class Prompt(NamedTuple):
    """One conversation ready for the model."""

    directory: Path
    processor: q3.Processor
    encoded: EncodedPrompt
    messages: list[dict]
    limit: int  # tokens of prompt and answer
    constraint: Constraint | None


def run(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Prints the answers. With --mesh over several processes only the first one prints."""
    index, count = distributed.start(distributed.asked_of(args)) if args.mesh else (0, 1)

    def ask() -> None:
        prompt = distributed.agreed(lambda: read_prompt(args))
        if count > 1:
            seen = [repr({**vars(args), "process": 0}).encode()]
            seen += [prompt.encoded.ids.tobytes()]
            seen += [x.patches.tobytes() for x in prompt.encoded.images]
            distributed.check_alike("--mesh: other options, prompt or images", *seen)
        with contextlib.ExitStack() as silence:
            # All processes make the same answer: the first prints it, the others' output is dropped.
            if index:
                silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            text = answer(args, prompt, scope, status)
        if args.draw and not index:
            draw_answer(args.draw, prompt.messages, text, args.image if args.messages else [])

    distributed.end_together(ask, "the beginning")


def conversation(args: argparse.Namespace) -> tuple[list[dict], list[dict] | None]:
    """The messages to answer and the tools they may call. Raises InputError."""
    if args.messages:
        if args.prompt or args.system:
            why = "the file holds the whole conversation"
            raise InputError(f"--messages: {why}, leave --prompt and --system out")
        return read_messages(args.messages)
    if not args.ckpt and not args.image and not args.video:
        args.image, args.prompt = [str(common.DEMO_IMAGE)], args.prompt or common.DEMO_PROMPT
    seen = "video" if args.video else "image" if args.image else None
    prompt = args.prompt or (seen and f"Describe this {seen}.")
    if not prompt:
        raise InputError("nothing to ask: give --prompt, --image, --video or --messages")
    content = [{"type": "image", "image": load_image(source)} for source in args.image]
    content += [{"type": "video", "video": source} for source in args.video]
    content.append({"type": "text", "text": prompt})
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": content}], None


def read_prompt(args: argparse.Namespace) -> Prompt:
    """All that can be refused without jax. Raises InputError."""
    messages, tools = conversation(args)
    directory, processor = common.open_checkpoint(args)
    media = {"images": args.image or None, "videos": args.video or None} if args.messages else {}
    prompts = processor.encode(messages, tools=tools, **media, **input_options(args))
    if len(prompts) != 1:
        raise InputError(f"--messages: the file holds {len(prompts)} conversations, expected one")
    (encoded,) = prompts
    held = {"video" if x.is_video else "image" for x in encoded.images}
    check_media(args, held, "the conversation has no {}; leave it out")
    videos = [x for x in encoded.images if isinstance(x, EncodedVideo)]
    for number, video in enumerate(videos, 1):
        if used := video.frames:
            _, high, wide = (processor.config.vision.patch_size * side for side in video.grid)
            times = f"second {used.seconds[0]:.1f} to {used.seconds[-1]:.1f}"
            frames = f"{len(used.indices)} frames, {times}, {wide} x {high}"
            print(f"video {number}: {frames}", file=sys.stderr)
    limit = common.max_length(args, processor)
    check_repeats(args.max_repeats)
    control = read_constraint(processor, args.thinking_budget, common.response_format(args))
    if args.draw and "image" not in held:
        raise InputError("--draw: the conversation has no image to draw on; give --image")
    if (length := len(encoded.ids)) >= limit:
        found = f"the prompt has {length} tokens and the cache holds {limit} (--max-len)"
        lower = "shorten the prompt, lower --max-pixels (--video-max-pixels, --fps)"
        raise InputError(f"{found}: {lower}, or allow more")
    return Prompt(directory, processor, encoded, messages, limit, control)


class Texts:
    """The answers and their texts, made of tokens as they come; printed at once with --stream."""

    def __init__(self, args: argparse.Namespace, processor: q3.Processor, limit: int):
        self.args, self.processor, count = args, processor, range(args.answers)
        self.streams = [TextStream(processor.tokenizer, args.stop) for _ in count]
        self.answers = [RowAnswer(limit, args.stop, args.max_repeats) for _ in count]
        self.texts = [""] * args.answers

    @property
    def ended(self) -> np.ndarray:
        """Which answers have ended [B] bool."""
        return np.array([bool(answer.finish_reason) for answer in self.answers])

    def add(self, new: np.ndarray) -> None:
        """Takes new tokens [B n]; negative ones are none."""
        stops = self.processor.stop_ids
        for row, answer in enumerate(self.answers):
            if not answer.finish_reason:
                count = answer.add(new[row], stops, self.processor.decode)
                ids = answer.tokens[len(answer.tokens) - count :]
                self._show(row, self.streams[row].push(t for t in ids if t not in stops))

    def _show(self, row: int, piece: str) -> None:
        self.texts[row] += piece
        if self.args.stream:
            print(piece, end="", flush=True)

    def finish(self) -> None:
        """Prints what is not printed yet."""
        for row, text in enumerate(self.streams):
            self._show(row, text.flush())
        for row, text in enumerate(self.texts if not self.args.json else ()):
            numbered = f"[{row + 1}] {text}" if len(self.texts) > 1 else text
            print("" if self.args.stream else numbered)
        sys.stdout.flush()

    def warn(self, cut_off: str) -> None:
        """Says on stderr which answers are empty, and which were not ended by the model."""
        for number, text in enumerate(self.texts, 1):
            if not text.strip():
                which = f"answer {number}" if len(self.texts) > 1 else "the answer"
                print(f"{which} is empty", file=sys.stderr)
        reasons = [answer.finish_reason for answer in self.answers]
        if "length" in reasons:
            print(cut_off, file=sys.stderr)
        if "repetition" in reasons:
            print("the answer was ended, for it repeats itself (--max-repeats)", file=sys.stderr)

    def print_json(self, prompt: Prompt, seconds: dict[str, float]) -> None:
        """Prints each answer in its parts, a JSON object a line."""
        ids = prompt.encoded.ids
        images = images_of(prompt.messages, self.args.image if self.args.messages else [])
        for answer, text in zip(self.answers, self.texts):
            reply = self.processor.parse(text, self.processor.decode(ids[-8:], False))
            found = {"text": reply.content, "reasoning": reply.reasoning}
            found["tool_calls"] = [dataclasses.asdict(call) for call in reply.tool_calls]
            found["boxes"] = [pixel_marks(reply.content, image) for image in images]
            found |= {"prompt_tokens": len(ids), "completion_tokens": len(answer.tokens)}
            found |= {"finish_reason": answer.finish_reason, "seconds": seconds}
            print(write_json(found, "the answer"))


def answer(
    args: argparse.Namespace, prompt: Prompt, scope: contextlib.ExitStack, status: Status
) -> str:
    """Loads the weights, prints the answers (timing on stderr) and returns the first of them.

    Ctrl-C, or logits that are not finite, end it: what was answered is printed first. Raises InputError.
    """
    directory, processor, encoded, messages, most, constraint = prompt
    sampling = common.read_sampling(args, processor)
    batch = q3.make_batch(processor.config, **to_hf_arrays(processor.config, [encoded]))
    if args.answers > 1 and not sampling.temperature:
        print("temperature 0: the answers are all alike (try --temperature 1)", file=sys.stderr)
    clock = Clock()
    params, cfg = common.load_checkpoint(args, directory, scope, status, messages)
    loading = clock.lap()
    status.show("compiling")
    length = len(encoded.ids)
    room = min(args.max_new_tokens, most - length)
    limits = {"max_new_tokens": room, "max_len": most, "prefill_chunk": args.prefill_chunk}
    rows = {"seed": args.seed, "copies": args.answers, "stop_ids": processor.stop_ids}
    rows |= {"constraint": constraint}
    chunks = q3.stream(params, cfg, batch, sampling=sampling, **limits, **rows)
    texts, count, prefill = Texts(args, processor, room), 0, 0.0
    start, seconds = time.perf_counter(), dict[str, float]()
    held = memory_of_batch(params, cfg, batch)
    advice = "--max-pixels, --max-len, or --dtype bfloat16"
    try:
        with memory_advice(held, advice), contextlib.suppress(StopIteration):
            new = next(chunks)
            while True:
                status.stop()
                prefill = prefill or clock.lap()
                seconds.setdefault("first_token", round(time.perf_counter() - start, 3))
                count += new.shape[1]
                texts.add(new)
                new = chunks.send(texts.ended)
    finally:
        status.stop()
        if count:
            texts.finish()
    if args.json:
        texts.print_json(prompt, seconds | {"total": round(time.perf_counter() - start, 3)})
    why = "--max-new-tokens" if room == args.max_new_tokens else "--max-len"
    texts.warn(f"the answer was cut off after {count} tokens ({why})")
    report = f"load {loading:.1f} s, compile {clock.compiling:.1f} s, "
    report += f"prefill {length} tokens {length / prefill:.0f}/s"
    if count > 1:
        report += f", decode {count - 1} tokens {(count - 1) / clock.lap():.1f}/s"
    print(report, file=sys.stderr)
    return texts.texts[0]
