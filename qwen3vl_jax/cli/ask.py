"""What infer.py prints: the answers to one conversation as they come, vectors and scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import qwen3vl_jax as q3
from qwen3vl_jax.cli.infer_arguments import check_media, input_options
from qwen3vl_jax.inference.sampling import Sampling
from qwen3vl_jax.inference.scoring import check_dims, check_finite
from qwen3vl_jax.processing import retrieval_prompts
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import TextStream
from qwen3vl_jax.runtime.console import (
    Clock,
    Status,
    memory_advice,
    sizes,
)
from qwen3vl_jax.storage.json_text import write_json


class Texts:
    """The texts of the answers, made of tokens as they come; printed at once with --stream."""

    def __init__(self, args: argparse.Namespace, processor: Processor):
        self.args, self.stop_ids = args, processor.stop_ids
        self.streams = [TextStream(processor.tokenizer, args.stop) for _ in range(args.answers)]
        self.texts = [""] * args.answers
        self.ended = np.zeros(args.answers, bool)

    def add(self, new: np.ndarray) -> None:
        """Takes new tokens [B n], negative ones are none."""
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
            print(
                "" if self.args.stream else f"[{row + 1}] {text}" if len(self.texts) > 1 else text
            )
        sys.stdout.flush()


def answer(
    args: argparse.Namespace,
    processor: Processor,
    arrays: dict[str, Any],
    limit: int,
    sampling: Sampling,
    load: Callable[[], tuple[Any, Any]],
    status: Status,
) -> str:
    """Loads the weights, prints the answers (timing on stderr) and returns the first of them.

    What was said is printed too where Ctrl-C or logits that are not finite end it. Raises InputError.
    """
    batch = q3.make_batch(processor.config, **arrays)
    if args.answers > 1 and not sampling.temperature:
        print("temperature 0: the answers are all alike (try --temperature 1)", file=sys.stderr)
    clock = Clock()
    params, cfg = load()
    loading = clock.lap()
    status.show("compiling")
    prompt = int(arrays["attention_mask"].sum())
    room = min(args.max_new_tokens, limit - prompt)
    chunks = q3.stream(params, cfg, batch, max_new_tokens=room, sampling=sampling, seed=args.seed,
                       stop_ids=processor.stop_ids, max_len=limit, copies=args.answers,
                       prefill_chunk=args.prefill_chunk)  # fmt: skip
    texts, count, prefill = Texts(args, processor), 0, 0.0
    try:
        with memory_advice(
            sizes(params, cfg, batch), "--max-pixels, --max-len, or --dtype bfloat16"
        ):
            new = next(chunks)
            while True:
                status.stop()
                prefill = prefill or clock.lap()
                count += new.shape[1]
                texts.add(new)
                new = chunks.send(texts.ended)
    except StopIteration:
        pass
    finally:
        status.stop()
        if count:
            texts.finish()
    for number, text in enumerate(texts.texts, 1):
        if not text.strip():
            which = f"answer {number}" if len(texts.texts) > 1 else "the answer"
            print(f"{which} is empty", file=sys.stderr)
    decode = clock.lap()
    if not texts.ended.all():
        why = "--max-new-tokens" if room == args.max_new_tokens else "--max-len"
        print(f"the answer was cut off after {count} tokens ({why})", file=sys.stderr)
    report = f"load {loading:.1f} s, compile {clock.compiling:.1f} s, "
    report += f"prefill {prompt} tokens {prompt / prefill:.0f}/s"
    if count > 1:
        report += f", decode {count - 1} tokens {(count - 1) / decode:.1f}/s"
    print(report, file=sys.stderr)
    return texts.texts[0]


def measured(
    args: argparse.Namespace,
    processor: Processor,
    load: Callable[[], tuple[Any, Any]],
    status: Status,
) -> None:
    """Prints a vector (--embed), or a score a document (--rerank), as JSON. Raises InputError."""
    thing = {"text": args.prompt, "image": args.image, "video": args.video}
    if args.embed:
        rows = [retrieval_prompts.embed_conversation(thing, args.instruction)]
    else:
        documents = [retrieval_prompts.document(given) for given in args.document]
        rows = [
            retrieval_prompts.rerank_conversation(thing, d, args.instruction) for d in documents
        ]
    held = {item["type"] for row in rows for message in row for item in message["content"]}
    check_media(args, held, "there is no {}; leave it out")
    if args.rerank:
        words = retrieval_prompts.yes_no_ids(processor.tokenizer)
    batch = processor(rows, **input_options(args))
    check_dims(processor.config, args.dims)
    params, cfg = load()
    status.show("compiling")
    held = sizes(params, cfg, batch)
    held.pop("cache (about)")  # there is none
    with memory_advice(held, "--max-pixels, fewer --document, or --dtype bfloat16"):
        if args.embed:
            embed = jax.jit(q3.embed, static_argnames=("cfg", "dims"))
            found = jax.device_get(embed(params, cfg, batch, dims=args.dims))
        else:
            rerank = jax.jit(q3.rerank, static_argnames=("cfg", "yes_no"))
            found = jax.device_get(rerank(params, cfg, batch, words))
    status.stop()
    check_finite("--embed" if args.embed else "--rerank", found)
    if args.embed:
        print(write_json([round(float(x), 7) for x in found[0]], "--embed"))
        return
    for name, score in zip(args.document, found, strict=True):
        print(write_json({"document": name, "score": round(float(score), 7)}, "--rerank"))
