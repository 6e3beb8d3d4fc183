"""infer.py's options, and what can be refused about them before anything is read."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection
from pathlib import Path

from qwen3vl_jax.config import AXES, SHORT
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.planning.machines import add_plan_arguments, check_plan_arguments
from qwen3vl_jax.processing.media_rules import MediaRules
from qwen3vl_jax.runtime.compile_cache import HELP
from qwen3vl_jax.runtime.console import Parser
from qwen3vl_jax.runtime.distributed import add_arguments as add_process_arguments
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import argument, is_remote

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens",
             "presence_penalty")  # fmt: skip
_OF_ANSWERS = ("system", "messages", "stream", "draw", "max_new_tokens", "max_len", *_SAMPLING, "seed",
               "prefill_chunk", "stop", "answers")  # fmt: skip
_OF_ONE = ("image", "video", "prompt", "system", "messages", "stream", "draw", "answers")
_PROCESSES = ("coordinator", "processes", "process", "distributed")
# What asks for something other than one answer: why options have no meaning there, and which.
MODES = {
    "chat": (
        "it asks for the questions itself",
        ("prompt", "messages", "draw", "answers", *_PROCESSES),
    ),
    "input": ("its lines hold whole conversations", _OF_ONE),
    "embed": ("it prints a vector, no answer", (*_OF_ANSWERS, *_PROCESSES)),
    "rerank": ("it prints scores, no answer", (*_OF_ANSWERS, *_PROCESSES)),
    "plan": (
        "it compiles and answers nothing",
        (*_OF_ONE, "adapter", "no_compile_cache", *_PROCESSES),
    ),
}
# Settings of one kind of media.
MEDIA = {
    **dict.fromkeys(("min_pixels", "max_pixels"), "image"),
    **dict.fromkeys(("fps", "num_frames", "max_frames", "video_max_pixels"), "video"),
}
# What a line of JSON with such a medium holds: its key or type, or characters that are escaped.
_WORDS = {
    "image": re.compile(rb"image|url|path|base64|bytes|\\u"),
    "video": re.compile(rb"video|frames|\\u"),
}
NEEDS = {
    "rows": ("input", "plan"),
    **dict.fromkeys(("slices", "save"), ("plan",)),
    **dict.fromkeys(_PROCESSES, ("input", "mesh")),
    **dict.fromkeys(("media_root", "allow_hosts"), ("input",)),
    "dims": ("embed",),
    "instruction": ("embed", "rerank"),
}


def module_of(args: argparse.Namespace) -> str:
    """The module of cli/ that answers."""
    modes = {"plan": "plan", "chat": "chat", "input": "batch", "embed": "embed", "rerank": "embed"}
    return next((module for mode, module in modes.items() if getattr(args, mode)), "ask")


def arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    """The options; ends the process for unknown ones and for --help."""
    p = Parser(prog="infer.py", description=description)
    add = p.add_argument
    add("--ckpt", help="Orbax or Hugging Face directory, or a Hub id (default: the bundled demo)")
    add("--revision", help="branch, tag or commit of a Hub id")
    add(
        "--image",
        action="append",
        default=[],
        help="file, gs:// or http(s) address; once a picture",
    )
    add("--video", action="append", default=[], help="file, gs:// or http(s) address; once a clip")
    add("--prompt", help="the question")
    add("--system", help="system text")
    add(
        "--messages",
        type=argument,
        metavar="FILE",
        help="a conversation as JSON: [{role, content}, ..]",
    )
    add("--chat", action="store_true", help="talk in the terminal; --image and --video go first")
    add("--input", type=argument, metavar="FILE.jsonl", help="answer one conversation a line")
    add("--output", type=argument, metavar="FILE.jsonl", help="where the answers to --input go")
    add("--rows", type=int, default=16, help="with --input or --plan: answers at a time")
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
        help="text, or the file of a picture or clip",
    )
    add("--instruction", help="what --embed or --rerank is for")
    add("--stream", action="store_true", help="print the answer as it comes")
    add("--draw", type=argument, metavar="OUT.png", help="draw the answer's boxes and points")
    add("--max-new-tokens", type=int, default=1024)
    add(
        "--max-len",
        type=int,
        help="longest prompt and answer together (default: the model's limit; with --plan at most 32,768)",
    )
    add("--temperature", type=float, help="0 takes the likeliest token (default of these six: the "
        "checkpoint's generation_config.json)")  # fmt: skip
    add("--top-k", type=int)
    for name in ("--top-p", "--min-p", "--repetition-penalty"):
        add(name, type=float)
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
        "--mesh",
        metavar="AXIS=N[,AXIS=N]",
        help="spread the model over devices: tp (tensor), ep (expert), fsdp, dp (data), sp (sequence); "
        "-1 is all that are left (default: one device, or all of this host if the model needs them)",
    )
    add(
        "--adapter", metavar="DIR", help="a LoRA adapter (PEFT's files, or a Hub id) on the weights"
    )
    add(
        "--chat-template",
        type=argument,
        metavar="FILE",
        help="a Jinja template in place of the checkpoint's",
    )
    add(
        "--allow-special",
        action="store_true",
        help="special tokens spelled in the text are special",
    )
    add("--media-root", metavar="DIR",
        help="with --input: local images and videos are read below this folder alone")  # fmt: skip
    add("--allow-hosts", metavar="HOST[,HOST]", help="with --input: images and videos are read from "
        "these hosts (and gs://buckets) alone, private ones too (default: any public host)")  # fmt: skip
    add("--no-compile-cache", action="store_true", help=HELP)
    add_process_arguments(p)
    add_plan_arguments(p)
    return p.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that do not go together or are out of range."""
    from qwen3vl_jax.processing.tokenizer import stop_list
    from qwen3vl_jax.storage.hub import local_directory

    stop_list(args.stop)
    check_modes(args)
    check_numbers(args)
    check_plan_arguments(args)
    mesh_sizes(args.mesh)
    if args.rerank != bool(args.document):
        raise InputError("--rerank needs at least one --document, and a --document needs --rerank")
    if (args.embed or args.rerank) and not (args.prompt or args.image or args.video):
        raise InputError("--embed, --rerank: nothing given; expected --prompt, --image or --video")
    if args.ckpt is not None and not args.ckpt:
        raise InputError("--ckpt is empty, expected a directory or a Hub id")
    if args.adapter is not None and not args.adapter:
        raise InputError("--adapter is empty, expected a directory or a Hub id")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty, expected a question")
    if args.draw and str(args.draw) in args.image:
        raise InputError(f"--draw {args.draw}: it is the picture itself; name another file")
    if args.draw and not is_remote(args.draw) and not args.draw.parent.is_dir():
        raise InputError(f"--draw {args.draw}: no such directory {args.draw.parent}")
    if args.draw and args.draw.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--draw {args.draw}: expected a name that ends in .png, .jpg or .webp")
    media_rules(args)
    if args.ckpt:
        local_directory(args.ckpt, args.revision)


def mesh_sizes(text: str | None) -> dict[str, int] | None:
    """{one of AXES: size} of --mesh; None without it. Raises InputError."""
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (x.strip() for x in part.partition("="))
        axis = SHORT.get(name, name)
        known = ", ".join((*AXES, *(f"{short} ({long})" for short, long in SHORT.items())))
        if axis not in AXES or not equals:
            raise InputError(f"--mesh {text}: {part!r}, expected AXIS=N; axes: {known}")
        if axis in sizes:
            raise InputError(f"--mesh {text}: {axis} stands there twice")
        if not number.removeprefix("-").isdecimal() or not (int(number) > 0 or int(number) == -1):
            raise InputError(
                f"--mesh {text}: {name} is {number!r}, expected a number from 1, or -1"
            )
        sizes[axis] = int(number)
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"--mesh {text}: -1 stands there twice")
    return sizes


def check_modes(args: argparse.Namespace) -> None:
    """`check` of the options that mean something with, or without, one of MODES alone."""
    if bool(args.input) != bool(args.output):
        raise InputError("--input and --output: give both, or neither")
    defaults = arguments([], "")
    given = [name for name, value in vars(args).items() if value != getattr(defaults, name)]
    modes = [name for name in MODES if name in given]
    if len(modes) > 1:
        raise InputError(f"--{modes[0]} and --{modes[1]}: give one of them")
    mode = modes[0] if modes else ""
    why, without = MODES.get(mode, ("", ()))
    asks = mode or ("mesh" if "mesh" in given else "")  # one answer, of all the devices of a mesh
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if name in without:
            raise InputError(f"--{mode}: {why}, leave {flag} out")
        if asks not in NEEDS.get(name, (asks,)):
            raise InputError(f"{flag}: means something only with --{' or --'.join(NEEDS[name])}")
    # Conversations of files, and of a chat, may have any media; without --ckpt the demo has its image.
    if args.messages or args.input or args.chat or args.document:
        return
    demo = not (args.ckpt or args.video or mode)
    held = {kind for kind in MEDIA.values() if getattr(args, kind) or (demo and kind == "image")}
    check_media(args, held, "means something only with --{}")


def check_media(args: argparse.Namespace, held: Collection[str], why: str) -> None:
    """Raises InputError for a setting of images, or videos, that finds none; held: kinds that there are."""
    for name, kind in MEDIA.items():
        if getattr(args, name) is not None and kind not in held:
            raise InputError(f"--{name.replace('_', '-')}: {why.format(kind)}")


def check_media_of_lines(args: argparse.Namespace) -> None:
    """`check_media` of an --input file, by the words without which no line has images, or videos."""
    wanted = {kind for name, kind in MEDIA.items() if getattr(args, name) is not None}
    if not wanted or not args.input.is_file():
        return
    with args.input.open("rb") as file:
        for line in file:
            wanted = {kind for kind in wanted if not _WORDS[kind].search(line)}
            if not wanted:
                return
    check_media(args, set(_WORDS) - wanted, f"no line of {args.input} has {{}}s; leave it out")


def check_numbers(args: argparse.Namespace) -> None:
    """`check` of what is counted from 1, and of what goes with one answer alone."""
    for name in ("rows", "answers", "prefill_chunk", "max_len", "max_new_tokens"):
        if (count := getattr(args, name)) is not None:
            check_int(f"--{name.replace('_', '-')}", count)
    one = [name for name in ("stream", "draw") if getattr(args, name)]
    if args.answers > 1 and one:
        raise InputError(f"--answers: not with --{one[0]}")


def media_rules(args: argparse.Namespace) -> MediaRules:
    """What the lines of --input may read. Raises InputError."""
    root, hosts = args.media_root, args.allow_hosts
    if root is not None and not os.path.isdir(root):
        raise InputError(f"--media-root: got {root!r}, expected a folder that exists")
    named = None if hosts is None else tuple(host.strip() for host in hosts.split(","))
    if not all(re.fullmatch("((gs|s3|az)://)?[^/]+", host) for host in named or ()):
        raise InputError(f"--allow-hosts: got {hosts!r}, expected names of hosts, HOST[,HOST]")
    return MediaRules(root or "", named, trusted=False, max_batch_bytes=4 * 2**30)


def input_options(args: argparse.Namespace) -> dict:
    """Options of Processor.inputs: settings of pictures and clips, special tokens."""
    pictures = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(args, k)) is not None}
    names = {"fps": "fps", "num_frames": "num_frames", "max_frames": "max_frames",
             "video_max_pixels": "max_pixels"}  # fmt: skip
    clips = {ours: v for name, ours in names.items() if (v := getattr(args, name)) is not None}
    return {**pictures, "videos_kwargs": clips, "allow_special": args.allow_special}


def read_messages(path: Path) -> tuple[list[dict], list[dict] | None]:
    """The messages of a --messages file and the tools they may call; raises InputError."""
    found = read_json_file(path, f"--messages {path}", (list, dict))
    found = {"messages": found} if isinstance(found, list) else found
    if unknown := found.keys() - {"messages", "tools"}:
        raise InputError(
            f"--messages {path}: unknown key {min(unknown)[:80]!r}, expected messages and tools"
        )
    if not isinstance(found.get("messages"), list):
        raise InputError(
            f"--messages {path}: expected a list of messages, or an object with a list under "
            '"messages"'
        )
    return found["messages"], found.get("tools")
