"""infer.py without another mode: answers one conversation, and prints the answer as it comes."""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import qwen3vl_jax as q3
from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.infer_arguments import check_media, input_options, read_messages
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt, EncodedVideo, to_hf_arrays
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.tokenizer import TextStream
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.console import Clock, Status, memory_advice, memory_of_batch


class Prompt(NamedTuple):
    """One conversation ready for the model."""

    directory: Path
    processor: q3.Processor
    encoded: EncodedPrompt
    messages: list[dict]
    limit: int  # tokens of prompt and answer


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
            from qwen3vl_jax.cli.draw import draw_answer

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
    if args.draw and "image" not in held:
        raise InputError("--draw: the conversation has no image to draw on; give --image")
    if (length := len(encoded.ids)) >= limit:
        found = f"the prompt has {length} tokens and the cache holds {limit} (--max-len)"
        lower = "shorten the prompt, lower --max-pixels (--video-max-pixels, --fps)"
        raise InputError(f"{found}: {lower}, or allow more")
    return Prompt(directory, processor, encoded, messages, limit)


class Texts:
    """The texts of the answers, made of tokens as they come; printed at once with --stream."""

    def __init__(self, args: argparse.Namespace, processor: q3.Processor):
        self.args, self.stop_ids = args, processor.stop_ids
        self.streams = [TextStream(processor.tokenizer, args.stop) for _ in range(args.answers)]
        self.texts = [""] * args.answers
        self.ended = np.zeros(args.answers, bool)

    def add(self, new: np.ndarray) -> None:
        """Takes new tokens [B n]; negative ones are none."""
        for row, text in enumerate(self.streams):
            ids = new[row][new[row] >= 0].tolist()
            self._show(row, text.push(t for t in ids if t not in self.stop_ids))
            self.ended[row] |= text.stopped is not None or any(t in self.stop_ids for t in ids)

    def _show(self, row: int, piece: str) -> None:
        self.texts[row] += piece
        if self.args.stream:
            print(piece, end="", flush=True)

    def finish(self) -> None:
        """Prints what is not printed yet."""
        for row, text in enumerate(self.streams):
            self._show(row, text.flush())
        for row, text in enumerate(self.texts):
            numbered = f"[{row + 1}] {text}" if len(self.texts) > 1 else text
            print("" if self.args.stream else numbered)
        sys.stdout.flush()


def answer(
    args: argparse.Namespace, prompt: Prompt, scope: contextlib.ExitStack, status: Status
) -> str:
    """Loads the weights, prints the answers (timing on stderr) and returns the first of them.

    Ctrl-C, or logits that are not finite, end it: what was answered is printed first. Raises InputError.
    """
    directory, processor, encoded, messages, most = prompt
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
    chunks = q3.stream(params, cfg, batch, sampling=sampling, **limits, **rows)
    texts, count, prefill = Texts(args, processor), 0, 0.0
    held = memory_of_batch(params, cfg, batch)
    advice = "--max-pixels, --max-len, or --dtype bfloat16"
    try:
        with memory_advice(held, advice), contextlib.suppress(StopIteration):
            new = next(chunks)
            while True:
                status.stop()
                prefill = prefill or clock.lap()
                count += new.shape[1]
                texts.add(new)
                new = chunks.send(texts.ended)
    finally:
        status.stop()
        if count:
            texts.finish()
    for number, text in enumerate(texts.texts, 1):
        if not text.strip():
            which = f"answer {number}" if len(texts.texts) > 1 else "the answer"
            print(f"{which} is empty", file=sys.stderr)
    if not texts.ended.all():
        why = "--max-new-tokens" if room == args.max_new_tokens else "--max-len"
        print(f"the answer was cut off after {count} tokens ({why})", file=sys.stderr)
    report = f"load {loading:.1f} s, compile {clock.compiling:.1f} s, "
    report += f"prefill {length} tokens {length / prefill:.0f}/s"
    if count > 1:
        report += f", decode {count - 1} tokens {(count - 1) / clock.lap():.1f}/s"
    print(report, file=sys.stderr)
    return texts.texts[0]
