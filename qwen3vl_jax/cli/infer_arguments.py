"""What the options of infer_options.py may be together, and all checks of them that need no file."""

import argparse
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qwen3vl_jax.cli.infer_options import MODES, PROGRAMS, parser_of
from qwen3vl_jax.config import AXES, SHORT
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.planning.machines import check_plan_arguments
from qwen3vl_jax.processing.fetching import MediaRules
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import absolute, is_remote

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


def arguments(argv: list[str] | None, program: str = "infer.py") -> argparse.Namespace:
    """The options and `mode`, a module of cli/. Raises InputError for those that mean nothing together."""
    parser, meant = parser_of(program)
    if program == "qwen3vl chat":
        argv = ["--chat", *(argv or ())]
    # None, which no option gives, marks those that are left out.
    defaults = {name: parser.get_default(name) for name in vars(parser.parse_args([]))}
    found = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in found.items() if value is not None}
    modes = [mode for mode in MODES if mode in given]
    if len(modes) > 1:
        raise InputError(f"--{modes[0]} and --{modes[1]}: give one of them")
    mode = modes[0] if modes else "mesh" if "mesh" in given else "ask"
    if mode not in PROGRAMS[program]:
        there = next(name for name, its in reversed(PROGRAMS.items()) if mode in its)
        other = f"--{mode}: is for {there}, which is a command of its own"
        missing = f"{program}: --input or --output is missing, expected both"
        raise InputError(other if mode in MODES else missing)
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
