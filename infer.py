"""Asks a Qwen3-VL checkpoint about pictures and clips. Without arguments: the demo on its picture.

python infer.py --ckpt DIR --image a.jpg --image b.jpg --prompt "What differs?" --stream
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from qwen3vl_jax.cli import Clock, memory_advice, one_line_errors, sizes
from qwen3vl_jax.errors import InputError

HERE = Path(__file__).resolve().parent
DEMO, DEMO_PICTURE = HERE / "demo" / "checkpoint", HERE / "demo" / "pictures" / "grid.png"
DEMO_PROMPT = "Read the digits row by row."


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="infer.py", description=(__doc__ or "").split("\n")[0])
    add = p.add_argument
    add("--ckpt", help="Orbax or Hugging Face directory, or a Hub id (default: the bundled demo)")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--image", action="append", default=[], help="file or http(s) address; once a picture")
    add("--video", action="append", default=[], help="file or http(s) address; once a clip")
    add("--prompt", help="the question")
    add("--system", help="system text")
    add(
        "--messages",
        type=Path,
        metavar="FILE",
        help="a conversation as JSON: [{role, content}, ..]",
    )
    add("--chat", action="store_true", help="talk in the terminal; --image and --video go first")
    add("--input", type=Path, metavar="FILE.jsonl", help="answer one conversation a line")
    add("--output", type=Path, metavar="FILE.jsonl", help="where the answers to --input go")
    add("--rows", type=int, default=16, help="with --input: answers at a time")
    add("--answers", type=int, default=1, help="so many answers, from one prefill")
    add(
        "--embed",
        action="store_true",
        help="print the unit vector of --prompt, --image and --video",
    )
    add("--dims", type=int, help="with --embed: as many numbers (Matryoshka)")
    add("--rerank", action="store_true", help="print how well each --document answers the query")
    add(
        "--document",
        action="append",
        default=[],
        metavar="TEXT|FILE",
        help="text, or a picture's file",
    )
    add("--instruction", help="what --embed or --rerank is for")
    add("--stream", action="store_true", help="print the answer as it comes")
    add("--draw", type=Path, metavar="OUT.png", help="draw the answer's boxes and points")
    add("--max-new-tokens", type=int, default=1024)
    add(
        "--max-len",
        type=int,
        help="longest prompt and answer together (default: the model's limit)",
    )
    add("--temperature", type=float, help="0 takes the likeliest token (default of these six: the "
        "checkpoint's generation_config.json)")  # fmt: skip
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--min-p", type=float)
    add("--repetition-penalty", type=float)
    add("--min-new-tokens", type=int)
    add("--presence-penalty", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--prefill-chunk", type=int, default=8192, help="prompt tokens taken at a time")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text",
    )
    add("--min-pixels", type=int, help="enlarge smaller pictures to this area")
    add("--max-pixels", type=int, help="shrink larger pictures to this area")
    add("--fps", type=float, help="frames a second to use of a clip (default: the checkpoint's, 2)")
    add("--num-frames", type=int, help="frames to use of a clip, in place of --fps")
    add("--max-frames", type=int, help="at most as many frames of a clip (default: 768)")
    add("--video-max-pixels", type=int, help="shrink clips of more pixels (all frames together)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's; float32 on a CPU)")  # fmt: skip
    add("--weights", choices=("fp8", "int8"), help="keep FP8 as it is, or round to int8")
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja template in place of the checkpoint's",
    )
    add(
        "--allow-special",
        action="store_true",
        help="special tokens spelled in the text are special",
    )
    return p.parse_args(argv)


def conversation(args: argparse.Namespace) -> tuple[list[dict], list[dict] | None]:
    """The messages to answer and the tools they may call; raises InputError for a file without."""
    from qwen3vl_jax.processing.pictures import load_image

    if args.messages:
        if args.prompt or args.system:
            raise InputError(
                "--messages: the file holds the whole conversation, leave --prompt and --system out"
            )
        try:
            found = json.loads(args.messages.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(f"--messages {args.messages}: expected a JSON file, found: {e}") from e
        messages, tools = (found, None) if isinstance(found, list) else (None, None)
        if isinstance(found, dict):
            messages, tools = found.get("messages"), found.get("tools")
        if not isinstance(messages, list):
            raise InputError(
                f"--messages {args.messages}: expected a list of messages, or an object with a list "
                'under "messages"'
            )
        return messages, tools
    if not args.ckpt and not args.image and not args.video:
        args.image, args.prompt = [str(DEMO_PICTURE)], args.prompt or DEMO_PROMPT
    seen = "clip" if args.video else "picture" if args.image else None
    prompt = args.prompt or (seen and f"Describe this {seen}.")
    if not prompt:
        raise InputError("nothing to ask: give --prompt, --image, --video or --messages")
    pictures = [{"type": "image", "image": load_image(source)} for source in args.image]
    system = [{"role": "system", "content": args.system}] if args.system else []
    clips = [{"type": "video", "video": source} for source in args.video]
    content = [*pictures, *clips, {"type": "text", "text": prompt}]
    return [*system, {"role": "user", "content": content}], None


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that do not go together or are out of range."""
    from qwen3vl_jax.processing.tokenizer import stop_list

    stop_list(args.stop)
    check_batch(args)
    for name in ("prompt", "messages", "draw") if args.chat else ():
        if getattr(args, name):
            raise InputError(f"--chat: it asks for the questions itself, leave --{name} out")
    if args.chat + args.embed + args.rerank > 1:
        raise InputError("--chat, --embed and --rerank: give one of them")
    if args.rerank != bool(args.document):
        raise InputError("--rerank needs at least one --document, and a --document needs --rerank")
    if (args.embed or args.rerank) and not (args.prompt or args.image or args.video):
        raise InputError("--embed, --rerank: nothing given; expected --prompt, --image or --video")
    if args.max_new_tokens < 1:
        raise InputError(
            f"--max-new-tokens: max_new_tokens is {args.max_new_tokens}, expected >= 1"
        )
    if args.ckpt is not None and not args.ckpt:
        raise InputError("--ckpt is empty, expected a directory or a Hub id")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty, expected a question")
    if args.draw and str(args.draw) in args.image:
        raise InputError(f"--draw {args.draw}: it is the picture itself; name another file")
    if args.draw and not args.draw.parent.is_dir():
        raise InputError(f"--draw {args.draw}: no such directory {args.draw.parent}")
    if args.draw and args.draw.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--draw {args.draw}: expected a name that ends in .png, .jpg or .webp")


def check_batch(args: argparse.Namespace) -> None:
    """`check` of --input with --output, and of the numbers of answers."""
    if bool(args.input) != bool(args.output):
        raise InputError("--input and --output: give both, or neither")
    alone = ("prompt", "system", "messages", "image", "video", "chat", "embed", "rerank", "draw",
             "stream")  # fmt: skip
    if args.input and (found := [name for name in alone if getattr(args, name)]):
        raise InputError(f"--input: its lines hold whole conversations, leave --{found[0]} out")
    for name in ("rows", "answers"):
        if (count := getattr(args, name)) < 1:
            raise InputError(f"--{name} is {count}, expected a number from 1")
    if args.answers > 1 and (args.input or args.chat or args.stream or args.draw):
        raise InputError("--answers: not with --input, --chat, --stream or --draw")


def input_options(args: argparse.Namespace) -> dict:
    """Options of Processor.inputs: settings of pictures and clips, special tokens."""
    pictures = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(args, k)) is not None}
    names = {"fps": "fps", "num_frames": "num_frames", "max_frames": "max_frames",
             "video_max_pixels": "max_pixels"}  # fmt: skip
    clips = {ours: v for name, ours in names.items() if (v := getattr(args, name)) is not None}
    return {**pictures, "videos_kwargs": clips, "allow_special": args.allow_special}


def opened(args: argparse.Namespace):
    """The checkpoint's directory and its processor; raises InputError."""
    from qwen3vl_jax.checkpoint import resolve
    from qwen3vl_jax.processing.processor import Processor

    directory = resolve(args.ckpt or DEMO, args.revision)
    return directory, Processor.from_pretrained(directory, args.chat_template)


def prepare(args: argparse.Namespace):
    """Everything that can be refused without JAX: (directory, processor, arrays)."""
    messages, tools = conversation(args)
    directory, processor = opened(args)
    beside = {}
    if args.messages:
        beside = {"images": args.image or None, "videos": args.video or None}
    arrays = processor.inputs(messages, tools=tools, **beside, **input_options(args))
    for number, used in enumerate(arrays.pop("video_metadata", ()), 1):
        _, high, wide = processor.config.vision.patch_size * arrays["video_grid_thw"][number - 1]
        print(f"clip {number}: {len(used.indices)} frames, second {used.seconds[0]:.1f} to "
              f"{used.seconds[-1]:.1f}, {wide} x {high}", file=sys.stderr)  # fmt: skip
    limit = longest(args, processor)
    rows, prompt = arrays["input_ids"].shape
    if rows != 1:
        raise InputError(f"--messages: the file holds {rows} conversations, expected one")
    if prompt >= limit:
        raise InputError(
            f"the prompt has {prompt} tokens and the cache holds {limit} (--max-len): shorten the "
            "prompt, lower --max-pixels (--video-max-pixels, --fps), or allow more"
        )
    return directory, processor, arrays, messages, limit


def longest(args, processor) -> int:
    """Tokens that prompt and answer may have together."""
    return processor.config.text.max_position_embeddings if args.max_len is None else args.max_len


def sampling_of(args, processor):
    """How tokens are chosen: the checkpoint's way, changed by the flags; raises InputError."""
    import qwen3vl_jax as q3
    from qwen3vl_jax.sampling import row_seeds

    fields = (field.name for field in dataclasses.fields(q3.Sampling))
    flags = {name: v for name in fields if (v := getattr(args, name)) is not None}
    sampling = q3.Sampling(**(processor.sampling | flags))
    sampling.check()
    row_seeds(args.seed, 1)
    return sampling


def load(args: argparse.Namespace, directory: Path):
    """(params, cfg) in --dtype, on a CPU in float32 unless that says otherwise."""
    import jax

    import qwen3vl_jax as q3

    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    return q3.load(directory, dtype=dtype, weights=args.weights)


def chat(args: argparse.Namespace) -> None:
    """Talks in the terminal until the end of input."""

    from qwen3vl_jax.terminal import converse

    directory, processor = opened(args)
    sampling = sampling_of(args, processor)
    params, _ = load(args, directory)
    media = [{"type": "image", "image": source} for source in args.image]
    media += [{"type": "video", "video": source} for source in args.video]
    converse(
        params, processor, args.system, media, max_new_tokens=args.max_new_tokens, sampling=sampling,
        seed=args.seed, max_len=longest(args, processor), prefill_chunk=args.prefill_chunk,
        inputs=input_options(args),
    )  # fmt: skip


def batch(args: argparse.Namespace) -> None:
    """Answers a file of conversations into a file of answers."""
    from qwen3vl_jax.batch_file import Settings, answer_file

    directory, processor = opened(args)
    settings = Settings(
        dataclasses.asdict(sampling_of(args, processor)), args.max_new_tokens, args.seed,
        tuple(args.stop), longest(args, processor), input_options(args), args.rows,
        args.prefill_chunk,
    )  # fmt: skip
    made_with = {"ckpt": str(directory.resolve()), "dtype": args.dtype, "weights": args.weights}
    answer_file(
        lambda: load(args, directory), processor, args.input, args.output, settings, made_with
    )


def measure(args: argparse.Namespace) -> None:
    """Prints the vector of what is given (--embed), or a score a document (--rerank), as JSON."""
    import jax

    import qwen3vl_jax as q3
    from qwen3vl_jax.processing import retrieval

    directory, processor = opened(args)
    thing = {"text": args.prompt, "image": args.image, "video": args.video}
    if args.embed:
        rows = [retrieval.embed_conversation(thing, args.instruction)]
    else:
        documents = [{"image" if Path(d).is_file() else "text": d} for d in args.document]
        rows = [retrieval.rerank_conversation(thing, d, args.instruction) for d in documents]
        words = retrieval.yes_no_ids(processor.tokenizer)
    batch = processor(rows, **input_options(args))
    params, cfg = load(args, directory)
    if args.embed:
        found = jax.jit(q3.embed, static_argnames=("cfg", "dims"))(
            params, cfg, batch, dims=args.dims
        )
        print(json.dumps([round(float(x), 7) for x in found[0]]))
        return
    found = jax.jit(q3.rerank, static_argnames=("cfg", "yes_no"))(params, cfg, batch, words)
    for name, score in zip(args.document, found, strict=True):
        print(json.dumps({"document": name, "score": round(float(score), 7)}))


def answer(args, directory, processor, arrays, limit) -> str:
    """Loads the weights, prints the answer (timing on stderr) and returns it."""
    import jax

    import qwen3vl_jax as q3
    from qwen3vl_jax.processing.tokenizer import TextStream

    sampling = sampling_of(args, processor)
    batch = q3.make_batch(processor.config, **arrays)
    clock = Clock()
    stored = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    with memory_advice({"checkpoint on disk": stored}, "--dtype bfloat16 or a smaller checkpoint"):
        params, cfg = load(args, directory)
        jax.block_until_ready(params)
    loading = clock.lap()
    streams = [TextStream(processor.tokenizer, args.stop) for _ in range(args.answers)]
    prompt = int(arrays["attention_mask"].sum())
    room = min(args.max_new_tokens, limit - prompt)
    chunks = q3.stream(params, cfg, batch, max_new_tokens=room, sampling=sampling, seed=args.seed,
                       stop_ids=processor.stop_ids, max_len=limit, copies=args.answers,
                       prefill_chunk=args.prefill_chunk)  # fmt: skip
    texts, ended = [""] * args.answers, [False] * args.answers
    count, prefill = 0, 0.0

    def show(row: int, piece: str) -> None:
        texts[row] += piece
        if args.stream:
            print(piece, end="", flush=True)

    with memory_advice(sizes(params, cfg, batch), "--max-pixels, --max-len, or --dtype bfloat16"):
        for new in chunks:
            prefill = prefill or clock.lap()
            count += new.shape[1]
            for row, text in enumerate(streams):
                ids = new[row][new[row] >= 0].tolist()
                show(row, text.push(t for t in ids if t not in processor.stop_ids))
                ended[row] |= text.stopped is not None or any(t in processor.stop_ids for t in ids)
            if all(ended):
                break
    for row, text in enumerate(streams):
        show(row, text.flush())
    decode = clock.lap()
    for row, text in enumerate(texts):
        print("" if args.stream else f"[{row + 1}] {text}" if args.answers > 1 else text)
    if not all(ended):
        why = "--max-new-tokens" if room == args.max_new_tokens else "--max-len"
        print(f"the answer was cut off after {count} tokens ({why})", file=sys.stderr)
    report = f"load {loading:.1f} s, compile {clock.compiling:.1f} s, "
    report += f"prefill {prompt} tokens {prompt / prefill:.0f}/s"
    if count > 1:
        report += f", decode {count - 1} tokens {(count - 1) / decode:.1f}/s"
    print(report, file=sys.stderr)
    return texts[0]


def main(argv: list[str] | None = None) -> None:
    """The command line; exits 2 with one line for bad input."""
    start, args = time.perf_counter(), arguments(argv)
    with one_line_errors():
        check(args)
        if args.chat:
            chat(args)
        elif args.input:
            batch(args)
        elif args.embed or args.rerank:
            measure(args)
        else:
            from qwen3vl_jax.processing.draw import draw_answer

            directory, processor, arrays, messages, limit = prepare(args)
            text = answer(args, directory, processor, arrays, limit)
            if args.draw:
                draw_answer(args.draw, messages, text, args.image if args.messages else [])
    print(f"total {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
