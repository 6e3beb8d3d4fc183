"""The public face: names, signatures, options and recipe keys are those of public.json.

A name or an option that goes breaks somebody's program. `python tests/test_public.py` writes the file
anew after a wanted change.
"""

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).parent / "public.json"
COMMANDS = {
    "infer.py": ["infer.py"],
    "train.py": ["train.py"],
    "convert": ["-m", "convert"],
    "qwen3vl score": ["-c", "from qwen3vl_jax.cli.score import main; main()"],
    "qwen3vl serve": ["-c", "from qwen3vl_jax.cli.main import main; main()", "serve"],
}


def signatures() -> dict[str, str]:
    """Parameters of every public function, and fields of every public class, as text."""
    package = importlib.import_module("qwen3vl_jax")
    return {name: _parameters(getattr(package, name)) for name in package.__all__ if name[0] != "_"}


def _parameters(thing) -> str:
    return ", ".join(map(_parameter, inspect.signature(thing).parameters.values()))


def _parameter(p: inspect.Parameter) -> str:
    plain = p.default is None or isinstance(p.default, bool | int | float | str | tuple)
    return f"{p.name}={p.default!r}" if plain else p.name


def options(command: list[str]) -> list[str]:
    """The options that a command's help names."""
    done = subprocess.run(
        [sys.executable, *command, "--help-all"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", done.stdout)))


def recipe_keys(cls) -> dict:
    """Every key of a recipe with its default, tables within tables."""
    keys = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            keys[field.name] = recipe_keys(type(default))
        else:
            keys[field.name] = "required" if default is dataclasses.MISSING else default
    return json.loads(json.dumps(keys))


def test_public_names_and_their_parameters_stay():
    """Each name of 0.1 is there and takes what it took."""
    assert signatures() == json.loads(FILE.read_text())["signatures"]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_stay(command):
    """Each option of 0.1 is in the help."""
    assert options(COMMANDS[command]) == json.loads(FILE.read_text())["options"][command]


def test_recipe_keys_stay():
    """Each key of a recipe is there with its default."""
    from qwen3vl_jax.training.recipe import Recipe

    assert recipe_keys(Recipe) == json.loads(FILE.read_text())["recipe"]


if __name__ == "__main__":
    from qwen3vl_jax.training.recipe import Recipe

    found = {
        "signatures": signatures(),
        "options": {name: options(command) for name, command in COMMANDS.items()},
        "recipe": recipe_keys(Recipe),
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
