"""The examples, and the Python of the pages, run and give the right answer."""

import importlib.util
import re
from pathlib import Path

import pytest

from demo import gallery

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# What the pages write for a reader, and what a test has.
STAND_INS = {
    "Qwen/Qwen3-VL-2B-Instruct": str(ROOT / "demo" / "checkpoint"),
    "DIR": str(ROOT / "demo" / "checkpoint"),
    "cat.jpg": str(ROOT / "demo" / "pictures" / "grid.png"),
    "What is this?": "Read the digits row by row.",
}


@pytest.fixture(scope="module")
def digits() -> str:
    """What demo/pictures/grid.png was composed of, as the demo answers."""
    picture = gallery.compose("grid.png")
    return "\n".join(" ".join(map(str, row)) for row in picture.labels.reshape(picture.grid))


def load_example(name: str):
    """An example as a module; main() has not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_minimal_reads_the_digits(digits, capsys):
    """The visible loop writes the digits of the image, and fits on one page."""
    assert load_example("minimal").main() == digits
    assert capsys.readouterr().out == digits + "\n"
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_python_of_a_page_reads_the_digits(page, digits, capsys):
    """The block runs with the demo's checkpoint and image in the place of the reader's own."""
    found = re.search(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found
    code = found[1]
    for name, stand_in in STAND_INS.items():
        code = code.replace(f'"{name}"', repr(stand_in))
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out == digits + "\n"
