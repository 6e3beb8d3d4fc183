"""Options of qwen3vl ask, chat, batch, plan and of infer.py, and the modes in which each has a meaning."""

from collections.abc import Callable
from typing import Any

from qwen3vl_jax.cli.foreign_options import FOREIGN
from qwen3vl_jax.cli.main import COMMANDS
from qwen3vl_jax.planning.machines import add_plan_arguments
from qwen3vl_jax.runtime.compile_cache import HELP
from qwen3vl_jax.runtime.console import Parser
from qwen3vl_jax.runtime.distributed import add_arguments as add_process_arguments
from qwen3vl_jax.storage.paths import argument

# The options that ask for something other than one answer, and why others have no meaning beside them.
MODES = {
    "chat": "it asks for the questions itself",
    "input": "its lines hold whole conversations",
    "embed": "it prints a vector, no answer",
    "rerank": "it prints scores, no answer",
    "plan": "it compiles and answers nothing",
}
# Programs, and the modes whose options they show ("ask" is one answer, "mesh" one answer with --mesh).
PROGRAMS = {
    "infer.py": ("ask", "mesh", *MODES),
    "qwen3vl ask": ("ask", "mesh", "embed", "rerank"),
    "qwen3vl chat": ("chat",),
    "qwen3vl batch": ("input",),
    "qwen3vl plan": ("plan",),
}
# The options of --help; --help-all shows all.
_COMMON = """
    ckpt dtype weights mesh adapter prompt image video system messages stream draw max_new_tokens max_len
    stop temperature top_p top_k seed max_pixels fps input output rows chat plan slices
"""
# What a plan depends on.
_PLANNED = "help help_all ckpt dtype weights max_len rows prefill_chunk mesh slices save"
_USAGE = {
    "qwen3vl batch": "%(prog)s [--ckpt DIR|ID] --input FILE.jsonl --output FILE.jsonl [options]",
    "qwen3vl plan": "%(prog)s MACHINE [--ckpt DIR|ID] [options]",
}
_ASK = """
  %(prog)s --ckpt Qwen/Qwen3-VL-2B-Instruct --image cat.jpg --prompt "What is this?" --stream
  %(prog)s --ckpt DIR --video holiday.mp4 --fps 1 --prompt "When does it start to rain?"
  %(prog)s --ckpt DIR --mesh tp=2 --image street.png --prompt "Find every car." --draw cars.png
"""
_EXAMPLES = {
    "qwen3vl chat": """
  %(prog)s --ckpt Qwen/Qwen3-VL-2B-Instruct
  %(prog)s --ckpt DIR --video holiday.mp4 --system "Answer in one sentence."
  %(prog)s --ckpt DIR --temperature 0.7 --top-p 0.8
""",
    "qwen3vl batch": """
  %(prog)s --ckpt DIR --input prompts.jsonl --output answers.jsonl
  %(prog)s --ckpt DIR --input prompts.jsonl --output answers.jsonl --rows 64 --max-new-tokens 256
  %(prog)s --ckpt DIR --input prompts.jsonl --output answers.jsonl --media-root photos

a line of prompts.jsonl: {"id": "a", "messages": [{"role": "user", "content": "Hello"}]}
""",
    "qwen3vl plan": """
  %(prog)s h100:8 --ckpt Qwen/Qwen3-VL-32B-Instruct --rows 32 --max-len 8192
  %(prog)s v5e:2x4 --ckpt Qwen/Qwen3-VL-8B-Instruct --weights int8
  %(prog)s v5p:4x8x8 --config sft_235b_pod       a recipe's training step; qwen3vl train --help-all
""",
}

# Adds options to a group of the help, given its title and the modes in which they have a meaning (none are
# all).
Group = Callable[..., Callable[..., None]]


def _number(default: int) -> dict[str, Any]:
    return {"type": int, "default": default, "metavar": "N"}


def _add_model_and_question(group: Group) -> None:
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "FILE|URL"}
    file: dict[str, Any] = {"type": argument, "metavar": "FILE"}
    add = group(title := "model")
    add("--ckpt", metavar="DIR|ID", help="a checkpoint or a Hub id (default: the bundled demo)")
    add("--revision", help="branch, tag or commit of a Hub id (default: main)")
    dtypes = ("float32", "bfloat16", "float16")
    usual = "the checkpoint's; float32 on a CPU; bfloat16 of a plan"
    add("--dtype", choices=dtypes, help=f"of weights (default: {usual})")
    bits = "fp8 keeps an FP8 checkpoint's 8 bits, int8, int4 round others (default: 16 or 32 bits)"
    add("--weights", choices=("fp8", "int8", "int4"), help=bits)
    add("--chat-template", **file, help="a Jinja chat template (default: the checkpoint's)")
    add = group(title, *(m for m in ("ask", *MODES) if m != "plan"))
    add(
        "--adapter",
        metavar="DIR|ID",
        help="a LoRA adapter: PEFT's files or a Hub id (default: none)",
    )
    add = group(title := "question", "ask", "embed", "rerank")
    add("--prompt", metavar="TEXT", help="the question (default: Describe this image.)")
    add = group(title, "ask", "chat", "embed", "rerank")
    add("--image", **many, help="an image: a file, gs:// or http(s) address; may be repeated")
    add("--video", **many, help="a video, likewise; may be repeated")
    add = group(title, "ask", "chat")
    add("--system", metavar="TEXT", help="the system prompt (default: none)")
    add = group(title, "ask")
    add("--messages", **file, help="[{role, content}, ..] in place of --prompt")
    special = "take <|im_end|> and the like in a text as special tokens (default: as characters)"
    group(title)("--allow-special", action="store_true", help=special)
    add = group("other questions", "chat")
    add("--chat", action="store_true", help="a chat; --image, --video go with its first question")
    add = group("other questions", "embed")
    add("--embed", action="store_true", help="print the embedding of the prompt, a unit vector")
    add("--dims", type=int, metavar="N", help="length of the vector, Matryoshka (default: all)")
    add = group("other questions", "rerank")
    add("--rerank", action="store_true", help="print how well each --document answers the prompt")
    document = "with --rerank: text, or the file of an image or video; may be repeated"
    add("--document", action="append", default=[], metavar="TEXT|FILE", help=document)
    add = group("other questions", "embed", "rerank")
    add("--instruction", metavar="TEXT", help="the task of vector or score (default: the model's)")


def _add_answer(group: Group) -> None:
    modes = ("ask", "chat", "input", "plan")
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    fraction: dict[str, Any] = {"type": float, "metavar": "X"}
    add = group(title := "answer", "ask", "chat")
    add("--stream", action="store_true", help="print the answer as it comes")
    add = group(title, "ask")
    add("--draw", type=argument, metavar="OUT.png", help="draw the answer's boxes and points")
    add("--answers", **_number(1), help="answers, from one prefill (default: %(default)s)")
    add = group(title, *modes)
    add("--max-new-tokens", **_number(1024), help="most tokens of an answer (default: %(default)s)")
    most = "most tokens of prompt and answer (default: the model's; plans: up to 32,768)"
    add("--max-len", **number, help=most)
    end = "end the answer before this text; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=end)
    add = group("sampling (default: as the checkpoint's generation_config.json says)", *modes)
    add("--temperature", **fraction, help="how random the choice of tokens is; 0: the likeliest")
    add("--top-k", **number, help="choose among the N likeliest tokens; 0 is off")
    add("--top-p", **fraction, help="choose among the likeliest of joint probability X; 1 is off")
    add("--min-p", **fraction, help="drop tokens less likely than X times the first; 0 is off")
    add("--repetition-penalty", **fraction, help="above 1, tokens repeat less; 1 is off")
    less = "make tokens already in the answer less likely (default: %(default)g, off)"
    add("--presence-penalty", **fraction, default=0.0, help=less)
    add("--min-new-tokens", **number, help="fewest tokens of an answer")
    add("--seed", **_number(0), help="seed of random choices (default: %(default)s)")


def _add_control(group: Group) -> None:
    add = group(title := "answer", "ask", "chat", "input")
    switch = "where the chat template has enable_thinking (default: as the template has it)"
    add("--thinking", choices=("on", "off"), help=switch)
    budget = "most tokens of thinking, then </think> is forced (default: no limit)"
    add("--thinking-budget", type=int, metavar="N", help=budget)
    add = group(title, "ask", "input")
    schema = "answer in JSON of this JSON schema; needs the extra json (default: free text)"
    add("--schema", type=argument, metavar="FILE", help=schema)
    loops = "end an answer that says the same N times in 256 tokens (default: %(default)s, off)"
    add("--max-repeats", **_number(0), help=loops)
    parts = "print one JSON object: text, reasoning, tool calls, boxes in pixels, tokens, times"
    group(title, "ask")("--json", action="store_true", help=parts)


def _add_media_and_lines(group: Group) -> None:
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add = group("images and videos (default: what the checkpoint's preprocessor_config.json says)")
    add("--min-pixels", **number, help="enlarge smaller images to this area")
    add("--max-pixels", **number, help="shrink larger images to this area")
    add("--fps", type=float, metavar="X", help="frames a second of a video (default: mostly 2)")
    add("--num-frames", **number, help="frames of a video, in place of --fps")
    add("--max-frames", **number, help="most frames of a video (default: 768)")
    add("--video-max-pixels", **number, help="shrink videos of more pixels, all frames together")
    lines: dict[str, Any] = {"type": argument, "metavar": "FILE.jsonl"}
    add = group(title := "many prompts", "input")
    add("--input", **lines, help="answer many prompts, a conversation a line; needs --output")
    add("--output", **lines, help="where the answers to --input go")
    add("--media-root", metavar="DIR", help="read local media only below it (default: anywhere)")
    hosts = "the only hosts and gs://buckets to read, private ones too (default: any public host)"
    add("--allow-hosts", metavar="HOST[,HOST]", help=hosts)
    add = group(title, "input", "plan")
    add("--rows", **_number(16), help="answers generated at a time (default: %(default)s)")


def _add_devices(group: Group) -> None:
    axes = "shard the model, as tp=2; axes tp (tensor), ep (expert), fsdp, dp (data), sp (sequence)"
    usual = "N of -1 is the rest (default: one device, or all of this host if the model needs them)"
    add = group(title := "devices")
    add("--mesh", metavar="AXIS=N[,AXIS=N]", help=f"{axes}; {usual}")
    add = group(title, "ask", "chat", "input", "plan")
    add("--prefill-chunk", **_number(8192), help="prompt tokens a step (default: %(default)s)")
    add = group(title, *(m for m in ("ask", *MODES) if m != "plan"))
    add("--no-compile-cache", action="store_true", help=HELP)
    trace = "write a profiler trace of it here, for XProf or Perfetto, and print its time by part"
    add = group(title, "ask", "embed", "rerank", "input")
    add("--profile", metavar="DIR", help=trace)


def parser_of(program: str) -> tuple[Parser, dict[str, tuple[str, ...]]]:
    """The parser of one of PROGRAMS, which takes all options, and {name of an option: its modes}."""
    usage = "%(prog)s [--ckpt DIR|ID] [--image FILE|URL] [--prompt TEXT] [options]"
    usage, what = _USAGE.get(program, usage), COMMANDS.get(program[8:], COMMANDS["ask"])[1]
    examples = f"examples:{_EXAMPLES.get(program, _ASK)}"
    parser = Parser(program, _COMMON, FOREIGN, usage=usage, description=what, epilog=examples)
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

    parts = _add_model_and_question, _add_answer, _add_control, _add_media_and_lines, _add_devices
    for add_options in parts:
        add_options(group)
    meant |= dict.fromkeys(add_process_arguments(parser), ("input", "mesh"))
    add_plan_arguments(parser)
    meant |= dict.fromkeys(("plan", "slices", "save"), ("plan",))
    shown = set(PROGRAMS[program])
    # What its name says already is no option of `qwen3vl chat`.
    idle = {name for name, modes in meant.items() if not shown.intersection(modes)} | {"chat"}
    if program == "qwen3vl plan":
        idle = vars(parser.parse_args([])).keys() - _PLANNED.split()
    parser.idle = idle - {"chat"} if program == "infer.py" else idle
    return parser, meant
