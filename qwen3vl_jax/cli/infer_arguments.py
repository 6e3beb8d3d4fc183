"""infer.py's options, the modes in which each has a meaning, and all checks of them that need no file."""

import argparse
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qwen3vl_jax.config import AXES, SHORT
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.planning.machines import add_plan_arguments, check_plan_arguments
from qwen3vl_jax.processing.fetching import MediaRules
from qwen3vl_jax.runtime.compile_cache import HELP
from qwen3vl_jax.runtime.console import Parser
from qwen3vl_jax.runtime.distributed import add_arguments as add_process_arguments
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import absolute, argument, is_remote

# The options that ask for something other than one answer, and why others have no meaning beside them.
MODES = {
    "chat": "it asks for the questions itself",
    "input": "its lines hold whole conversations",
    "embed": "it prints a vector, no answer",
    "rerank": "it prints scores, no answer",
    "plan": "it compiles and answers nothing",
}
# Options for images, or for videos, alone.
MEDIA = {
    **dict.fromkeys(("min_pixels", "max_pixels"), "image"),
    **dict.fromkeys(("fps", "num_frames", "max_frames", "video_max_pixels"), "video"),
}
# What a line of JSON with an image, or a video, holds: a key or type, or characters that are escaped.
_WORDS = {
    "image": re.compile(rb"image|url|path|base64|bytes|\\u"),
    "video": re.compile(rb"video|frames|\\u"),
}

USAGE = "infer.py [--ckpt DIR|ID] [--image FILE|URL] [--prompt TEXT] [options]"
EXAMPLES = """examples:
  python infer.py --ckpt Qwen/Qwen3-VL-2B-Instruct --image cat.jpg --prompt "What is this?" --stream
  python infer.py --ckpt DIR --chat --video holiday.mp4
  python infer.py --ckpt DIR --input prompts.jsonl --output answers.jsonl

a line of prompts.jsonl: {"id": "a", "messages": [{"role": "user", "content": "Hello"}]}
"""

# Adds options to a group of the help, given its title and the modes in which they have a meaning ("ask" is
# one answer, "mesh" one answer with --mesh; none are all).
Group = Callable[..., Callable[..., None]]


def _number(default: int) -> dict[str, Any]:
    return {"type": int, "default": default, "metavar": "N"}


def _add_prompt_and_model(group: Group) -> None:
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "FILE|URL"}
    file: dict[str, Any] = {"type": argument, "metavar": "FILE"}
    title = "the prompt"
    add = group(title, "ask", "embed", "rerank")
    add("--prompt", metavar="TEXT", help="the question (--chat asks for it)")
    add = group(title, "ask", "chat", "embed", "rerank")
    add("--image", **many, help="an image: a file, gs:// or http(s) address; may be repeated")
    add("--video", **many, help="a video, likewise; may be repeated")
    group(title, "ask", "chat")("--system", metavar="TEXT", help="the system prompt")
    group(title, "ask")("--messages", **file, help="[{role, content}, ..] in place of --prompt")
    add = group("the model")
    add("--ckpt", metavar="DIR|ID", help="a checkpoint or a Hub id (default: the bundled demo)")
    add("--revision", help="branch, tag or commit of a Hub id")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of weights (default: the checkpoint's; float32 on a CPU)")
    bits = "fp8 keeps an FP8 checkpoint's 8 bits, int8, int4 round others (default: 16 or 32 bits)"
    add("--weights", choices=("fp8", "int8", "int4"), help=bits)
    axes = "shard the model, as tp=2; axes tp (tensor), ep (expert), fsdp, dp (data), sp (sequence)"
    usual = "N of -1 is the rest (default: one device, or all of this host if the model needs them)"
    add("--mesh", metavar="AXIS=N[,AXIS=N]", help=f"{axes}; {usual}")
    add("--chat-template", **file, help="a Jinja chat template in place of the checkpoint's")
    add = group("the model (not with --plan)", *(m for m in ("ask", *MODES) if m != "plan"))
    add("--adapter", metavar="DIR|ID", help="a LoRA adapter (PEFT's files, or a Hub id)")
    add("--no-compile-cache", action="store_true", help=HELP)


def _add_answers_and_modes(group: Group) -> None:
    title = "the answer"
    add = group(title, "ask", "chat")
    add("--stream", action="store_true", help="print the answer as it comes")
    add = group(title, "ask")
    add("--draw", type=argument, metavar="OUT.png", help="draw the answer's boxes and points")
    add("--answers", **_number(1), help="number of answers, from one prefill (default: 1)")
    what = "write a profiler trace of it here, for XProf or Perfetto, and print its time by part"
    add = group("speed", "ask", "embed", "rerank", "input")
    add("--profile", metavar="DIR", help=what)
    add = group("other modes")
    add("--chat", action="store_true", help="a chat; --image, --video go with its first question")
    lines: dict[str, Any] = {"type": argument, "metavar": "FILE.jsonl"}
    add("--input", **lines, help="answer many prompts, a conversation a line; needs --output")
    add("--output", **lines, help="where the answers to --input go")
    add("--embed", action="store_true", help="print the embedding of the prompt, a unit vector")
    add("--rerank", action="store_true", help="print how well each --document answers the prompt")
    document = "with --rerank: text, or the file of an image or video; may be repeated"
    add("--document", action="append", default=[], metavar="TEXT|FILE", help=document)
    add = group("--embed and --rerank", "embed", "rerank")
    add("--instruction", metavar="TEXT", help="the task that the vector or score is for")
    group("--embed", "embed")(
        "--dims", type=int, metavar="N", help="length of the vector (Matryoshka)"
    )
    add = group("--input", "input")
    add("--media-root", metavar="DIR", help="read local images and videos only below this folder")
    hosts = "the only hosts and gs://buckets to read, private ones too (default: any public host)"
    add("--allow-hosts", metavar="HOST[,HOST]", help=hosts)
    add = group("--input and --plan", "input", "plan")
    add("--rows", **_number(16), help="answers generated at a time (default: %(default)s)")


def _add_generation_and_media(group: Group) -> None:
    modes = ("ask", "chat", "input", "plan")
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    fraction: dict[str, Any] = {"type": float, "metavar": "X"}
    add = group("generation", *modes)
    add("--max-new-tokens", **_number(1024), help="most tokens of an answer (default: %(default)s)")
    most = "most tokens of prompt and answer (default: the model's; --plan: up to 32,768)"
    add("--max-len", **number, help=most)
    add("--prefill-chunk", **_number(8192), help="prompt tokens of a prefill step (default: 8192)")
    end = "end the answer before this text; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=end)
    add("--seed", **_number(0), help="seed of random choices (default: %(default)s)")
    less = "make tokens already in the answer less likely (default: %(default)g, off)"
    add("--presence-penalty", **fraction, default=0.0, help=less)
    add = group("sampling (default: what the checkpoint's generation_config.json says)", *modes)
    add("--temperature", **fraction, help="how random the choice of tokens is; 0: the likeliest")
    add("--top-k", **number, help="choose among the N likeliest tokens; 0 is off")
    add("--top-p", **fraction, help="choose among the likeliest of joint probability X; 1 is off")
    add("--min-p", **fraction, help="drop tokens less likely than X times the first; 0 is off")
    add("--repetition-penalty", **fraction, help="above 1, tokens repeat less; 1 is off")
    add("--min-new-tokens", **number, help="fewest tokens of an answer")
    add = group("images, videos and text")
    add("--min-pixels", **number, help="enlarge smaller images to this area")
    add("--max-pixels", **number, help="shrink larger images to this area")
    add("--fps", **fraction, help="frames a second of a video (default: the checkpoint's, 2)")
    add("--num-frames", **number, help="frames of a video, in place of --fps")
    add("--max-frames", **number, help="most frames of a video (default: 768)")
    add("--video-max-pixels", **number, help="shrink videos of more pixels, all frames together")
    special = "take <|im_end|> and the like in a text as special tokens (default: as characters)"
    add("--allow-special", action="store_true", help=special)


def _add_control(group: Group) -> None:
    title = "the answer under control"
    add = group(title, "ask", "chat", "input")
    add("--thinking", choices=("on", "off"), help="where the chat template has enable_thinking")
    budget = "most tokens of thinking, then </think> is forced"
    add("--thinking-budget", type=int, metavar="N", help=budget)
    add = group(title, "ask", "input")
    schema = "answer in JSON of this JSON schema (needs the extra json)"
    add("--schema", type=argument, metavar="FILE", help=schema)
    loops = "end an answer that says the same N times in 256 tokens or more (default: 0, off)"
    add("--max-repeats", **_number(0), help=loops)
    parts = "print one JSON object: text, reasoning, tool calls, boxes in pixels, tokens, times"
    group(title, "ask")("--json", action="store_true", help=parts)


def arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    """The options and `mode`, a module of cli/. Raises InputError for those that mean nothing together."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("infer.py", USAGE, description, epilog=EXAMPLES, formatter_class=raw)
    meant: dict[str, tuple[str, ...]] = {}
    groups: dict[str, Any] = {}

    def group(title: str, *modes: str) -> Callable[..., None]:
        place = groups[title] = groups.get(title) or parser.add_argument_group(title)
        modes = (*modes, "mesh") if "ask" in modes else modes

        def add(flag: str, **how: Any) -> None:
            dest = place.add_argument(flag, **how).dest
            if modes:
                meant[dest] = modes

        return add

    _add_prompt_and_model(group)
    _add_answers_and_modes(group)
    _add_generation_and_media(group)
    _add_control(group)
    meant |= dict.fromkeys(add_process_arguments(parser), ("input", "mesh"))
    add_plan_arguments(parser)
    meant |= dict.fromkeys(("slices", "save"), ("plan",))
    # None, which no option gives, marks those that are left out.
    defaults = {name: parser.get_default(name) for name in vars(parser.parse_args([]))}
    found = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in found.items() if value is not None}
    modes = [mode for mode in MODES if mode in given]
    if len(modes) > 1:
        raise InputError(f"--{modes[0]} and --{modes[1]}: give one of them")
    mode = modes[0] if modes else "mesh" if "mesh" in given else "ask"
    for name in given:
        flag, wanted = f"--{name.replace('_', '-')}", meant.get(name, (mode,))
        if mode in MODES and mode not in wanted and "mesh" in wanted:
            raise InputError(f"--{mode}: {MODES[mode]}, leave {flag} out")
        if mode not in wanted:
            raise InputError(f"{flag}: means something only with --{' or --'.join(wanted)}")
    args = argparse.Namespace(**{**defaults, **given})
    args.mode = {"input": "batch", "rerank": "embed", "mesh": "ask"}.get(mode, mode)
    args.mesh = mesh_sizes(args.mesh)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises InputError for values out of range, and options that need another one."""
    from qwen3vl_jax.processing.tokenizer import stop_list
    from qwen3vl_jax.storage.hub import local_directory

    stop_list(args.stop)
    for name in ("rows", "answers", "prefill_chunk", "max_len", "max_new_tokens"):
        if (count := getattr(args, name)) is not None:
            check_int(f"--{name.replace('_', '-')}", count)
    if args.answers > 1 and (args.stream or args.draw):
        raise InputError(f"--answers: not with --{'stream' if args.stream else 'draw'}")
    if args.json and args.stream:
        raise InputError("--json: not with --stream")
    check_plan_arguments(args)
    if bool(args.input) != bool(args.output):
        raise InputError("--input and --output: give both, or neither")
    if args.input and absolute(args.input) == absolute(args.output):
        raise InputError(f"--output {args.output}: is the input itself; name another file")
    if args.rerank != bool(args.document):
        raise InputError("--rerank needs at least one --document, and a --document needs --rerank")
    if args.mode == "embed" and not (args.prompt or args.image or args.video):
        raise InputError("--embed, --rerank: nothing given; expected --prompt, --image or --video")
    expected = {"ckpt": "a directory or a Hub id", "adapter": "a directory or a Hub id"}
    for name, what in {**expected, "prompt": "a question"}.items():
        if (text := getattr(args, name)) is not None and not text.strip():
            raise InputError(f"--{name} is empty, expected {what}")
    _check_written(args)
    # The media of files and of a chat are not known yet; without --ckpt the demo has its image.
    if not (args.messages or args.input or args.chat or args.document):
        demo = args.mode == "ask" and not (args.ckpt or args.video)
        held = {kind for kind in ("image", "video") if getattr(args, kind)}
        check_media(args, held | ({"image"} if demo else set()), "means something only with --{}")
    if args.ckpt:
        local_directory(args.ckpt, args.revision)


def _check_written(args: argparse.Namespace) -> None:
    out, folder = args.draw, args.profile
    if out and str(out) in args.image:
        raise InputError(f"--draw {out}: it is the image itself; name another file")
    if out and not is_remote(out) and not out.parent.is_dir():
        raise InputError(f"--draw {out}: no such directory {out.parent}")
    if out and out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--draw {out}: expected a name that ends in .png, .jpg or .webp")
    path = Path(folder or "").absolute()
    # The nearest that exists is where the others are made.
    kept = next(x for x in (path, *path.parents) if os.path.lexists(x))
    writable = os.path.isdir(kept) and os.access(kept, os.W_OK | os.X_OK)
    if folder is not None and (not folder.strip() or is_remote(folder) or not writable):
        expected = "expected a folder on a local disk that can be written; name another"
        raise InputError(f"--profile: got {folder!r}, {expected}")


def mesh_sizes(text: str | None) -> dict[str, int] | None:
    """{one of AXES: size} of --mesh; None without it. Raises InputError."""
    if text is None:
        return None
    sizes, wrong = dict[str, int](), ""
    for part in text.split(","):
        name, equals, number = (x.strip() for x in part.partition("="))
        axis = SHORT.get(name, name)
        if axis not in AXES or not equals:
            known = ", ".join((*AXES, *(f"{short} ({long})" for short, long in SHORT.items())))
            wrong = f"{part!r}, expected AXIS=N; axes: {known}"
        elif axis in sizes:
            wrong = f"duplicate axis {axis}"
        elif not re.fullmatch(r"-1|0*[1-9]\d*", number, re.ASCII):
            wrong = f"{name} is {number!r}, expected a number from 1, or -1"
        elif number == "-1" and -1 in sizes.values():
            wrong = "only one axis may be -1"
        if wrong:
            raise InputError(f"--mesh {text}: {wrong}")
        sizes[axis] = int(number)
    return sizes


def check_media(args: argparse.Namespace, held: Collection[str], why: str) -> None:
    """Raises InputError for an option of images, or videos, where `held` has none of that kind."""
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


def media_rules(args: argparse.Namespace) -> MediaRules:
    """What the lines of --input may read. Raises InputError."""
    root, hosts = args.media_root, args.allow_hosts
    if root is not None and not os.path.isdir(root):
        raise InputError(f"--media-root: got {root!r}, expected a folder that exists")
    names = None if hosts is None else tuple(host.strip() for host in hosts.split(","))
    if not all(re.fullmatch("((gs|s3|az)://)?[^/]+", name) for name in names or ()):
        raise InputError(f"--allow-hosts: got {hosts!r}, expected names of hosts, HOST[,HOST]")
    return MediaRules(root or "", names, trusted=False, max_batch_bytes=4 * 2**30)


def input_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of Processor.inputs: those of images, of videos, and special tokens."""
    given: dict[str, dict[str, Any]] = {"image": {}, "video": {}}
    for name, kind in MEDIA.items():
        if (value := getattr(args, name)) is not None:
            given[kind][name.removeprefix("video_")] = value
    found = {**given["image"], "videos_kwargs": given["video"], "allow_special": args.allow_special}
    if args.thinking:
        found["template_vars"] = {"enable_thinking": args.thinking == "on"}
    return found


def read_messages(path: Path) -> tuple[list[dict], list[dict] | None]:
    """The messages of a --messages file and the tools they may call. Raises InputError."""
    found = read_json_file(path, f"--messages {path}", (list, dict))
    found = {"messages": found} if isinstance(found, list) else found
    if unknown := found.keys() - {"messages", "tools"}:
        wrong = f"unknown key {min(unknown)[:80]!r}, expected messages and tools"
        raise InputError(f"--messages {path}: {wrong}")
    if not isinstance(found.get("messages"), list):
        wrong = 'expected a list of messages, or an object with a list under "messages"'
        raise InputError(f"--messages {path}: {wrong}")
    return found["messages"], found.get("tools")
