"""infer.py --embed and --rerank: a vector, or a score for each document, as JSON."""

import argparse
import contextlib

import qwen3vl_jax as q3
from qwen3vl_jax.cli.common import load_checkpoint, open_checkpoint
from qwen3vl_jax.cli.infer_arguments import check_media, input_options
from qwen3vl_jax.processing import retrieval_prompts
from qwen3vl_jax.runtime.console import Status, memory_advice, memory_of_batch
from qwen3vl_jax.storage.json_text import write_json


def run(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Prints the unit vector of what is given, or one score a line. Raises InputError."""
    directory, processor = open_checkpoint(args)
    query = {"text": args.prompt, "image": args.image, "video": args.video}
    if args.embed:
        conversations = [retrieval_prompts.embed_conversation(query, args.instruction)]
    else:
        ask = retrieval_prompts.rerank_conversation
        documents = map(retrieval_prompts.document, args.document)
        conversations = [ask(query, document, args.instruction) for document in documents]
    items = [item for found in conversations for message in found for item in message["content"]]
    check_media(args, {item["type"] for item in items}, "there is no {}; leave it out")
    if args.rerank:
        yes_no = retrieval_prompts.yes_no_ids(processor.tokenizer)
    batch = processor(conversations, **input_options(args))
    import jax

    from qwen3vl_jax.inference.scoring import check_dims, check_finite

    check_dims(processor.config, args.dims)
    params, cfg = load_checkpoint(args, directory, scope, status)
    status.show("compiling")
    held = memory_of_batch(params, cfg, batch)
    # No cache is made.
    held.pop("cache (about)")
    with memory_advice(held, "--max-pixels, fewer --document, or --dtype bfloat16"):
        if args.embed:
            embed = jax.jit(q3.embed, static_argnames=("cfg", "dims"))
            found = jax.device_get(embed(params, cfg, batch, dims=args.dims))
        else:
            rerank = jax.jit(q3.rerank, static_argnames=("cfg", "yes_no"))
            found = jax.device_get(rerank(params, cfg, batch, yes_no))
    status.stop()
    check_finite("--embed" if args.embed else "--rerank", found)
    if args.embed:
        print(write_json([round(float(x), 7) for x in found[0]], "--embed"))
        return
    for name, score in zip(args.document, found, strict=True):
        print(write_json({"document": name, "score": round(float(score), 7)}, "--rerank"))
