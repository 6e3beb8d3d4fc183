"""The command `qwen3vl`. The module of a command is imported when it is called, so that help is quick."""

import importlib
import sys

from qwen3vl_jax.version import __version__

# Command -> (its module in cli/, what it does).
COMMANDS = {
    "ask": ("infer", "answer a question about images and videos"),
    "chat": ("infer", "talk in the terminal"),
    "batch": ("infer", "answer a file of many prompts"),
    "serve": ("serve", "answer requests over HTTP, as OpenAI's API has them"),
    "score": ("score", "measure answers against those of a data set"),
    "train": ("train", "fine-tune by a recipe: all weights, LoRA or QLoRA"),
    "convert": ("convert", "Hugging Face files <-> Orbax; a run's weights as Hugging Face files"),
    "plan": ("plan", "compile for a machine that is not here: does it fit, how fast is it"),
}
HELP = """usage: qwen3vl COMMAND [options]

Qwen3-VL in JAX: inference, fine-tuning and checkpoint conversion.

{}

qwen3vl COMMAND --help lists a command's options, python -m qwen3vl_jax the versions and devices.

examples:
  qwen3vl ask
  qwen3vl ask --ckpt Qwen/Qwen3-VL-2B-Instruct --image cat.jpg --prompt "What is this?"
  qwen3vl train --config sft_8b_lora --out RUN_DIR data.sources.0.path=chats.jsonl
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command as the whole process; 0, or 2 with one line for a name that is none."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "--help-all", "help"):
        print(HELP.format("\n".join(f"  {x:9}{what}" for x, (_, what) in COMMANDS.items())), end="")
    elif name == "--version":
        print(f"qwen3vl_jax {__version__}")
    elif name in COMMANDS:
        module = importlib.import_module(f"qwen3vl_jax.cli.{COMMANDS[name][0]}")
        if hasattr(module, "script"):
            module.script(rest, f"qwen3vl {name}")
        else:
            from qwen3vl_jax.runtime.console import run_script

            run_script(lambda: sys.exit(module.main(rest)))
    else:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else f"expected {', '.join(COMMANDS)}"
        print(f"error: qwen3vl {name}: no such command; {advice}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
