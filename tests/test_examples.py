"""The examples run as they are, and give the right answer."""

import importlib.util
from pathlib import Path

from demo import gallery

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load_example(name: str):
    """An example as a module; main() has not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_minimal_reads_the_digits(capsys):
    """The visible loop writes the digits that the image was composed of, and fits on one page."""
    picture = gallery.compose("grid.png")
    rows = picture.labels.reshape(picture.grid)
    digits = "\n".join(" ".join(map(str, row)) for row in rows)
    assert load_example("minimal").main() == digits
    assert capsys.readouterr().out == digits + "\n"
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 80
