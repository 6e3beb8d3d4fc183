"""Mixed lines of a batch file: pictures, one of them in each sixth line, clips, text, turns, prefixes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from demo import evaluate

RULES = (
    "Read carefully, look at every cell of the picture, and answer with nothing but digits. " * 2
)


def text(words):
    return {"type": "text", "text": words}


def mixed(folder: Path, count: int) -> list[dict]:
    """The lines, as dicts; their pictures are written into `folder`."""
    exams = iter(evaluate.compose(count))
    grid = {"type": "image", "image": str(Path(evaluate.CHECKPOINT).parent / "pictures/grid.png")}
    lines = []
    for i in range(count):
        exam, system = next(exams), []
        name = folder / f"{i}.png"
        Image.fromarray(exam.picture.pixels).save(name)
        content = [{"type": "image", "image": str(name)}, text(exam.turn.question)]
        if i % 6 == 1:
            content = [grid, text(exam.turn.question)]
        elif i % 12 == 2:
            content = [text("Who are you?" if i % 24 == 2 else f"Say {i}.")]
        elif i % 12 == 3:
            system = [{"role": "system", "content": RULES}]
        elif i % 30 == 4:
            frames = [str(name)] * 4
            content = [{"type": "video", "video": frames, "video_metadata": {"fps": 2}}, content[1]]
        turns = [{"role": "user", "content": content}]
        if i % 10 == 5:
            turns += [{"role": "assistant", "content": "5"}]
            turns += [{"role": "user", "content": [content[0], text("And how many digits?")]}]
        lines.append({"id": f"q{i}", "messages": [*system, *turns]})
        lines[-1]["max_new_tokens"] = int(np.random.default_rng(i).integers(1, 70))
    return lines


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path
