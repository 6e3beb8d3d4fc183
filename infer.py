"""Asks a Qwen3-VL checkpoint about pictures and clips. Without arguments: the demo on its picture.

python infer.py --ckpt DIR --image a.jpg --image b.jpg --prompt "What differs?" --stream
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qwen3vl_jax.cli.infer_arguments import (
    arguments,
    check,
    check_media,
    check_media_of_lines,
    input_options,
    media_rules,
    mesh_sizes,
    read_messages,
)
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning.machines import prepare_environment, read_machine
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.chips import allow_gpu_memory, quiet_libtpu
from qwen3vl_jax.runtime.compile_cache import PROGRAMS, keep_programs
from qwen3vl_jax.runtime.console import (
    Status,
    memory_advice,
    one_line_errors,
    parts,
    run_script,
    sigterm_interrupts,
)
from qwen3vl_jax.runtime.native_output import tidy_output
from qwen3vl_jax.storage.paths import absolute, file_size, files_under

HERE = Path(__file__).resolve().parent
DEMO, DEMO_PICTURE = HERE / "demo" / "checkpoint", HERE / "demo" / "pictures" / "grid.png"
PLANNED_LENGTH = 32768  # tokens of prompt and answer that --plan reckons with without --max-len
DEMO_PROMPT = "Read the digits row by row."


def conversation(args: argparse.Namespace) -> tuple[list[dict], list[dict] | None]:
    """The messages to answer and the tools they may call; raises InputError for a file without."""
    from qwen3vl_jax.processing.media import load_image

    if args.messages:
        if args.prompt or args.system:
            raise InputError(
                "--messages: the file holds the whole conversation, leave --prompt and --system out"
            )
        return read_messages(args.messages)
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


def opened(args: argparse.Namespace):
    """The checkpoint's directory and its processor; raises InputError."""
    from qwen3vl_jax.processing.processor import Processor
    from qwen3vl_jax.storage.hub import resolve

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
    held = {kind for kind in ("image", "video") if f"{kind}_grid_thw" in arrays}
    check_media(args, held, "the conversation has no {}; leave it out")
    for number, used in enumerate(arrays.pop("video_metadata", ()), 1):
        _, high, wide = processor.config.vision.patch_size * arrays["video_grid_thw"][number - 1]
        print(f"clip {number}: {len(used.indices)} frames, second {used.seconds[0]:.1f} to "
              f"{used.seconds[-1]:.1f}, {wide} x {high}", file=sys.stderr)  # fmt: skip
    limit = longest(args, processor)
    rows, prompt = arrays["input_ids"].shape
    if args.draw and "image_grid_thw" not in arrays:
        raise InputError("--draw: the conversation has no image to draw on; give --image")
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
    most = processor.config.text.max_position_embeddings
    if args.max_len is not None and args.max_len > most:
        print(
            f"--max-len {args.max_len}: the model has {most} positions (max_position_embeddings), "
            "what lies beyond may be answered badly",
            file=sys.stderr,
        )
    return most if args.max_len is None else args.max_len


def sampling_of(args, processor):
    """How tokens are chosen: the checkpoint's way, changed by the flags; raises InputError."""
    import qwen3vl_jax as q3
    from qwen3vl_jax.inference.sampling import row_seeds

    fields = (field.name for field in dataclasses.fields(q3.Sampling))
    flags = {name: v for name in fields if (v := getattr(args, name)) is not None}
    sampling = q3.Sampling(**(processor.sampling | flags))
    sampling.check()
    row_seeds(args.seed, 1)
    return sampling


def demo_notice(args: argparse.Namespace, messages: Sequence[dict] | None = None) -> str:
    """What to say of the bundled checkpoint where --ckpt is not given; "" where it is."""
    if args.ckpt:
        return ""
    import numpy as np

    from demo.notice import notice

    content = messages[-1]["content"] if messages and not args.messages else []
    images = [
        x["image"].convert("RGB").resize((128, 128), 0) for x in content if x["type"] == "image"
    ]
    shown = DEMO_PICTURE.relative_to(HERE) if args.image == [str(DEMO_PICTURE)] else ""
    return notice(
        content[-1]["text"] if content else None, [np.asarray(x) for x in images], str(shown)
    )


def load(args: argparse.Namespace, directory: Path, scope: contextlib.ExitStack, status: Status):
    """(params, cfg) in --dtype, on a CPU in float32 unless that says otherwise.

    On --mesh, or on the devices that a large model needs: scope keeps that mesh the ambient one. With
    --input it is of this process's devices, else of those of all.
    """
    import jax

    import qwen3vl_jax as q3
    from qwen3vl_jax.checkpoint.auto_mesh import mesh_for
    from qwen3vl_jax.checkpoint.device_load import Source

    keep_programs(not args.no_compile_cache)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    source = Source(directory, q3.Config.from_hf(directory), args.weights)
    devices = jax.local_devices() if args.input else jax.devices()
    mesh = mesh_for(mesh_sizes(args.mesh), source, dtype, devices)
    status.show(f"loading {directory}")
    params, cfg = q3.load(
        directory, mesh=mesh, dtype=dtype, weights=args.weights, adapter=args.adapter
    )
    if mesh is not None:
        scope.enter_context(jax.set_mesh(mesh))
    return params, cfg


def on_disk(directory: Path) -> dict[str, int]:
    """Bytes of a checkpoint's files, for `memory_advice`."""
    stored = sum(file_size(directory / name) for name in files_under(directory))
    return {"checkpoint on disk": stored}


def loaded(
    args: argparse.Namespace,
    directory: Path,
    scope: contextlib.ExitStack,
    status: Status,
    notice="",
):
    """`load`, once all of it is on the device; raises InputError where that has no room."""
    import jax

    advice = "--dtype bfloat16, --weights int8 or a smaller checkpoint"
    with memory_advice(on_disk(directory), advice):
        ready = jax.block_until_ready(load(args, directory, scope, status))
    status.stop()
    if notice:
        print(notice, file=sys.stderr)
    return ready


def chat(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Talks in the terminal until the end of input."""
    from qwen3vl_jax.cli.chat import converse, looked

    directory, processor = opened(args)
    sampling, inputs = sampling_of(args, processor), input_options(args)
    media = [{"type": "image", "image": source} for source in args.image]
    media += [{"type": "video", "video": source} for source in args.video]
    media = [looked(processor, item, inputs) for item in media]
    params, _ = loaded(args, directory, scope, status, demo_notice(args))
    converse(
        params, processor, args.system, media, max_new_tokens=args.max_new_tokens, sampling=sampling,
        seed=args.seed, max_len=longest(args, processor), prefill_chunk=args.prefill_chunk,
        stop=args.stop, inputs=inputs,
    )  # fmt: skip


def batch(args: argparse.Namespace, status: Status) -> None:
    """Answers a file of conversations into a file of answers; exit code 1 if lines had errors."""
    from qwen3vl_jax.cli.batch import Settings, answer_file, largest
    from qwen3vl_jax.cli.batch_journal import digest_of

    asked = distributed.asked_of(args)
    check_media_of_lines(args)
    directory, processor = opened(args)
    processor = dataclasses.replace(processor, media_rules=media_rules(args))
    settings = Settings(
        dataclasses.asdict(sampling_of(args, processor)), args.max_new_tokens, args.seed,
        tuple(args.stop), longest(args, processor), input_options(args), args.rows,
        args.prefill_chunk,
    )  # fmt: skip
    made_with = {"ckpt": str(absolute(directory)), "dtype": args.dtype, "weights": args.weights,
                 **({"adapter": str(absolute(args.adapter))} if args.adapter else {}),
                 "chat_template": digest_of(processor.template.text(True).encode())}  # fmt: skip
    held: dict[str, int] = {}

    def load_and_measure(scope: contextlib.ExitStack):
        params, cfg = loaded(args, directory, scope, status, demo_notice(args))
        held.update(parts(params, cfg, *largest(processor, settings), "at most"))
        return params, cfg

    index, count = distributed.start(asked)
    files = (load_and_measure, processor, args.input, args.output, settings, made_with)

    def run() -> int:
        with memory_advice(held, "--rows, --max-len, --max-pixels, or --dtype bfloat16"):
            if count == 1:
                return answer_file(*files)
            from qwen3vl_jax.cli.replicas import answer_file_together

            return answer_file_together(*files, index, count)

    with sigterm_interrupts(5 if count == 1 else 5 + distributed.GRACE):
        errors = run() if count == 1 else distributed.end_together(run, "the answers that are kept")
    if errors:
        sys.exit(1)


def measure(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Prints the vector of what is given (--embed), or a score a document (--rerank), as JSON."""
    from qwen3vl_jax.cli.ask import measured

    directory, processor = opened(args)
    notice = demo_notice(args)
    measured(args, processor, lambda: loaded(args, directory, scope, status, notice), status)


def plan(args: argparse.Namespace) -> None:
    """Compiles a decode step and a prefill for a machine that is not here; exit code 1 without room."""
    machine = read_machine(args.plan, args.slices)
    prepare_environment(machine)
    import jax.numpy as jnp

    from qwen3vl_jax.planning.command import plan_serving
    from qwen3vl_jax.planning.program import config_of
    from qwen3vl_jax.planning.serving import Serving

    dtype, ckpt = jnp.dtype(args.dtype or "bfloat16"), str(args.ckpt or DEMO)
    usual = min(config_of(ckpt).text.max_position_embeddings, PLANNED_LENGTH)
    length = usual if args.max_len is None else args.max_len
    asked = Serving(args.rows, length, args.prefill_chunk, dtype, args.weights)
    plans = plan_serving(ckpt, machine, mesh_sizes(args.mesh), asked, args.save)
    if not all(each.fits for each in plans):
        sys.exit(1)


def ask(args: argparse.Namespace, scope: contextlib.ExitStack, status: Status) -> None:
    """Answers one conversation: with --mesh on the devices of all processes, and the first one tells."""
    index, count = distributed.start(distributed.asked_of(args)) if args.mesh else (0, 1)

    def run() -> None:
        from qwen3vl_jax.cli.ask import answer

        given = prepare(args) if count == 1 else distributed.agreed(lambda: prepare(args))
        directory, processor, arrays, messages, limit = given
        if count > 1:
            seen = [repr({**vars(args), "process": 0}).encode()]
            seen += [x.tobytes() for x in arrays.values()]
            distributed.check_alike("--mesh: other options, prompt or pictures", *seen)
        sampling = sampling_of(args, processor)
        with distributed.quiet(index > 0):

            def load_all():
                return loaded(args, directory, scope, status, demo_notice(args, messages))

            text = answer(args, processor, arrays, limit, sampling, load_all, status)
        if args.draw and not index:
            from qwen3vl_jax.cli.draw import draw_answer

            draw_answer(args.draw, messages, text, args.image if args.messages else [])

    run() if count == 1 else distributed.end_together(run, "the beginning")


def main(argv: list[str] | None = None) -> None:
    """The command line; exits 2 with one line for bad input."""
    start, args = time.perf_counter(), arguments(argv, (__doc__ or "").split("\n")[0])
    with one_line_errors(), Status() as status, contextlib.ExitStack() as scope:
        check(args)
        allow_gpu_memory()
        if __name__ == "__main__" and not args.plan:
            quiet_libtpu()
            tidy_output(stdout=not args.chat)
        if not args.plan:
            status.show(f"loading {args.ckpt or 'the bundled demo'}", line=False)
        if args.plan:
            plan(args)
        elif args.chat:
            chat(args, scope, status)
        elif args.input:
            batch(args, status)
        elif args.embed or args.rerank:
            measure(args, scope, status)
        else:
            ask(args, scope, status)
    if not args.plan:
        print(PROGRAMS, file=sys.stderr)
    print(f"total {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
